"""The family of models that the studies share, S1 to S6, its learning rates, and what the dial turns.

Two layers, heads 16 wide (S2: one of 24), so that N = 24 d^2 + V d changes in width alone.
"""

import dataclasses
from typing import Any

from models.config import ModelConfig
from scaling.config import RunConfig
from sweeps.define import Rule

WIDTHS = {"S1": 16, "S2": 24, "S3": 32, "S4": 48, "S5": 64, "S6": 96}
HEAD = 16
#: Best rate at width 32, by world; tuned at S1, S3 and S5 on a x2 grid.
RATES = {"facts": 0.01, "signs": 0.006}


def model(size: str, vocab_size: int, dial: float = 1.0, **kind: Any) -> ModelConfig:
    """The model of a size, such as "S3". kind: other fields of a ModelConfig that say nothing of its size."""
    return of_width(width(WIDTHS[size], dial), vocab_size, **kind)


def of_width(d_model: int, vocab_size: int, n_layers: int = 2, **kind: Any) -> ModelConfig:
    heads = max(1, d_model // HEAD)
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_heads=heads, **kind)


def width(d_model: int, dial: float = 1.0) -> int:
    """A width at a dial: N grows with its square root, in whole heads; below 1 the sizes stay."""
    return d_model if dial <= 1 else max(d_model, HEAD * round(d_model * dial**0.25 / HEAD))


def tokens(D: float, dial: float = 1.0) -> int:
    """A number of tokens at a dial: D grows with its square root, as N does; below 1 D alone carries the saving."""
    return round(D * (dial**0.5 if dial > 1 else dial))


def rated(world: str, scale: float = 1.0) -> Rule:
    """The rule that gives a run its rate, c (32/d)^.5 of the world, b2 .98, and a cooldown of its last 20 %.

    scale: a multiple of the rate, such as for finetuning. One rate for all D, so that horizons share a trunk.
    """

    def rule(config: RunConfig) -> RunConfig:
        lr = float(f"{scale * RATES[world] * (32 / config.model.d_model) ** 0.5:.3g}")
        optim = dataclasses.replace(config.optim, lr=lr, b2=0.98)
        schedule = dataclasses.replace(config.schedule, name="wsd", decay_fraction=0.2)
        return dataclasses.replace(config, optim=optim, schedule=schedule)

    return rule
