"""Momentum made orthogonal, for hidden matrices: `momentum`; the other arrays are Adam's: b1, b2, eps."""

import math

import jax
import numpy as np
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from scaling.config import OptimConfig
from scaling.optimizers import adamw

EPSILON = True
SPECTRAL = True

# How Muon sees the hidden weights of models/transformer.py, by name; axes that are neither in nor out number matrices.
MATRICES = {
    "qkv": MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 3)),  # DGNK: each query of a group, keys, values
    "attention_out": MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3),  # GJKD
    "up": MuonDimensionNumbers(reduction_axis=0, output_axis=2),  # DNF: gate and input apart
    "down": MuonDimensionNumbers(reduction_axis=0, output_axis=1),  # FD
}


def direction(config: OptimConfig) -> optax.GradientTransformation:
    return optax.partition({"muon": scale_by_muon(config.momentum), "adam": adamw.direction(config)}, muon_or_adam)


def muon_or_adam(params: optax.Params) -> optax.Params:
    """Which optimiser an array belongs to: "muon" for hidden matrices; "adam" for embedding, head, norm scales."""
    return jax.tree.map_with_path(lambda path, _: "muon" if path[-1].key in MATRICES else "adam", params)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, made near-orthogonal matrix by matrix, times 0.2 sqrt(max(fan_in, fan_out)).

    The factor gives the update about the RMS of AdamW's, whose learning rate and weight decay then carry over
    (Moonlight, 2502.16982, section 2.2).
    """

    def dimensions(updates: optax.Updates) -> optax.Updates:
        return jax.tree.map_with_path(lambda path, _: MATRICES[path[-1].key], updates)

    def match_adam(update: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
        fans = [np.prod(np.take(update.shape, axes)) for axes in numbers]
        return 0.2 * math.sqrt(max(fans)) * update

    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(match_adam, updates, dimensions(updates))),
    )
