"""What the library's sweeps have in common: the quickstart's models at any size, its rule, and what the dial turns.

The dial multiplies compute: sizes, horizons and warm-up grow with its square root, so D/N and a sweep's shape stay.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import chain

from models.config import ModelConfig
from models.errors import InputError
from models.sizing import counts
from scaling.run import RunConfig
from sweeps.define import Runs, union
from sweeps.library.quickstart import BASE, RULE


def base(dial: float = 1) -> RunConfig:
    """The quickstart's settings at batch 2, with the warm-up turned by the dial."""
    warmup = round(BASE.schedule.warmup_tokens * math.sqrt(dial))
    schedule = dataclasses.replace(BASE.schedule, warmup_tokens=warmup)
    return dataclasses.replace(BASE, schedule=schedule, batch_size=RULE.batch_size)


def models(n: Sequence[float], dial: float = 1) -> list[ModelConfig]:
    """The rung nearest to each n_compute of `n` times sqrt(dial). Raises InputError where two of them fall together."""
    found = [rung(size * math.sqrt(dial)) for size in n]
    if len(set(found)) < len(found):
        raise InputError(f"dial = {dial:g}: two sizes of the sweep become one model; take a larger dial")
    return found


def horizons(tokens: Sequence[float], dial: float = 1) -> list[int]:
    return [round(D * math.sqrt(dial)) for D in tokens]


def rung(n: float) -> ModelConfig:
    """The model of n_compute nearest to n, by ratio: the quickstart's three layers and two heads up to width 76, then
    depth with the 2/3 power of width and heads of 64."""
    widths = chain(range(8, 128, 4), range(128, 32_768, 64))
    best, error = None, math.inf
    for d in widths:
        model = of_width(d)
        off = abs(math.log(counts(model).n_compute / n))
        if off > error:
            break
        best, error = model, off
    return best


def of_width(d_model: int) -> ModelConfig:
    """Width over depth is 19 at 56, 26 at 128, 51 at 1,024: as flat a choice as models.sizing.aspect_ratio's."""
    n_layers = max(3, round(d_model ** (2 / 3) / 5))
    return ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=max(2, d_model // 64), rope_theta=100.0)


def tuned(runs: Iterable[RunConfig], scale: float = 1.0) -> Runs:
    """Each run with `scale` times the learning rate of the quickstart's rule, at its N and the middle of the horizons.

    The middle is the geometric mean over the runs that are equal in all else. One rate for all horizons costs a little
    at the ends, and lets them share a trunk.
    """
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in union(runs):
        alike = dataclasses.replace(config, tokens=1, optim=dataclasses.replace(config.optim, lr=1.0))
        groups.setdefault(alike, []).append(config)
    rated = {}
    for group in groups.values():
        middle = math.exp(sum(math.log(c.tokens) for c in group) / len(group))
        for config in group:
            lr = float(f"{scale * RULE.lr(config.counts.n_compute, middle):.3g}")
            rated[config] = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))
    return union(rated[config] for config in union(runs))
