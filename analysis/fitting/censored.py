"""Log-linear laws with censored points: a value beyond what was measured counts as "at least so much", not as nothing.

Least squares on the measured points alone would be drawn towards those that could be measured (Tobin 1958).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, special, stats

from analysis.errors import InputError
from analysis.metric import LEVEL


@dataclass(frozen=True, eq=False)
class CensoredFit:
    """log y = sum_j params_j column_j + sigma e, e standard normal: the likeliest, with intervals by cluster.

    n, n_right, n_left: points, and those of them known only to lie above, or below, their value.
    """

    params: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    sigma: float
    log_likelihood: float
    n: int
    n_right: int
    n_left: int
    covariance: np.ndarray = field(repr=False)
    clusters: int

    def predict(self, **columns) -> np.ndarray:
        """The median of y at the columns; a column that is left out counts as 1 (the constant)."""
        return np.exp(sum(value * np.asarray(columns.get(name, 1.0), float) for name, value in self.params.items()))


def fit_censored(columns: Mapping[str, np.ndarray], y, side=None, cluster=None) -> CensoredFit:
    """The likeliest log-linear law of y, (rows,), above 0. columns: name -> (rows,), a constant among them as ones.

    side: (rows,) 1 where the truth lies above y (right-censored), -1 where below, 0 where y is measured. cluster:
    (rows,) labels of rows that share noise; the intervals are those of the sandwich by cluster, Student's t. Raises
    InputError where the measured points cannot identify the law.
    """
    X = np.stack([np.asarray(c, float) for c in columns.values()], axis=1)
    y = np.asarray(y, float)
    if not (np.isfinite(y) & (y > 0)).all() or not np.isfinite(X).all():
        raise InputError("censored fit: expected finite values above 0, and finite columns")
    side = np.zeros(len(y), int) if side is None else np.asarray(side, int)
    seen, size = side == 0, X.shape[1]
    if np.linalg.matrix_rank(X[seen]) < size or seen.sum() <= size:
        raise InputError(f"censored fit: {seen.sum()} measured points cannot identify {size} parameters; measure more")
    _, group = np.unique(np.arange(len(y)) if cluster is None else np.asarray(cluster).astype(str), return_inverse=True)
    clusters = int(group.max()) + 1
    if clusters <= size:
        raise InputError(f"{clusters} clusters for {size} parameters: at least one more is needed")
    log_y = np.log(y)
    X, triangle = np.linalg.qr(X)  # columns as far apart as they can be: logs of N and a constant nearly are one
    X, back = X * np.sqrt(len(y)), np.linalg.inv(triangle) * np.sqrt(len(y))
    begin, *_ = np.linalg.lstsq(X[seen], log_y[seen], rcond=None)
    spread = max(float(np.std(log_y[seen] - X[seen] @ begin)), 1e-3)

    # Olsen (1978): in b / sigma and 1 / sigma the log likelihood is concave, so this optimum is the only one.
    def parts(t):
        """Log likelihood of each row, (rows,), and its gradient, (rows, size + 1), at (b / sigma, log(1 / sigma))."""
        inverse = np.exp(t[-1])
        r = inverse * log_y - X @ t[:-1]
        hazard = np.exp(stats.norm.logpdf(r) - special.log_ndtr(np.where(side > 0, -r, r)))
        value = np.where(seen, stats.norm.logpdf(r) + t[-1], special.log_ndtr(np.where(side > 0, -r, r)))
        slope = np.where(seen, -r, np.where(side > 0, -hazard, hazard))
        gradient = np.concatenate([-slope[:, None] * X, (slope * inverse * log_y + seen)[:, None]], axis=1)
        return value, gradient

    def cost(t):
        value, gradient = parts(t)
        return -value.sum(), -gradient.sum(axis=0)

    found = optimize.minimize(
        cost, np.append(begin / spread, -np.log(spread)), jac=True, method="BFGS", options={"gtol": 1e-7}
    )
    t = found.x
    hessian = np.stack([(cost(t + step)[1] - cost(t - step)[1]) / 2e-5 for step in 1e-5 * np.eye(len(t))])
    scores = np.zeros((clusters, len(t)))
    np.add.at(scores, group, parts(t)[1])
    inverse = np.linalg.pinv((hessian + hessian.T) / 2)
    sandwich = inverse @ (scores.T @ scores) @ inverse * clusters / max(clusters - size, 1)
    sigma = float(np.exp(-t[-1]))
    # From (b / sigma, log(1 / sigma)) to b: its derivatives.
    turn = back @ np.concatenate([sigma * np.eye(size), -sigma * t[:-1, None]], axis=1)
    covariance = turn @ sandwich @ turn.T
    half = stats.t.ppf((1 + LEVEL) / 2, clusters - size) * np.sqrt(np.diag(covariance))
    values = dict(zip(columns, (back @ (sigma * t[:-1])).tolist(), strict=True))
    return CensoredFit(
        params=values,
        intervals={k: (v - h, v + h) for (k, v), h in zip(values.items(), half.tolist(), strict=True)},
        sigma=sigma,
        log_likelihood=-float(found.fun),
        n=len(y),
        n_right=int((side > 0).sum()),
        n_left=int((side < 0).sum()),
        covariance=covariance,
        clusters=clusters,
    )
