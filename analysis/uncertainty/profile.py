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
from analysis.fitting.fit import LawFit, Model, centred, objective_value
from analysis.fitting.optimise import minimise
from analysis.forecast.allocate import _log_optimal_n, extra_inputs
from analysis.laws.forms import law_named
from analysis.runs import Runs


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


def exponent(fit: LawFit) -> Quantity:
    """a of N* ~ C^a, at the middle of the fitted compute."""
    flops = float(np.sqrt(np.prod(fit.fitted_range["flops"])))
    extra = extra_inputs(fit, None)

    def of(z):
        high, low = (_log_optimal_n(fit, z, flops * step, 0.0, extra) for step in (1.05, 1 / 1.05))
        return (high - low) / (2 * np.log(1.05))

    return Quantity("a", of)


def optimal_n(fit: LawFit, flops: float) -> Quantity:
    """N* at C = 6ND = flops."""
    extra = extra_inputs(fit, None)
    return Quantity(f"N*({flops:.3g})", lambda z: _log_optimal_n(fit, z, flops, 0.0, extra), log=True)


def optimal_d(fit: LawFit, flops: float) -> Quantity:
    """D* at C = 6ND = flops."""
    extra = extra_inputs(fit, None)
    return Quantity(
        f"D*({flops:.3g})", lambda z: np.log(flops / 6) - _log_optimal_n(fit, z, flops, 0.0, extra), log=True
    )


def loss_at(fit: LawFit, n=None, d=None, **inputs) -> Quantity:
    """The mean loss at one point, run-to-run noise left out."""
    values = fit.inputs_of(n, d, inputs)
    return Quantity("loss", lambda z: fit._log_loss(np.atleast_2d(z), values)[..., 0], log=True)


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
    fit: LawFit, runs: Runs, quantity: Quantity | str, level: float = 0.9, cluster: str | None = None
) -> Profile:
    """The profile likelihood interval of a parameter (by name) or of a `Quantity`.

    The objective may rise by t^2 / 2 times E[psi^2] / E[psi'] (the likelihood-ratio test of an M-estimate; psi is that
    of the objective, its expectations are those under normal noise of the fit's scale). With `cluster`, a column whose
    runs share their noise, that is multiplied by the design effect in the quantity's direction. For unweighted fits.
    """
    quantity = parameter(fit, quantity) if isinstance(quantity, str) else quantity
    used, law = runs.fitted, law_named(fit.law)
    inputs, observed, _ = centred(used, law)
    raw = fit.objective_name == "lsq_raw"
    model = Model.held(law, inputs, fit.centre, fit.fixed, fit.tied, raw)
    target = observed if raw else np.log(observed)
    # Least absolute deviation is Huber far below the noise.
    delta = {"huber": fit.delta, "lad": 1e-2 * fit.noise["sigma"]}.get(fit.objective_name, 1e9)
    pinned, ones = _Pinned(model, quantity), np.ones(len(target))
    u = minimise(model, target, fit.z[None, model.free], ones, delta)[0]
    least = objective_value(model, u, target, ones, "huber", delta)[0]
    centre, slope = float(pinned.value(u)[0]), pinned.slope(u)[0]

    value, jacobian = (part[0] for part in model(u))
    scale_raw = np.median(observed) if raw else 1.0
    sigma = fit.noise["sigma"] * scale_raw
    inverse = np.linalg.pinv(jacobian @ jacobian.T, rcond=1e-13, hermitian=True)
    error = sigma * float(np.sqrt(max(slope @ inverse @ slope, 1e-30)))
    effect, dof = 1.0, fit.noise["dof"]
    if cluster is not None:
        effect, clusters = _design_effect(used, cluster, slope @ inverse @ jacobian * (value - target))
        dof = min(dof, clusters - 1)
    ratio = _psi_squared(delta / sigma) * sigma**2 / (2 * stats.norm.cdf(delta / sigma) - 1)
    threshold = 0.5 * stats.t.ppf(0.5 + level / 2, dof) ** 2 * ratio * effect

    direction = inverse @ slope / max(slope @ inverse @ slope, 1e-30)
    steps = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0]) * error * np.sqrt(effect)
    offsets = np.concatenate([-steps[::-1], steps])
    start = np.clip(u + offsets[:, None] * direction, model.low, model.high)
    weight = 1e4 * len(target) * (2 * stats.norm.cdf(delta / sigma) - 1 + 1e-3) / max(slope @ inverse @ slope, 1e-30)
    weights = np.append(ones, weight / len(target))
    aims = np.concatenate([np.broadcast_to(target, (len(offsets), len(target))), centre + offsets[:, None]], axis=1)
    deltas = np.append(np.full(len(target), delta), np.inf)
    for wide in (max(delta, 5 * sigma), delta):
        deltas[:-1] = wide
        start, _ = minimise(pinned, aims, start, weights, deltas, iterations=200)
    values = np.append(pinned.value(start), centre)
    rise = np.append(objective_value(model, start, target, ones, "huber", delta) - least, 0.0)
    order = np.argsort(values, kind="stable")
    values, rise = values[order], np.maximum(rise[order], 0.0)
    low, high = (_crossing(values, rise, centre, threshold, side) for side in (-1, 1))
    if quantity.log:
        values, centre = np.exp(values), float(np.exp(centre))
        low, high = (None if v is None else float(np.exp(v)) for v in (low, high))
    return Profile(quantity.name, centre, low, high, level, values, rise, float(threshold))


def profile_all(fit: LawFit, runs: Runs, level: float = 0.9, cluster: str | None = None) -> dict[str, Profile]:
    """The profile of every parameter that is not fixed, and of the exponent a where the law is of N and D."""
    names = [name for name in fit.params if name not in fit.fixed]
    found = {name: profile(fit, runs, name, level, cluster) for name in names}
    if {"N", "D"} <= set(law_named(fit.law).inputs):
        found["a"] = profile(fit, runs, exponent(fit), level, cluster)
    return found


def _psi_squared(k: float) -> float:
    """E[psi^2] of Huber's psi at threshold k under unit normal noise."""
    return (
        float(2 * (stats.norm.cdf(k) - 0.5 - k * stats.norm.pdf(k)) + 2 * k * k * stats.norm.sf(k)) if k < 30 else 1.0
    )


def _design_effect(used: Runs, cluster: str, score) -> tuple[float, int]:
    """(variance of the summed scores by cluster over that by run, clusters), at least 1."""
    if cluster not in used.frame.columns:
        raise InputError(f"no column {cluster!r} to cluster by{nearest_or_all(cluster, used.frame.columns)}")
    _, group = np.unique(used.frame[cluster].astype(str).to_numpy(), return_inverse=True)
    count = int(group.max()) + 1
    if count < 3:
        raise InputError(f"column {cluster!r} has {count} clusters: at least 3 are needed")
    sums = np.bincount(group, score)
    return max(1.0, float(np.sum(sums**2) / np.sum(score**2)) * count / (count - 1)), count


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
