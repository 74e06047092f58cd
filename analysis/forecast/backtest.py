"""Rolling origin over compute: fit the cheaper runs, predict the costlier ones, for many cuts, and keep every error.

Only runs that are not held out are read. The errors choose the law (`select`) and size its misfit (`uncertainty`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.fitting.optimise import minimise
from analysis.fitting.problem import Problem, noise_of
from analysis.fitting.search import solve


@dataclass(frozen=True, eq=False)
class Backtest:
    """One law's errors over the cuts, one entry per predicted run of each cut.

    error: predicted - measured, on the metric's link (log loss); relative: predicted / measured - 1; factor: its effort
    (`Law.effort`: compute) over that of the cut's most expensive run; distance: decades of effort past the cut's
    `origin_of`; variance: of the prediction, from the cut's own noise and curvature; cut: the index of the cut.
    fitted: runs below each cut.
    """

    law: str
    cut: np.ndarray
    error: np.ndarray
    distance: np.ndarray
    variance: np.ndarray
    fitted: tuple[int, ...]
    factor: np.ndarray | None = None
    relative: np.ndarray | None = None


def cuts_of(problem: Problem, size: int | None = None, factor: float = 4.0, most: int = 12):
    """Cuts at which a law of `size` (default: the problem's) parameters can be tried, and a note.

    They are (fitted mask, predicted mask) pairs over the problem's rows, cheapest first.

    A cut fits the runs up to one level of compute and predicts those up to `factor` times that level. Left out are cuts
    with fewer than size + 2 runs, or fewer than a third of all, or a single N or D; the note returned beside says so.
    """
    law, size = problem.law, len(problem.model.free) if size is None else size
    compute = problem.runs.fitted.flops if {"N", "D"} <= set(law.inputs) else problem.effort
    inputs = problem.inputs
    levels = np.unique(compute)[:-1]
    pairs, skipped = [], 0
    for level in levels:
        below = compute <= level * (1 + 1e-9)
        above = ~below & (compute <= factor * level * (1 + 1e-9))
        enough = below.sum() >= max(size + 2, len(problem) / 3)
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

    Measured from the most expensive run, a squared distance is blind to the error just past it; from the median, it
    also counts how short a lever the runs give.
    """
    return float(np.median(np.log10(effort)))


def backtest(problem: Problem, pairs=None) -> Backtest:
    """Errors of a problem's law over the cuts (by default its own), with all that the problem holds.

    All cuts are fitted as one batch. A fit for a target aims, at each cut, at the runs that the cut predicts.
    """
    if pairs is None:
        problem = problem.sample()
        pairs, _ = cuts_of(problem)
    law, model = problem.law, problem.model
    if not pairs:
        none = np.empty(0)
        return Backtest(law.name, none.astype(int), none, none, none, ())
    target = problem.target
    own = np.array([problem.weights_of(below, above) for below, above in pairs])
    with np.errstate(all="ignore"):
        u = solve(model, target, first_fits(problem, pairs), own, problem.objective, problem.delta, warm=True)
        value, jacobian = problem.law.linked(model.z(u), problem.inputs, problem.metric.link)
        jacobian = jacobian if model.matrix is None else np.matmul(model.matrix, jacobian)
        parts = [_errors(problem, i, *pair, own[i], value[i], jacobian[i]) for i, pair in enumerate(pairs)]
    cut, error, distance, variance, factor, relative = (np.concatenate(column) for column in zip(*parts, strict=True))
    fitted = tuple(int(below.sum()) for below, _ in pairs)
    return Backtest(law.name, cut, error, distance, variance, fitted, factor, relative)


def first_fits(problem: Problem, pairs) -> np.ndarray:
    """(cuts, free) rough fits to the runs below each cut: the best of each cut's starts at a wide delta."""
    law, model = problem.law, problem.model
    starts = [
        law.starts(problem.observed[below], [v[below] for v in problem.inputs])[:, model.free] for below, _ in pairs
    ]
    counts = [len(s) for s in starts]
    weights = np.repeat([problem.weights_of(below, above) for below, above in pairs], counts, axis=0)
    wide = max(problem.delta, 0.1) if problem.objective == "huber" else 0.1
    u, cost = minimise(model, problem.target, np.concatenate(starts), weights, delta=wide, iterations=40)
    ends = np.cumsum(counts)
    return u[[e - c + int(np.argmin(cost[e - c : e])) for e, c in zip(ends, counts, strict=True)]]


def _errors(problem: Problem, cut: int, below, above, weights, value, jacobian):
    """The columns of `Backtest` for the runs above one cut."""
    measured, effort = problem.metric.to_link(problem.observed), np.log10(problem.effort)
    root = np.sqrt(weights[below])
    noise = noise_of(((value - measured)[below] * root)[root > 0], len(problem.model.free))["sigma"]
    # Directions the cut cannot see are cut off: there the misfit, not the noise, has to answer for the error.
    inverse = np.linalg.pinv((jacobian[:, below] * root).T, rcond=1e-4)
    spread = jacobian[:, above].T @ inverse
    own = problem.metric.spread(problem.observed[above]) ** 2
    error = value[above] - measured[above]
    log = problem.metric.link == "log"
    relative = np.expm1(error) if log else problem.metric.from_link(value[above]) / problem.observed[above] - 1
    return (
        np.full(above.sum(), cut),
        error,
        np.maximum(effort[above] - origin_of(problem.effort[below]), 0.0),
        noise**2 * (own + np.sum(spread**2, axis=1)),
        problem.effort[above] / problem.effort[below].max(),
        relative,
    )
