"""Learning-rate schedules, computed on the host, and optimisers, from optax, to which the rate is an argument.

As the rate is not baked into the compiled step, runs that differ in learning rate, schedule or D share a program.
"""

import math

import jax
import numpy as np
import optax

from scaling.run import OptimConfig, RunConfig


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


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Gradients -> updates before the learning rate: parameters change by -lr times what this gives."""
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decays) if config.weight_decay else optax.identity()
    return optax.chain(clip, adam, decay)


def decays(params: optax.Params) -> optax.Params:
    """True for the arrays that weight decay acts on: those of two or more axes (matrices, embeddings)."""
    return jax.tree.map(lambda x: x.ndim >= 2, params)
