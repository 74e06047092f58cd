"""How initial scale, learning rate and multipliers change with width and depth: one table, a row per kind of array.

standard: nothing changes; the learning rate has to be tuned again at every size. mup (2203.03466, table 8) keeps every
activation's change per step the same at any width, and completep (2505.01618, table 1, alpha = 1) at any depth too, so
that a learning rate tuned at `base_width` and `base_depth` carries over. At the base all three are the same model.

`wide` is width over base width, `deep` depth over base depth. No JAX here.
"""

import math
from typing import NamedTuple

from models.config import ModelConfig

HIDDEN = ("qkv", "attention_out", "up", "down")  # matrices of which both axes grow with the width


class Rule(NamedTuple):
    """What is done to one array, relative to the settings of the run. Weight decay is not in it: an array shrinks by
    the run's lr * decay at every size. PyTorch's AdamW, which has that product, wants 1 / `lr` times the decay for it.
    """

    init: float = 1.0  #: factor of the standard initial scale; head and output projections start at zero in all three
    lr: float = 1.0  #: factor of the learning rate
    eps: float = 1.0  #: factor of Adam's epsilon: as the gradient, so that epsilon plays the same part at every size


class Multipliers(NamedTuple):
    """What is done to activations."""

    residual: float = 1.0  #: of what each branch adds to the residual stream
    logits: float = 1.0
    attention: float = 1.0  #: of q k / sqrt(K)


def rule(config: ModelConfig, name: str, spectral: bool = False) -> Rule:
    """The row of an array by its own name (`embed`, `head`, `qkv`, `attention_out`, `up`, `down`; `scale` of a norm
    within a block; `norm_out`, the norm above all blocks).

    Rows hold for optimisers whose steps have entries of one size whatever the gradient's: adamw, lion, adafactor, and
    hooks of that kind. `spectral`: muon's have spectral norm ~ sqrt(width) instead of ~ width, and a hidden matrix then
    wants wide^-1/2.
    """
    if config.parametrization == "standard":
        return Rule()
    wide, deep = ratios(config)
    # What lies in a block has its gradient by way of a residual multiplier of 1 / deep; the rest has not (table 1).
    eps = 1 / (wide * (deep if name in (*HIDDEN, "scale") else 1.0))
    if name in HIDDEN:
        lr = wide**-0.5 if spectral else 1 / wide
        return Rule(lr=lr, eps=eps)
    # A tied embedding starts at width^-1/2 and is scaled up on the way in; as an input it wants a scale free of width.
    return Rule(init=math.sqrt(wide) if name == "embed" and config.tied else 1.0, eps=eps)


def multipliers(config: ModelConfig) -> Multipliers:
    if config.parametrization == "standard":
        return Multipliers()
    wide, deep = ratios(config)
    # Queries and keys align as they learn, and then q k grows as K, not as sqrt(K).
    return Multipliers(residual=1 / deep, logits=1 / wide, attention=math.sqrt(config.base_head_dim / config.head_dim))


def embedding_multiplier(config: ModelConfig) -> float:
    """Of a tied embedding on its way in, so that the residual stream starts at unit scale."""
    return (config.d_model if config.parametrization == "standard" else config.base_width) ** 0.5


def ratios(config: ModelConfig) -> tuple[float, float]:
    """(wide, deep); deep is 1 where the parametrisation says nothing of depth."""
    wide, deep = config.d_model / config.base_width, config.n_layers / config.base_depth
    return wide, deep if config.parametrization == "completep" else 1.0
