"""Profile likelihood: how far a parameter, or anything computed from a fit, can move before the runs object.

For each value of the quantity the objective is minimised over all else. All values go as one batch: a pseudo-run with
a large weight and a quadratic loss holds the quantity near its value, and the point found lies on the profile at the
value that it has there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from analysis.errors import InputError, nearest_or_all
from analysis.fitting.optimise import minimise
from analysis.fitting.problem import Model, Problem
from analysis.fitting.result import LawFit
from analysis.fitting.search import objective_value
from analysis.forecast.allocate import _log_optimal_n, extra_inputs
from analysis.laws.forms import law_named
from analysis.runs import Runs

MOST_RUNS = 20_000


@dataclass(frozen=True)
class Quantity:
    """A number computed from coordinates z (..., size); `log` where it is the log of what is reported."""

    name: str
    of: Callable = field(repr=False)
    log: bool = False


@dataclass(frozen=True, eq=False)
class Profile:
    """The interval of one quantity, and the profile itself: values (points,) and how far the objective rises there.

    low or high is None where the objective never rises past `threshold` within the law's bounds: an open side.
    """

    quantity: str
    estimate: float
    low: float | None
    high: float | None
    level: float
    values: np.ndarray = field(repr=False)
    rise: np.ndarray = field(repr=False)
    threshold: float = field(repr=False)

    def summary(self) -> str:
        low, high = ("open" if v is None else f"{v:.5g}" for v in (self.low, self.high))
        return f"{self.quantity} {self.estimate:.6g} [{low}, {high}] at {100 * self.level:g} %"


def exponent_quantity(fit: LawFit) -> Quantity:
    """a of N* ~ C^a, at the middle of the fitted compute."""
    flops = float(np.sqrt(np.prod(fit.fitted_range["flops"])))
    extra = extra_inputs(fit, None)

    def of(z):
        high, low = (_log_optimal_n(fit, z, flops * step, 0.0, extra) for step in (1.05, 1 / 1.05))
        return (high - low) / (2 * np.log(1.05))

    return Quantity("a", of)


def optimal_n_quantity(fit: LawFit, flops: float) -> Quantity:
    """N* at C = 6ND = flops; D* is flops / 6N*."""
    extra = extra_inputs(fit, None)
    return Quantity(f"N*({flops:.3g})", lambda z: _log_optimal_n(fit, z, flops, 0.0, extra), log=True)


def metric_quantity(fit: LawFit, n=None, d=None, **inputs) -> Quantity:
    """The mean of the metric at one point, run-to-run noise left out."""
    values, metric = fit.inputs_of(n, d, inputs), fit.metric
    if metric.link == "log":
        return Quantity(metric.name, lambda z: fit.linked(np.atleast_2d(z), values)[..., 0], log=True)
    return Quantity(metric.name, lambda z: metric.from_link(fit.linked(np.atleast_2d(z), values)[..., 0]))


def parameter(fit: LawFit, name: str) -> Quantity:
    """A parameter of the law; a scale is profiled in logs."""
    if name not in fit.params:
        raise InputError(f"law {fit.law!r} has no parameter {name!r}{nearest_or_all(name, fit.params)}")
    log = law_named(fit.law).compiled.symbols.logs[name] is not None

    def of(z):
        value = fit.params_of(np.atleast_2d(z))[name]
        return np.log(value) if log else np.asarray(value, float)

    return Quantity(name, of, log)


class _Pinned:
    """A model with one more run: the quantity itself, so that a weight on it holds the quantity at a target."""

    def __init__(self, model: Model, quantity: Quantity):
        self.model, self.quantity = model, quantity
        self.low, self.high = model.low, model.high

    def value(self, u):
        return np.asarray(self.quantity.of(self.model.z(np.atleast_2d(u))), float)

    def slope(self, u, step=1e-5):
        u = np.atleast_2d(u)
        parts = [(self.value(u + s) - self.value(u - s)) / (2 * step) for s in step * np.eye(u.shape[1])]
        return np.stack(parts, axis=-1)

    def __call__(self, u):
        value, jacobian = self.model(u)
        value = np.concatenate([value, self.value(u)[:, None]], axis=-1)
        return value, np.concatenate([jacobian, self.slope(u)[..., None]], axis=-1)


def profile(
    fit: LawFit, runs: Runs | Problem, quantity: Quantity | str, level: float = 0.9, cluster: str | None = None
) -> Profile:
    """The profile likelihood interval of a parameter (by name) or of a `Quantity`.

    The objective may rise by t^2 / 2 times E[psi^2] / E[psi'] (the likelihood-ratio test of an M-estimate; psi is that
    of the objective, its expectations are those under normal noise of the fit's scale). With `cluster`, a column whose
    runs share their noise (by default the fit's own), that is multiplied by the design effect in the quantity's
    direction. Of a weighted fit the objective is the weighted one, and a run's noise is that of weight 1 over the root
    of its weight.
    """
    problem = fit.problem(runs, cluster)
    if len(problem) > MOST_RUNS:
        raise InputError(
            f"{len(problem):,} runs: above {MOST_RUNS:,} a profile takes long and says no more than the fit's own "
            "intervals, which are from its sandwich covariance; leave --profile out"
        )
    with np.errstate(all="ignore"):
        return _profile(fit, problem, quantity, level)


def _profile(fit: LawFit, problem: Problem, quantity: Quantity | str, level: float) -> Profile:
    quantity = parameter(fit, quantity) if isinstance(quantity, str) else quantity
    model, target, own = problem.model, problem.target, problem.weights
    # Least absolute deviation is Huber far below the noise.
    delta = {"huber": fit.delta, "lad": 1e-2 * fit.noise["sigma"]}.get(fit.objective_name, 1e9)
    pinned = _Pinned(model, quantity)
    u = minimise(model, target, fit.z[None, model.free], own, delta)[0]
    least = objective_value(model, u, target, own, "huber", delta)[0]
    centre, slope = float(pinned.value(u)[0]), pinned.slope(u)[0]

    sigma = max(fit.noise["sigma"] * _scale(problem), 1e-300)
    jacobian = model(u)[1][0]
    inverse = np.linalg.pinv((jacobian * own) @ jacobian.T, rcond=1e-13, hermitian=True)
    lever = max(slope @ inverse @ slope, 1e-30)
    threshold, effect = _threshold(fit, problem, u, slope, delta, sigma, level)
    error = sigma * float(np.sqrt(lever * effect))
    steps = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0]) * error
    offsets = np.concatenate([-steps[::-1], steps])
    start = np.clip(u + offsets[:, None] * (inverse @ slope / lever), model.low, model.high)
    aims = np.concatenate([np.broadcast_to(target, (len(offsets), len(target))), centre + offsets[:, None]], axis=1)
    deltas = np.append(np.full(len(target), delta), np.inf)
    weights = np.append(own, 1e4 * (2 * stats.norm.cdf(delta / sigma) - 1 + 1e-3) / lever)
    for wide in (max(delta, 5 * sigma), delta):
        deltas[:-1] = wide
        start, _ = minimise(pinned, aims, start, weights, deltas, iterations=200)
    values = np.append(pinned.value(start), centre)
    rise = np.append(objective_value(model, start, target, own, "huber", delta) - least, 0.0)
    order = np.argsort(values, kind="stable")
    values, rise = values[order], np.maximum(rise[order], 0.0)
    low, high = (_crossing(values, rise, centre, threshold, side) for side in (-1, 1))
    if quantity.log:
        values, centre = np.exp(values), float(np.exp(centre))
        low, high = (None if v is None else float(np.exp(v)) for v in (low, high))
    return Profile(quantity.name, centre, low, high, level, values, rise, float(threshold))


def profile_all(
    fit: LawFit, runs: Runs | Problem, level: float = 0.9, cluster: str | None = None
) -> dict[str, Profile]:
    """The profile of every parameter that is not fixed, and of the exponent a where the law allocates."""
    problem = fit.problem(runs, cluster)
    profiles = {name: profile(fit, problem, name, level) for name in fit.params if name not in fit.fixed}
    if law_named(fit.law).allocates:
        profiles["a"] = profile(fit, problem, exponent_quantity(fit), level)
    return profiles


def _scale(problem: Problem) -> float:
    """A typical step of what is fitted for one on the metric's link, where the objective is of the metric itself."""
    if problem.model.link == problem.metric.link:
        return 1.0
    value = float(np.median(problem.observed))
    return value if problem.metric.link == "log" else value * (1 - value)


def _threshold(fit: LawFit, problem: Problem, u, slope, delta: float, sigma: float, level: float):
    """(how far the objective may rise along the slope, the design effect of the clusters in it).

    The objective's curvature is H = J W P J', the variance of its gradient V = J W^2 E[psi^2] J', each row's noise that
    of weight 1 over the root of its weight; along one direction the rise is t^2 / 2 times s'H^-1 V H^-1 s / s'H^-1 s.
    """
    own = np.maximum(problem.weights, 1e-12)
    sigma = sigma / np.sqrt(own)
    value, jacobian = (part[0] for part in problem.model(u))
    inside = 2 * stats.norm.cdf(delta / sigma) - 1
    curvature = (jacobian * (own * inside)) @ jacobian.T
    inverse = np.linalg.pinv(curvature, rcond=1e-13, hermitian=True)
    pulls = slope @ inverse @ jacobian * own
    variance = float(np.sum(pulls**2 * sigma**2 * _psi_squared(delta / sigma)))
    effect, dof = 1.0, fit.noise["dof"]
    if problem.group is not None:
        effect = _design_effect(problem, pulls * (value - problem.target))
        dof = min(dof, problem.clusters - 1)
    ratio = variance / max(slope @ inverse @ slope, 1e-30)
    return 0.5 * stats.t.ppf(0.5 + level / 2, dof) ** 2 * ratio * effect, effect


def _psi_squared(k):
    """E[psi^2] of Huber's psi at threshold k under unit normal noise."""
    near = np.minimum(k, 30.0)
    part = 2 * (stats.norm.cdf(near) - 0.5 - near * stats.norm.pdf(near)) + 2 * near**2 * stats.norm.sf(near)
    return np.where(k < 30, part, 1.0)


def _design_effect(problem: Problem, score) -> float:
    """Variance of the summed scores by cluster over that by run, at least 1."""
    count = problem.clusters
    if count < 3:
        raise InputError(
            f"column {problem.cluster!r} has {count} clusters: at least 3 are needed; --cluster none takes every run's "
            "noise as its own"
        )
    sums = np.bincount(problem.group, score)
    return max(1.0, float(np.sum(sums**2) / np.sum(score**2)) * count / (count - 1))


def _crossing(values, rise, centre, threshold, side):
    """Where the profile first passes the threshold on one side, between points by the root of the rise; or None."""
    keep = values >= centre if side > 0 else values <= centre
    x, y = values[keep], np.sqrt(rise[keep])
    if side < 0:
        x, y = x[::-1], y[::-1]
    limit = np.sqrt(threshold)
    past = np.flatnonzero(y > limit)
    if not len(past):
        return None
    i = past[0]
    share = (limit - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))
