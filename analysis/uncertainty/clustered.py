"""The interval of any statistic of a table whose rows share noise by run or trunk: a bootstrap of whole clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import InputError, nearest_or_all
from analysis.metric import LEVEL


@dataclass(frozen=True, eq=False)
class Interval:
    value: float
    low: float
    high: float
    clusters: int
    draws: np.ndarray = field(repr=False)  #: of the statistic, those that are finite

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def clustered(
    frame: pd.DataFrame,
    statistic: Callable[[pd.DataFrame], float],
    cluster: str = "trunk",
    level: float = LEVEL,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """`statistic(frame)` with the interval of a bootstrap over the clusters of a column, such as trunk or run.

    A table of few clusters varies too little under resampling: the percentiles are those of the t distribution, and
    widened by sqrt(G / (G - 1)) (Hesterberg 2015, The American Statistician 69, section 4). Draws that give no finite
    value are left out. Raises InputError for fewer than three clusters, or where most draws give none.
    """
    if cluster not in frame.columns:
        raise InputError(f"no column {cluster!r} to cluster by{nearest_or_all(cluster, frame.columns)}")
    rows = [np.asarray(r) for r in frame.groupby(cluster, sort=True).indices.values()]
    G = len(rows)
    if G < 3:
        raise InputError(f"column {cluster!r}: {G} clusters; an interval needs at least 3")
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [statistic(frame.iloc[np.concatenate([rows[g] for g in pick])]) for pick in rng.integers(G, size=(draws, G))]
    )
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < draws / 2:
        raise InputError(f"the statistic is finite in only {len(drawn)} of {draws} resamples; use more runs")
    tail = float(stats.norm.cdf(math.sqrt(G / (G - 1)) * stats.t.ppf((1 - level) / 2, G - 1)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(statistic(frame)), float(low), float(high), G, drawn)
