"""Monotone fits: the best curve that never falls, the chance that the mean curve does not, and where it fails."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from analysis.errors import InputError
from analysis.metric import LEVEL


@dataclass(frozen=True, eq=False)
class Isotonic:
    """A curve over x, in its order: its mean, and the nearest monotone curve with its interval, (points,) each.

    p_monotone: the share of bootstrap draws, over problems, whose mean curve never turns by more than `tolerance`.
    steps: a row for each pair of neighbours, with from, to, change and its interval low, high; `fails` where the curve
    turns beyond doubt, that is with 95 % of all steps together (Bonferroni): a curve that is flat seldom fails
    anywhere.
    """

    x: np.ndarray
    mean: np.ndarray
    fitted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_monotone: float
    steps: pd.DataFrame

    @property
    def where_it_fails(self) -> str:
        """The steps at which the curve turns beyond doubt, as text; "" where there are none."""
        rows = self.steps[self.steps["fails"]]
        return "; ".join(
            f"{r['from']:.4g} to {r['to']:.4g}: {r['change']:+.3g} [{r['low']:+.3g}, {r['high']:+.3g}]"
            for r in rows.to_dict("records")
        )


def isotonic(
    x, values, increasing: bool = True, cluster=None, tolerance: float = 0.0, draws: int = 2000, seed: int = 0
) -> Isotonic:
    """The monotone fit of the mean of `values`, (problems, points), along x, (points,).

    cluster: (problems,) labels of problems that are not independent, which the bootstrap resamples together. Raises
    InputError for fewer than two points or problems.
    """
    x, values = np.asarray(x, float), np.asarray(values, float)
    if values.ndim != 2 or x.shape != values.shape[1:] or min(values.shape) < 2:
        raise InputError(f"values {values.shape} at x {x.shape}: expected (problems, points), at least two of each")
    if not np.isfinite(values).all() or len(np.unique(x)) < len(x):
        raise InputError("values: expected finite numbers, at points x that all differ")
    order = np.argsort(x)
    x, values, sign = x[order], values[:, order], 1.0 if increasing else -1.0
    units = values
    if cluster is not None:
        _, group = np.unique(np.asarray(cluster).astype(str), return_inverse=True)
        sums = np.zeros((group.max() + 1, len(x)))
        np.add.at(sums, group, values)
        units, size = sums, np.bincount(group).astype(float)
    else:
        size = np.ones(len(values))
    if len(units) < 2:
        raise InputError("cluster: one cluster alone; its noise cannot be known")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=draws).astype(float)
    drawn = (counts @ units) / (counts @ size)[:, None]
    fits = np.array([isotonic_regression(row, increasing=increasing).x for row in drawn])
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(fits, [tail, 100 - tail], axis=0)
    mean, changes = values.mean(axis=0), np.diff(drawn, axis=1)
    step_low, step_high = np.percentile(changes, [tail, 100 - tail], axis=0)
    most = np.percentile(sign * changes, 100 - tail / (len(x) - 1), axis=0)
    steps = pd.DataFrame(
        {"from": x[:-1], "to": x[1:], "change": np.diff(mean), "low": step_low, "high": step_high}
        | {"fails": most < -tolerance}
    )
    fitted = isotonic_regression(mean, increasing=increasing).x
    p_monotone = float(np.mean((sign * changes >= -tolerance - 1e-12).all(axis=1)))
    return Isotonic(x, mean, fitted, low, high, p_monotone, steps)
