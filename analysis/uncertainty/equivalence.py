"""Tests of a null: is a mean, or a slope, as good as zero? Two one-sided tests, with standard errors by cluster.

"Not significant" is no evidence of nothing: equivalence is shown where the whole interval lies within a margin that was
stated beforehand (Schuirmann 1987), a difference where it lies outside of zero and reaches past the margin, and else
the data do not decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.errors import InputError

ALPHA = 0.05  # of each one-sided test: the interval is the 90 % one


@dataclass(frozen=True)
class Equivalence:
    """verdict: "equivalent" (the interval lies within +-margin of the null), "different" (it excludes the null, and the
    estimate lies beyond the margin), or "undecided".

    estimate: of the difference from the null. more: clusters to add to those there are before the estimate, if it
    stays, is decided; 0 where it is.
    """

    verdict: str
    estimate: float
    low: float
    high: float
    margin: float
    stderr: float
    dof: float
    clusters: int
    p: float  #: of the weaker of the two one-sided tests: below ALPHA is equivalent
    more: int

    def __str__(self) -> str:
        text = f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}] against a margin of {self.margin:.4g}"
        return f"{self.verdict}: {text}" + (f"; about {self.more} more runs would decide" if self.more else "")


def mean_equivalence(y, margin: float, cluster=None, null: float = 0.0) -> Equivalence:
    """Whether the mean of y, (rows,), is `null` to within the margin. cluster: (rows,) labels of rows whose noise is
    shared, such as runs; None: each row by itself.
    """
    y = np.asarray(y, float) - null
    return of_contrast(np.ones((len(y), 1)), y, cluster, margin)


def slope_equivalence(x, y, margin: float, cluster=None) -> Equivalence:
    """Whether y, (rows,), has no trend along x: the slope of least squares, in units of y per unit of x (give x as
    log10 for a slope per decade), against the margin.
    """
    x = np.asarray(x, float)
    if not np.ptp(x) > 0:
        raise InputError("x: all values are equal; a slope needs two")
    return of_contrast(np.stack([x - x.mean(), np.ones(len(x))], axis=1), np.asarray(y, float), cluster, margin)


def of_contrast(design, y, cluster, margin: float) -> Equivalence:
    """The test of the first coefficient of least squares of y on `design`, (rows, coefficients)."""
    if not 0 < margin < math.inf:
        raise InputError(f"margin = {margin}: expected a number above 0, stated before the data are seen")
    if len(y) != len(design) or not (np.isfinite(y).all() and np.isfinite(design).all()):
        raise InputError("equivalence: expected finite values, one for each row")
    estimate, stderr, dof, clusters = robust(design, y, cluster)
    return decide(estimate, stderr, dof, margin, clusters)


def decide(estimate: float, stderr: float, dof: float, margin: float, clusters: int) -> Equivalence:
    """The verdict from an estimate of the difference from the null, its standard error and degrees of freedom."""
    quantile = stats.t.ppf(1 - ALPHA, dof)
    low, high = estimate - quantile * stderr, estimate + quantile * stderr
    weaker = (margin - abs(estimate)) / stderr if stderr > 0 else math.copysign(math.inf, margin - abs(estimate))
    if -margin < low and high < margin:
        verdict = "equivalent"
    elif (low > 0 or high < 0) and abs(estimate) > margin:
        verdict = "different"
    else:
        verdict = "undecided"
    more = 0
    if verdict == "undecided":
        more = more_clusters(estimate, stderr, dof, margin, clusters)
    p = float(stats.t.sf(weaker, dof))
    return Equivalence(verdict, float(estimate), low, high, margin, float(stderr), float(dof), clusters, p, more)


def more_clusters(estimate: float, stderr: float, dof: float, margin: float, clusters: int) -> int:
    """Clusters to add until an estimate that stays where it is, is decided; its standard error falls as their root."""
    aim = margin - abs(estimate) if abs(estimate) < margin else abs(estimate)
    per_cluster = dof / clusters
    for total in np.unique(np.geomspace(clusters + 1, 1e6 * clusters, 2000).astype(int)):
        if stats.t.ppf(1 - ALPHA, per_cluster * total) * stderr * math.sqrt(clusters / total) < aim:
            return int(total) - clusters
    return int(1e6 * clusters)


def robust(design, y, cluster=None) -> tuple[float, float, float, int]:
    """(estimate, standard error, degrees of freedom, clusters) of the first coefficient of least squares.

    The bias-reduced sandwich CR2 with Satterthwaite's degrees of freedom (Bell and McCaffrey 2002; Pustejovsky and
    Tipton 2018): it holds its level with five clusters, where the plain sandwich does not. Of clusters of one row each
    the mean's is the t test. Raises InputError for fewer than two clusters, or as few as there are coefficients.
    """
    design, y = np.asarray(design, float), np.asarray(y, float)
    names = np.arange(len(y)) if cluster is None else np.asarray(cluster).astype(str)
    _, group = np.unique(names, return_inverse=True)
    clusters = int(group.max()) + 1
    if clusters <= design.shape[1]:
        raise InputError(f"{clusters} clusters (runs) for {design.shape[1]} coefficients: at least one more is needed")
    bread = np.linalg.inv(design.T @ design)
    root = np.linalg.cholesky(bread)
    residual = y - design @ (bread @ (design.T @ y))
    scores, squares, pulls = np.empty(clusters), np.empty(clusters), np.empty((clusters, design.shape[1]))
    order = np.argsort(group, kind="stable")
    for g, rows in enumerate(np.split(order, np.flatnonzero(np.diff(group[order])) + 1)):
        X = design[rows]
        # (I - H_gg)^(-1/2), H_gg of low rank: 1 but along its few directions; what a cluster alone fixes is left out.
        vectors, singular, _ = np.linalg.svd(X @ root, full_matrices=False)
        rest = 1 - singular**2
        scale = np.where(rest > 1e-9, 1 / np.sqrt(np.maximum(rest, 1e-9)), 0.0) - 1
        weight = X @ bread[:, 0]
        adjusted = weight + vectors @ (scale * (vectors.T @ weight))
        scores[g], squares[g], pulls[g] = adjusted @ residual[rows], adjusted @ adjusted, X.T @ adjusted
    # Cov of the scores under equal, independent noise: what Satterthwaite's degrees of freedom need.
    spread = np.diag(squares) - pulls @ bread @ pulls.T
    trace = np.trace(spread)
    dof = trace**2 / np.sum(spread**2) if trace > 0 else 1.0
    return float(bread[0] @ design.T @ y), float(np.sqrt(np.sum(scores**2))), float(dof), clusters
