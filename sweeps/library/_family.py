"""What the library's sweeps have in common: the quickstart's models at any size, the tuned rule, what the dial turns.

The dial multiplies 6ND: sizes, horizons and warm-up grow with its square root, so D/N and a sweep's shape stay. Counted
FLOPs grow by up to a third less, since attention, half as much again as 6ND at 5e3 parameters, is little at 1e6.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import chain

from models.config import ModelConfig
from models.errors import InputError
from models.sizing import counts, fit_d_ff
from scaling.alike import same_but_horizon_and_rate
from scaling.config import RunConfig
from sweeps.define import Runs, union
from sweeps.library.quickstart import BASE, model
from sweeps.library.quickstart import TUNED as RULE


def base(dial: float = 1) -> RunConfig:
    """The quickstart's settings at batch 2, with the warm-up turned by the dial."""
    warmup = round(BASE.schedule.warmup_tokens * math.sqrt(dial))
    schedule = dataclasses.replace(BASE.schedule, warmup_tokens=warmup)
    return dataclasses.replace(BASE, schedule=schedule, batch_size=RULE.batch_size)


def models(n: Sequence[float], dial: float = 1) -> list[ModelConfig]:
    """The rung nearest to each n_compute of `n` times sqrt(dial). Raises InputError where two of them fall together."""
    rungs = [rung(size * math.sqrt(dial)) for size in n]
    if len(set(rungs)) < len(rungs):
        raise InputError(f"dial = {dial:g}: two sizes of the sweep become one model; take another dial")
    return rungs


def horizons(tokens: Sequence[float], dial: float = 1) -> list[int]:
    return [round(D * math.sqrt(dial)) for D in tokens]


def rung(n: float) -> ModelConfig:
    """The model of n_compute nearest to n, by ratio.

    The quickstart's three layers and two heads while width is below 128, in steps of 4. Past it depth grows with the
    2/3 power of width (width over depth 26 at 128, 51 at 1,024), heads are 32 wide, from width 1,024 on 64, and the
    feed-forward width closes what the coarser steps leave open.
    """
    best, error = None, math.inf
    for d in chain(range(8, 128, 4), range(128, 1024, 32), range(1024, 65_536, 64)):
        candidate = of_width(d)
        off = abs(math.log(counts(candidate).n_compute / n))
        if off > error:
            break
        best, error = candidate, off
    if best.d_model < 128:
        return best
    shape = {name: getattr(best, name) for name in ("d_model", "n_heads", "vocab_size", "activation")}
    return fit_d_ff(n, best.n_layers, shape | {"rope_theta": best.rope_theta})


def of_width(d_model: int) -> ModelConfig:
    if d_model < 128:
        return model(d_model)
    n_layers, head = round(d_model ** (2 / 3) / 5), 32 if d_model < 1024 else 64
    return ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=d_model // head, rope_theta=100.0)


def tuned(runs: Iterable[RunConfig], scale: float = 1.0) -> Runs:
    """Each run with `scale` times the learning rate of the tuned rule, at its N and the middle of the horizons.

    The middle is the geometric mean over the runs that are equal in all else. One rate for all horizons costs a little
    at the ends, and lets them share a trunk.
    """
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in union(runs):
        groups.setdefault(same_but_horizon_and_rate(config), []).append(config)
    rated = {}
    for group in groups.values():
        middle = math.exp(sum(math.log(c.tokens) for c in group) / len(group))
        for config in group:
            lr = float(f"{scale * RULE.lr(config.counts.n_compute, middle):.3g}")
            rated[config] = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))
    return union(rated[config] for config in union(runs))
