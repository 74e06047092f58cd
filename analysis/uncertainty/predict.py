"""Predictions with an interval that joins the fit's own uncertainty, run-to-run noise and the law's misfit."""

from __future__ import annotations

import numpy as np
from scipy import stats

from analysis.errors import InputError
from analysis.fitting.result import LawFit
from analysis.laws.forms import law_named
from analysis.metric import LEVEL, Prediction
from analysis.runs import Runs

# More points than this, and their intervals are computed together, from their variances.
MANY_POINTS = 1_000


def predict(fit: LawFit, n=None, d=None, level: float = LEVEL, **inputs) -> Prediction:
    """What one run made at the law's inputs should measure, and the interval it falls into with chance `level`.

    The interval joins the bootstrap draws, run-to-run noise, and past the median fitted run the law's misfit. Draws
    that give no finite value at a point are left out, and the notes say how many; without any there is no interval.
    """
    if not 0 < level < 1:
        raise InputError(f"level = {level}: must lie between 0 and 1")
    values = fit.inputs_of(n, d, inputs)
    scalar = all(np.ndim(v) == 0 for v in values)
    values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in values))
    named = dict(zip(law_named(fit.law).inputs, values, strict=True))
    value = np.atleast_1d(fit.predict(**named))
    outside = fit.outside(**{k: float(v[0]) for k, v in named.items()}) if scalar else None
    notes = [outside] if outside else []
    low = high = None
    if fit.draws is None:
        notes.append("no interval: this fit was not bootstrapped")
    else:
        low, high, lost = _intervals(fit, named, value, level)
        if lost:
            notes.append(f"{lost} of {len(fit.draws)} bootstrap draws give no finite value here: left out")
        if not np.isfinite(low).all():
            low, high = (None, None) if scalar else (low, high)
            notes.append("no interval where no bootstrap draw gives a finite value")
    if scalar:
        value, low, high = (None if v is None else float(v.flat[0]) for v in (value, low, high))
    return Prediction(value, low, high, level, fit.unit, tuple(notes))


def predict_runs(fit: LawFit, runs: Runs, level: float = LEVEL) -> Prediction:
    """The prediction of each of the runs, from their own inputs; arrays (runs,)."""
    return predict(fit, level=level, **{name: runs.input(name) for name in law_named(fit.law).inputs})


def _intervals(fit, named, value, level):
    """(low, high, the most draws that any point had to leave out)."""
    metric, shape = fit.metric, value.shape
    noise = (fit.noise["sigma"] * metric.spread(value)) ** 2
    misfit = misfit_at(fit, **named) ** 2
    sigma = np.sqrt(noise + misfit)
    # Both scales are estimates from few runs and fewer cuts: Welch and Satterthwaite's degrees of freedom of their sum.
    cuts = max(fit.discrepancy.get("dof", 0.0), 1.0)
    with np.errstate(all="ignore"):
        dof = (noise + misfit) ** 2 / np.maximum(noise**2 / fit.noise["dof"] + misfit**2 / cuts, 1e-300)
    dof = np.where(np.isfinite(dof), np.maximum(dof, 1.0), 1.0)
    ends = [(1 - level) / 2, (1 + level) / 2]
    if value.size > MANY_POINTS:
        return _by_variance(fit, named, value, sigma, dof, ends[1])
    ranks = (np.arange(64) + 0.5) / 64
    low, high, lost = np.full(shape, np.nan), np.full(shape, np.nan), 0
    for i in range(value.size):
        centre = fit.linked(fit.draws, [v.flat[i] for v in named.values()])[:, 0]
        finite = np.isfinite(centre)
        lost = max(lost, int((~finite).sum()))
        if finite.any():
            spread = centre[finite, None] + sigma.flat[i] * stats.t(dof.flat[i]).ppf(ranks)
            low.flat[i], high.flat[i] = metric.from_link(np.quantile(spread, ends))
    return np.minimum(low, value), np.maximum(high, value), lost


def _by_variance(fit, named, value, sigma, dof, end):
    """As `_intervals`, for many points: the draws' standard deviation joins the other scales as one more variance."""
    metric, shape = fit.metric, value.shape
    points, some = [v.ravel() for v in named.values()], fit.draws[:200]
    spread, lost = np.empty(value.size), 0
    for i in range(0, value.size, 5_000):
        part = slice(i, i + 5_000)
        centre = fit.linked(some, [v[part] for v in points])
        finite = np.isfinite(centre)
        lost = max(lost, int((~finite).sum(axis=0).max()))
        count = finite.sum(axis=0)
        with np.errstate(all="ignore"):
            mean = np.where(finite, centre, 0.0).sum(axis=0) / count
            spread[part] = np.sqrt(np.where(finite, (centre - mean) ** 2, 0.0).sum(axis=0) / count)
    half = stats.t.ppf(end, dof) * np.sqrt(sigma**2 + spread.reshape(shape) ** 2)
    middle = metric.to_link(value)
    return metric.from_link(middle - half), metric.from_link(middle + half), lost


def misfit_at(fit: LawFit, **named):
    """Standard deviation on the link that the law's own misfit adds at the inputs, by `Law.effort`."""
    values = dict(zip(named, np.broadcast_arrays(*(np.asarray(v, float) for v in named.values())), strict=True))
    effort = law_named(fit.law).effort(values)
    if not fit.discrepancy:
        return np.zeros(np.shape(effort))
    with np.errstate(all="ignore"):
        past = np.log10(effort) - fit.discrepancy["origin"]
    return fit.discrepancy["k"] * np.maximum(past, 0.0) ** 2
