"""What is fitted, whole: the law, the runs, weights, objective and delta, what is held, and which runs share noise.

Fit, bootstrap, profile, checks and backtest all take the same `Problem`, so that none of them can forget a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.errors import InputError, nearest_or_all
from analysis.laws.forms import Law, law_named
from analysis.metric import Metric, to_link
from analysis.runs import Runs

OBJECTIVES = ("huber", "lad", "lsq", "lsq_raw")
DELTA = 1e-3
# More runs than this, and the optimum is searched, and laws are judged, on so many of them.
MANY = 2_000


class Model:
    """A law on its link at the runs' inputs, as `minimise` wants it: by free coordinates u, z = u @ matrix + offset."""

    def __init__(self, law: Law, inputs, link: str = "log", matrix=None, offset=None, free=None):
        self.law, self.inputs, self.link, self.matrix, self.offset = law, inputs, link, matrix, offset
        self.free = list(range(law.size)) if free is None else free
        self.low, self.high = np.array(law.bounds).T[:, self.free]

    def __call__(self, u):
        value, jacobian = self.law.linked(self.z(u), self.inputs, self.link)
        return value, jacobian if self.matrix is None else np.matmul(self.matrix, jacobian)

    def z(self, u):
        return u if self.matrix is None else u @ self.matrix + self.offset

    def at(self, inputs) -> Model:
        """The same model at other inputs."""
        return Model(self.law, inputs, self.link, self.matrix, self.offset, self.free)


@dataclass(frozen=True, eq=False)
class Problem:
    """One law to be fitted to the runs that are not held out; `pose` makes it.

    inputs: log of each input less its centre, (rows,) each; observed (rows,); weights (rows,), those given times those
    of the metric's noise; group (rows,): the number of each run's cluster in the column `cluster`, or None where
    runs err independently (cluster "none").
    `weighting` is how the weights came about, for a saved fit: {}, {"weights": (runs,)} or {"target", "kappa"}.
    """

    runs: Runs = field(repr=False)
    law: Law
    objective: str
    delta: float
    delta_reason: str
    fixed: Mapping[str, float]
    tied: tuple[tuple[str, str], ...]
    centre: Mapping[str, float]
    inputs: list[np.ndarray] = field(repr=False)
    observed: np.ndarray = field(repr=False)
    effort: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    model: Model = field(repr=False)
    weighting: Mapping = field(repr=False)
    cluster: str
    group: np.ndarray | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.observed)

    @property
    def metric(self) -> Metric:
        return self.law.metric

    @property
    def unit(self) -> str:
        """Unit of what is fitted; "" where the table does not say it."""
        loss = self.law.target == "loss"
        return "" if loss and not self.runs.n_column and self.runs.loss_column != "loss" else self.metric.unit

    @property
    def target(self) -> np.ndarray:
        """What the model is compared with, (rows,)."""
        return to_link(self.model.link, self.observed)

    @property
    def last_delta(self) -> float:
        """The delta of the objective as a Huber sum: next to nothing for lad, infinite for least squares."""
        return {"huber": self.delta, "lad": 1e-12}.get(self.objective, np.inf)

    @property
    def clusters(self) -> int:
        return len(self) if self.group is None else int(self.group.max()) + 1

    def residuals(self, z) -> np.ndarray:
        """Of the law at z on the metric's link, (rows,), times the root of the weight: all of one scale."""
        value = self.law.linked(z, self.inputs, self.metric.link)[0]
        return (value - self.metric.to_link(self.observed)) * np.sqrt(self.weights)

    def noise(self, z) -> dict[str, float]:
        """Scale of the residuals of a run of weight 1 on the link, and its degrees of freedom (`noise_of`)."""
        return noise_of(self.residuals(z)[self.weights > 0], len(self.model.free))

    def weights_of(self, below, above):
        """(rows,) weights where the rows `below` are fitted to predict those `above`: a target moves with them."""
        if not self.weighting.get("kappa"):
            return below * self.weights
        aim = 10 ** np.log10(self.effort[above]).mean()
        own = target_weights(self.effort, self.weighting["target"], self.weighting["kappa"])
        return below * (self.weights / own) * target_weights(self.effort, aim, self.weighting["kappa"])

    def sample(self, seed: int = 0) -> Problem:
        """The problem of MANY of its rows, drawn by the seed; itself where it has no more."""
        if len(self) <= MANY:
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), MANY, replace=False)))

    def take(self, rows) -> Problem:
        """The problem of some of its rows (indices), at the same centre."""
        inputs = [v[rows] for v in self.inputs]
        return replace(
            self,
            runs=self.runs.fitted.take(rows),
            inputs=inputs,
            observed=self.observed[rows],
            effort=self.effort[rows],
            weights=self.weights[rows],
            model=self.model.at(inputs),
            group=None if self.group is None else np.unique(self.group[rows], return_inverse=True)[1],
        )


def pose(
    runs: Runs,
    law: Law | str,
    delta: float | None = None,
    weights=None,
    objective: str = "huber",
    fixed: Mapping[str, float] | None = None,
    tied: Sequence[tuple[str, str]] = (),
    cluster: str | None = None,
    target: float | None = None,
    kappa: float = 0.0,
) -> Problem:
    """The problem of fitting `law` to the runs that are not held out.

    objective: "huber" (sum, at delta), "lad" (mean absolute) or "lsq" (mean square), all on the metric's link (log
    loss), or "lsq_raw" (mean square of the metric itself). delta None: see `choose_delta`. weights: one per run,
    held-out runs included; or target and kappa, see `target_weights`. fixed: {parameter: value}; tied: pairs of
    parameters that share one value. cluster: a column whose runs share noise; None takes `trunk` where the table has
    it, "none" lets every run err by itself. Raises InputError where the runs cannot identify the law.
    """
    law = law_named(law) if isinstance(law, str) else law
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    used = runs.fitted
    fixed = {k: float(v) for k, v in (fixed or {}).items()}
    tied = tuple((a, b) for a, b in tied)
    delta, reason = choose_delta(used, law, delta)
    inputs, centre = centred(used, law)
    law.metric.check(used.loss, runs.loss_column)
    link = "identity" if objective == "lsq_raw" else law.metric.link
    parts = ()
    if fixed or tied:
        from analysis.laws.symbols import constraints

        parts = constraints(law, {k: centre[k] for k in law.centred}, fixed, tied)
    model = Model(law, inputs, link, *parts)
    check_identifiable(used, law, len(model.free))
    own, weighting = _weights(runs, law, weights, target, kappa)
    spread = law.metric.spread(used.loss)
    cluster, group = _clusters(used, cluster)
    return Problem(
        runs=runs,
        law=law,
        objective=objective,
        delta=float(delta),
        delta_reason=reason,
        fixed=fixed,
        tied=tied,
        centre=centre,
        inputs=inputs,
        observed=used.loss,
        effort=used.effort(law),
        weights=own / spread**2,
        model=model,
        weighting=weighting,
        cluster=cluster,
        group=group,
    )


def target_weights(effort, target: float, kappa: float):
    """1 / (1 + (kappa x^2)^2), x = decades of `effort` (FLOPs, (runs,)) below `target`."""
    below = np.maximum(np.log10(target) - np.log10(effort), 0.0)
    return 1.0 / (1.0 + (kappa * below**2) ** 2)


def _weights(runs: Runs, law: Law, weights, target, kappa):
    """((rows,) weights of the runs fitted, how they came about)."""
    keep = ~runs.holdout
    if target is not None:
        return target_weights(runs.fitted.effort(law), target, kappa), {"target": float(target), "kappa": float(kappa)}
    if weights is None:
        return np.ones(int(keep.sum())), {}
    w = np.asarray(weights, float)
    if w.shape != (len(runs),) or not (np.isfinite(w).all() and (w >= 0).all() and w[keep].any()):
        raise InputError("weights: one finite weight of at least 0 is needed per run, and not all may be 0")
    return w[keep], {"weights": w.tolist()}


def _clusters(used: Runs, cluster: str | None):
    """(column, (rows,) number of each run's cluster), or ("none", None) where no two runs share one."""
    columns = used.frame.columns
    if cluster == "none" or (cluster is None and "trunk" not in columns):
        return "none", None
    named, cluster = cluster is not None, cluster or "trunk"
    if cluster not in columns:
        raise InputError(f"no column {cluster!r} to cluster by{nearest_or_all(cluster, columns)}")
    names = used.frame[cluster]
    # A run without a trunk shares its noise with none.
    alone = names.isna() | names.astype(str).str.strip().eq("")
    names = names.astype(str).where(~alone, [f"\0{i}" for i in range(len(names))])
    values, group = np.unique(names.to_numpy(str), return_inverse=True)
    # From fewer than three trunks nothing can be learnt of what they share.
    shared = len(values) < len(names) and (named or len(values) >= 3)
    return (cluster, group) if shared else ("none", None)


def choose_delta(used: Runs, law: Law, delta: float | None = None) -> tuple[float, str]:
    """(delta, why): the one given, else 1.345 times the noise of repeated runs (Huber's 95 % efficiency), else 1e-3."""
    if delta is not None:
        if not 0 < delta < np.inf:
            raise InputError(f"delta = {delta}: must be positive and finite")
        return float(delta), "given"
    repeats = repeat_noise(used, law)
    if repeats is None:
        return DELTA, "the default: too few runs are repeated to measure their noise"
    return 1.345 * repeats[0], f"1.345 times the noise of {repeats[1]} repeated runs, {repeats[0]:.3g}"


def repeat_noise(used: Runs, law: Law) -> tuple[float, int] | None:
    """(standard deviation on the link among runs with the same inputs, how many such runs), or None below 4 of them."""
    groups = pd.DataFrame({name: used.input(name) for name in law.inputs}).round(6)
    if groups.duplicated(keep=False).sum() < 4:
        return None
    value = law.metric.to_link(used.loss)
    residual = pd.Series(value if law.metric.noise == "constant" else value / law.metric.spread(used.loss))
    by = residual.groupby([groups[c] for c in groups.columns])
    count, squares = by.transform("count"), (residual - by.transform("mean")) ** 2
    many = count > 1
    dof = many.sum() - by.ngroups + (count == 1).sum()
    if many.sum() < 4 or dof < 3 or not squares.sum() > 0:
        return None
    return float(np.sqrt(squares.sum() / dof)), int(many.sum())


def check_identifiable(used: Runs, law: Law, free: int | None = None) -> None:
    """Raises InputError where the runs are too few for so many free parameters, or all at one value of an input."""
    free = law.size if free is None else free
    if len(used) <= free:
        simpler = "" if free <= 5 or law.inputs != ("N", "D") else ", or choose --law chinchilla (5 parameters)"
        raise InputError(
            f"{len(used)} runs to fit, but law {law.name!r} has {free} parameters: at least {free + 1} are needed"
            + simpler
        )
    for name in law.inputs:
        values = used.input(name)
        if np.ptp(np.log(values)) < 1e-6:
            raise InputError(
                f"column {used.column_of(name)!r} ({name}): all {len(used)} fitted runs have the same value "
                f"{values[0]:.6g}; add runs at another {name}, or hold fewer out"
            )


def centred(used: Runs, law: Law):
    """The log of each input less its centre, and the centre, 0 where the law does not centre an input."""
    logs = {name: np.log(used.input(name)) for name in law.inputs}
    means = {name: float(v.mean()) if name in law.centred else 0.0 for name, v in logs.items()}
    centre = {name: means[law.like.get(name, name)] for name in logs}
    return [v - centre[name] for name, v in logs.items()], centre


def noise_of(residual, size) -> dict[str, float]:
    """Scale of the residuals as a share of the loss, with n - p degrees of freedom.

    A robust fit passes through about p of its points, so the p smallest residuals say nothing; the rest, winsorised at
    three times their median scale, give a root mean square over n - p.
    """
    dof = max(len(residual) - size, 1)
    outer = np.sort(np.abs(residual))[-dof:]
    clip = 3.0 * 1.4826 * np.median(outer)
    return {"sigma": float(np.sqrt(np.sum(np.minimum(np.abs(residual), clip) ** 2) / dof)), "dof": float(dof)}
