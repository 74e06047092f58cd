"""Optimisers, from optax, to which the learning rate (scaling/engine/schedules.py) is an argument.

As the rate is not baked into the compiled step, runs that differ in learning rate, schedule or D share a program.
"""

import importlib
import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from models.config import ModelConfig
from models.errors import InputError
from models.parametrization import Rule, rule
from scaling.config import OptimConfig


def make_direction(config: OptimConfig, model: ModelConfig | None = None) -> optax.GradientTransformation:
    """Gradients -> direction before learning rate and weight decay: p <- p - lr_t * direction - decay_t * p.

    The global gradient norm is clipped first. Then, each with the rest of its settings as in its paper:
    adamw: b1, b2, eps (1711.05101). lion: b1, b2 (2302.06675). muon: `momentum`; b1, b2, eps for what stays with Adam.
    adafactor (1804.04235): no first moment and an absolute learning rate, so b1 and eps are not used. The second moment
    decays by 1 - t^-0.8 but by no more than b2 (2106.04560), and the update is clipped to an RMS of 1.
    A hook gets its options only. Where gradients are steady, a direction has an RMS of about 0.2 (muon), 0.2 to 0.4
    (adamw) or 1 (lion, adafactor): a good learning rate for one is not one for the others.
    `model` adds what its parametrisation says of each array's learning rate and epsilon (models/parametrization.py).

    Raises InputError where it cannot be imported or gives no GradientTransformation.
    """
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    match config.name:
        case "adamw":
            direction = adam
        case "muon":
            direction = optax.partition({"muon": scale_by_muon(config.momentum), "adam": adam}, muon_or_adam)
        case "lion":
            direction = optax.scale_by_lion(b1=config.b1, b2=config.b2)
        case "adafactor":
            # Factored at every width: optax's own threshold of 128 would change the optimiser halfway up a ladder.
            second = optax.scale_by_factored_rms(
                decay_rate=config.b2,
                decay_rate_fn=lambda step, b2: jnp.minimum(1.0 - (step + 1.0) ** -0.8, b2),
                min_dim_size_to_factor=2,
            )
            direction = optax.chain(second, optax.clip_by_block_rms(1.0))
        case _:
            direction = load_hook(config.name, config.options)
    if model is None or model.parametrization == "standard":
        return optax.chain(clip, direction)
    # g / k into Adam with epsilon is g into Adam with k * epsilon: its direction has no other scale.
    eps = times(model, config.name, lambda r: 1 / r.eps) if config.name in ("adamw", "muon") else optax.identity()
    return optax.chain(clip, eps, direction, times(model, config.name, lambda r: r.lr))


def times(model: ModelConfig, optimizer: str, factor: Callable[[Rule], float]) -> optax.GradientTransformation:
    """Multiplies each array by what `factor` makes of its rule."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return x * factor(rule(model, path[-1].key, optimizer))

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(one, updates))


def decays(params: optax.Params) -> optax.Params:
    """True for the arrays that weight decay acts on: those of two or more axes (matrices, embeddings)."""
    return jax.tree.map(lambda x: x.ndim >= 2, params)


# How Muon sees the hidden weights of models/transformer.py, by name; axes that are neither in nor out number matrices.
MUON_MATRICES = {
    "qkv": MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 3)),  # DGNK: each query of a group, keys, values
    "attention_out": MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3),  # GJKD
    "up": MuonDimensionNumbers(reduction_axis=0, output_axis=2),  # DNF: gate and input apart
    "down": MuonDimensionNumbers(reduction_axis=0, output_axis=1),  # FD
}


def muon_or_adam(params: optax.Params) -> optax.Params:
    """Which optimiser an array belongs to: "muon" for hidden matrices; "adam" for embedding, head, norm scales."""
    return jax.tree.map_with_path(lambda path, _: "muon" if path[-1].key in MUON_MATRICES else "adam", params)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, made near-orthogonal matrix by matrix, times 0.2 sqrt(max(fan_in, fan_out)).

    The factor gives the update about the RMS of AdamW's, whose learning rate and weight decay then carry over
    (Moonlight, 2502.16982, section 2.2).
    """

    def dimensions(updates: optax.Updates) -> optax.Updates:
        return jax.tree.map_with_path(lambda path, _: MUON_MATRICES[path[-1].key], updates)

    def match_adam(update: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
        fans = [np.prod(np.take(update.shape, axes)) for axes in numbers]
        return 0.2 * math.sqrt(max(fans)) * update

    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(match_adam, updates, dimensions(updates))),
    )


def load_hook(name: str, options: str) -> optax.GradientTransformation:
    """What the function `name` (module:function) returns for the keyword arguments in `options`, a JSON object."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's: anything can come out of it
        raise InputError(
            f"optim.name = {name!r}: {one_line(error)}; expected module:function, importable from PYTHONPATH"
        ) from error
    try:
        made = make(**json.loads(options or "{}"))
    except Exception as error:
        raise InputError(f"optim.name = {name!r}: called with {options or 'no options'}: {one_line(error)}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(f"optim.name = {name!r}: returned {type(made).__name__}, not an optax.GradientTransformation")
    return made


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
