"""Rolling origin over compute: fit the cheaper runs, predict the dearer ones, for many cuts, and keep every error.

Only runs that are not held out are read. The errors choose the law (`select`) and size its misfit (`uncertainty`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.fitting.fit import Model, centred, noise_of, solve
from analysis.fitting.optimise import minimise
from analysis.laws.forms import LAWS, Law
from analysis.runs import Runs


@dataclass(frozen=True, eq=False)
class Backtest:
    """One law's errors over the cuts, one entry per predicted run of each cut.

    error: log predicted - log measured; factor: its compute over that of the cut's dearest run;
    distance: decades of compute past the cut's `origin_of`; variance: of the
    prediction, from the cut's own noise and curvature; cut: the index of the cut. fitted: runs below each cut.
    """

    law: str
    cut: np.ndarray
    error: np.ndarray
    distance: np.ndarray
    variance: np.ndarray
    fitted: tuple[int, ...]
    factor: np.ndarray | None = None


def cuts_of(used: Runs, size: int, law: Law, factor: float = 4.0, most: int = 12):
    """Cuts at which a law of `size` parameters can be tried: (fitted mask, predicted mask) pairs, cheapest first.

    A cut fits the runs up to one level of compute and predicts those up to `factor` times that level. Left out are cuts
    with fewer than size + 2 runs, or fewer than a third of all, or a single N or D; the note returned beside says so.
    """
    compute = used.flops if {"N", "D"} <= set(law.inputs) else used.effort(law)
    inputs = [used.input(name) for name in law.inputs]
    levels = np.unique(compute)[:-1]
    pairs, skipped = [], 0
    for level in levels:
        below = compute <= level * (1 + 1e-9)
        above = ~below & (compute <= factor * level * (1 + 1e-9))
        enough = below.sum() >= max(size + 2, len(used) / 3)
        if not enough or any(len(np.unique(v[below])) < 2 for v in inputs):
            skipped += 1
        elif above.any():
            pairs.append((below, above))
    note = f"{skipped} of {len(levels)} cuts skipped: too few runs, or a single N or D, below them" if skipped else ""
    if len(pairs) > most:
        pairs = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, most).round().astype(int))]
    return pairs, note


def origin_of(effort) -> float:
    """log10 C from which extrapolation is measured: the median of the fitted runs.

    Measured from the dearest run, a squared distance is blind to the error just past it; from the median, it also
    counts how short a lever the runs give.
    """
    return float(np.median(np.log10(effort)))


def backtest(runs: Runs, law: Law | str, pairs=None, delta: float = 1e-3) -> Backtest:
    """Errors of a law over the cuts (by default its own). All cuts are fitted as one batch."""
    law = LAWS[law] if isinstance(law, str) else law
    used = runs.fitted
    if pairs is None:
        pairs, _ = cuts_of(used, law.size, law)
    if not pairs:
        none = np.empty(0)
        return Backtest(law.name, none.astype(int), none, none, none, ())
    inputs, observed, _ = centred(used, law)
    model, target = Model(law, inputs), np.log(observed)
    starts = [law.starts(used.loss[below], [v[below] for v in inputs]) for below, _ in pairs]
    counts = [len(s) for s in starts]
    weights = np.repeat(np.array([below for below, _ in pairs], float), counts, axis=0)
    z, cost = minimise(model, target, np.concatenate(starts), weights, delta=max(delta, 0.1), iterations=40)
    ends = np.cumsum(counts)
    best = [e - c + int(np.argmin(cost[e - c : e])) for e, c in zip(ends, counts, strict=True)]
    z = solve(model, target, z[best], weights[best], delta=delta, warm=True)

    value, jacobian = model(z)
    effort = used.effort(law)
    compute = np.log10(effort)
    parts = []
    for i, (below, above) in enumerate(pairs):
        noise = noise_of(value[i, below] - target[below], law.size)["sigma"]
        # Directions the cut cannot see are cut off: there the misfit, not the noise, has to answer for the error.
        inverse = np.linalg.pinv(jacobian[i][:, below].T, rcond=1e-4)
        spread = jacobian[i][:, above].T @ inverse
        parts.append(
            (
                np.full(above.sum(), i),
                value[i, above] - target[above],
                np.maximum(compute[above] - origin_of(effort[below]), 0.0),
                noise**2 * (1.0 + np.sum(spread**2, axis=1)),
                effort[above] / effort[below].max(),
            )
        )
    cut, error, distance, variance, factor = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Backtest(law.name, cut, error, distance, variance, tuple(int(below.sum()) for below, _ in pairs), factor)
