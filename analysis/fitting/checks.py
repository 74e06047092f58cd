"""What a reader must know before believing a fit: units that look wrong, copies, outliers, parameters left open."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.fitting.problem import Problem
from analysis.fitting.result import LawFit
from analysis.laws.forms import Law, law_named
from analysis.runs import Runs

OUTLIER = 5.0


def duplicates(runs: Runs) -> str | None:
    """A line about rows that repeat both the inputs and the loss of another, or None. They count twice in a fit."""
    table = pd.DataFrame({"n": runs.n, "d": runs.d, "loss": runs.loss})
    for name, column in runs.inputs.items():
        table[name] = runs.frame[column].to_numpy()
    copies = np.flatnonzero(table.duplicated().to_numpy())
    if not len(copies):
        return None
    rows = ", ".join(map(str, copies[:5])) + (", ..." if len(copies) > 5 else "")
    return f"{len(copies)} of {len(runs)} rows are copies of another run (rows {rows}): each counts twice"


def residuals(fit: LawFit, runs: Runs | Problem) -> pd.Series:
    """Measured - fitted on the metric's link over the noise of the run's weight, by row of the table; runs fitted."""
    problem = fit.problem(runs)
    residual = -problem.residuals(fit.z)
    return pd.Series(residual / max(fit.noise["sigma"], 1e-12), index=np.flatnonzero(~problem.runs.holdout))


def outliers(fit: LawFit, runs: Runs | Problem) -> pd.Series:
    """The residuals beyond 5 robust scales, the largest first, by row of the table."""
    sigmas = residuals(fit, runs)
    return sigmas[sigmas.abs() > OUTLIER].sort_values(key=np.abs, ascending=False)


def outlier_note(fit: LawFit, runs: Runs | Problem) -> str | None:
    """A line that names the outliers, or None. Nothing is dropped."""
    beyond = outliers(fit, runs)
    if not len(beyond):
        return None
    rows = ", ".join(f"row {i} ({v:+.0f} sigma)" for i, v in beyond.head(5).items()) + (
        ", ..." if len(beyond) > 5 else ""
    )
    return (
        f"{len(beyond)} outliers beyond {OUTLIER:g} sigma, kept in the fit: {rows}; leave them out with --drop-outliers"
    )


def unidentified(fit: LawFit, runs: Runs | Problem) -> list[str]:
    """A line for the parameter that the runs pin down least, where its standard error says that they do not.

    A scale is left open beyond a factor e^1.5, another parameter beyond half its value. Where the law is of N and D the
    line names the run, at most 4 times as expensive as the most expensive one, that would cut that variance most
    (V-optimal design).
    """
    with np.errstate(all="ignore"):
        return _unidentified(fit, fit.problem(runs), law_named(fit.law))


def _unidentified(fit: LawFit, problem: Problem, law: Law) -> list[str]:
    jacobian = law.linked(fit.z, problem.inputs, law.metric.link)[1] * np.sqrt(problem.weights)
    jacobian = np.nan_to_num(jacobian, nan=0.0, posinf=0.0, neginf=0.0)
    information = jacobian @ jacobian.T
    ridge = 1e-12 * np.trace(information) * np.eye(len(information))
    covariance = fit.noise["sigma"] ** 2 * np.linalg.inv(information + ridge)
    names = list(fit.params)
    slopes = _slopes(fit, law)
    errors = np.sqrt(np.maximum(np.einsum("pi,ij,pj->p", slopes, covariance, slopes), 0.0))
    held = set(fit.fixed) | {name for pair in fit.tied for name in pair}
    logs = [law.compiled.symbols.logs[name] is not None for name in names]
    limits = [1.5 if log else 0.5 * abs(fit.params[name]) for log, name in zip(logs, names, strict=True)]
    open_ = [i for i, name in enumerate(names) if name not in held and errors[i] > max(limits[i], 1e-12)]
    if not open_:
        return []
    worst = max(open_, key=lambda i: errors[i] / max(limits[i], 1e-12))
    shown = ", ".join(
        f"{names[i]} (x/ {np.exp(min(errors[i], 50)):.2g})" if logs[i] else f"{names[i]} (+- {errors[i]:.2g})"
        for i in open_
    )
    line = f"these runs do not pin down {shown}"
    if law.inputs == ("N", "D"):
        line += _remedy(fit, problem.runs.fitted, law, covariance, slopes[worst], errors[worst], names[worst])
    return [line]


def _slopes(fit, law):
    """Derivatives of the parameters (logs of scales) by the coordinates, (parameters, size), by central differences."""
    centre = {name: fit.centre[name] for name in law.centred}
    logs = [law.compiled.symbols.logs[name] is not None for name in fit.params]
    step = 1e-6 * np.eye(law.size)

    def values(z):
        params = law.params(z, centre)
        return np.array([np.log(params[k]) if log else params[k] for k, log in zip(fit.params, logs, strict=True)])

    return np.stack([(values(fit.z + s) - values(fit.z - s)) / 2e-6 for s in step], axis=-1)


def _remedy(fit, used, law, covariance, slope, error, name) -> str:
    factors = np.geomspace(1 / 16, 16, 9)
    n = np.unique(np.concatenate([used.n.min() * factors, used.n.max() * factors]))
    d = np.unique(np.concatenate([used.d.min() * factors, used.d.max() * factors]))
    n, d = (v.ravel() for v in np.meshgrid(n, d))
    cheap = 6 * n * d <= 4 * (6 * used.n * used.d).max()
    n, d = n[cheap], d[cheap]
    at = law.log_value(fit.z, [np.log(n) - fit.centre["N"], np.log(d) - fit.centre["D"]])[1]
    moved = covariance @ at
    gain = (slope @ moved) ** 2 / (fit.noise["sigma"] ** 2 + np.sum(at * moved, axis=0))
    best = int(np.argmax(gain))
    left = np.sqrt(max(error**2 - gain[best], 0.0))
    return (
        f"; a run at N = {n[best]:.3g}, D = {d[best]:.3g} would cut that of {name} most, to {100 * left / error:.0f} %"
    )
