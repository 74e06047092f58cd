"""Learning rate and weight decay of every step of a run, computed on the host. No JAX here."""

import math

import numpy as np

from scaling.config import RunConfig


def learning_rates(config: RunConfig) -> np.ndarray:
    """The rate of every step, float32 [steps].

    wsd: linear warm-up, constant, then lr (1 - sqrt(x)) to zero over the last `decay_fraction` (2405.18392, eq. 1).
    cosine: warm-up, then half a cosine to `final` times lr. The last step trains at a rate above zero: step i uses the
    schedule at its middle, (i + 1/2) / steps.
    """
    s, lr, steps = config.schedule, config.optim.lr, config.steps
    at = np.arange(steps) + 0.5
    warmup = s.warmup_tokens / config.tokens_per_step
    rise = np.minimum(1.0, at / warmup) if warmup > 0 else np.ones(steps)
    match s.name:
        case "wsd":
            decay = s.decay_fraction * steps
            x = np.clip((at - (steps - decay)) / decay, 0.0, 1.0) if decay > 0 else np.zeros(steps)
            shape = 1.0 - np.sqrt(x)
        case "cosine":
            x = np.clip((at - warmup) / max(steps - warmup, 1e-9), 0.0, 1.0)
            shape = s.final + (1 - s.final) * 0.5 * (1 + np.cos(math.pi * x))
        case "constant":
            shape = np.ones(steps)
    return (lr * rise * shape).astype(np.float32)


def weight_decays(config: RunConfig) -> np.ndarray:
    """The share by which decayed parameters shrink at every step, float32 [steps].

    coupled: lr_t * weight_decay. independent: weight_decay * lr_t / lr, free of the peak learning rate (1711.05101,
    algorithm 2, where lr_t / lr is the schedule multiplier).
    """
    optim = config.optim
    factor = optim.weight_decay / (optim.lr if optim.decay == "independent" else 1.0)
    return (learning_rates(config).astype(np.float64) * factor).astype(np.float32)
