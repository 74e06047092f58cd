"""How sure a fit is: bootstrap draws, parameter intervals, and prediction intervals that own up to the law's misfit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import optimize, stats

from analysis.errors import InputError, nearest_or_all
from analysis.fitting.fit import LawFit, Model, centred, solve
from analysis.forecast.backtest import Backtest, backtest, origin_of
from analysis.laws.forms import law_named
from analysis.runs import Runs

LEVEL = 0.9


def bootstrap(
    fit: LawFit,
    runs: Runs,
    n: int = 1000,
    seed: int = 0,
    cluster: str | None = None,
    validation: Backtest | None = None,
    run_weights=None,
) -> LawFit:
    """The fit with `n` bootstrap draws, 90 % intervals by parameter, and its discrepancy term.

    With at least ten runs per parameter (or 20 clusters) whole runs (clusters) are resampled. A small sweep does not
    survive that, so there the fitted losses get new noise: its scale is that of the residuals over n - p degrees of
    freedom, itself drawn anew each time; with clusters, each keeps its residuals times one random factor. cluster: a
    column whose runs share their noise, such as a trunk. run_weights: those of the fit, one per run, held-out runs
    included. Refits start at the optimum.
    """
    law, used = law_named(fit.law), runs.fitted
    if n < 2:
        raise InputError(f"n = {n}: at least 2 bootstrap draws are needed")
    inputs, observed, _ = centred(used, law)
    target = np.log(observed)
    rng = np.random.default_rng(seed)
    groups = None
    if cluster is not None:
        if cluster not in used.frame.columns:
            raise InputError(f"no column {cluster!r} to cluster by{nearest_or_all(cluster, used.frame.columns)}")
        _, groups = np.unique(used.frame[cluster].astype(str).to_numpy(), return_inverse=True)
    units = len(used) if groups is None else groups.max() + 1
    weights, targets = None, target
    if units >= (10 * law.size if groups is None else 20):
        weights = rng.multinomial(units, np.full(units, 1.0 / units), size=n).astype(float)
        weights = weights if groups is None else weights[:, groups]
    else:
        fitted = law.log_value(fit.z, inputs)[0]
        dof = fit.noise["dof"]
        factor = np.sqrt(dof / rng.chisquare(dof, size=(n, 1)))
        if groups is None:
            targets = fitted + fit.noise["sigma"] * factor * rng.standard_normal((n, len(used)))
        else:
            swing = rng.standard_normal((n, units))[:, groups]
            targets = fitted + np.sqrt(len(used) / dof) * factor * swing * (target - fitted)
    if run_weights is not None:
        weights = np.asarray(run_weights, float)[~runs.holdout] * (1.0 if weights is None else weights)
    raw = fit.objective_name == "lsq_raw"
    model = Model.held(law, inputs, fit.centre, fit.fixed, fit.tied, raw)
    start = np.repeat(fit.z[None, model.free], n, axis=0)
    aim = np.exp(targets) if raw else targets
    draws = model.z(solve(model, aim, start, weights, fit.objective_name, fit.delta, warm=True))
    natural = fit.params_of(draws)
    tail = 50.0 * (1.0 - LEVEL)
    intervals = {k: [float(q) for q in np.percentile(v, [tail, 100.0 - tail])] for k, v in natural.items()}
    validation = backtest(runs, law, delta=fit.delta) if validation is None else validation
    misfit = discrepancy(validation)
    return replace(fit, draws=draws, intervals=intervals, discrepancy=misfit | {"origin": origin_of(used.effort(law))})


def discrepancy(validation: Backtest) -> dict[str, float]:
    """The law's misfit, sd of log loss per squared decade of compute past the median run, from rolling origins.

    The error of a dearer run has variance v + (k x^2)^2, with v what noise and the cut's own uncertainty explain and x
    decades past the cut's median run (methods: misspecification as variance). k is the likeliest, each cut weighing as
    one observation because its errors move together; `dof` is the number of cuts.
    """
    if not len(validation.error):
        return {"k": 0.0, "dof": 0.0}
    count = np.bincount(validation.cut)[validation.cut]
    lift = validation.distance**4

    def cost(log_k):
        variance = validation.variance + np.exp(2.0 * log_k) * lift + 1e-16
        return np.sum((validation.error**2 / variance + np.log(variance)) / count)

    grid = np.linspace(np.log(1e-5), np.log(10.0), 120)
    values = np.array([cost(g) for g in grid])
    i = int(np.argmin(values))
    if i == 0:
        return {"k": 0.0, "dof": float(validation.cut.max() + 1)}
    bracket = (grid[i - 1], grid[min(i + 1, len(grid) - 1)])
    k = float(np.exp(optimize.minimize_scalar(cost, bounds=bracket, method="bounded").x))
    return {"k": k, "dof": float(validation.cut.max() + 1)}


def predict_interval(fit: LawFit, n=None, d=None, level: float = LEVEL, **inputs):
    """(predicted, low, high) loss at the law's inputs: the interval one run made there falls into with chance `level`.

    It joins the bootstrap draws, run-to-run noise, and past the median fitted run (C = 6ND) the discrepancy.
    """
    if not 0 < level < 1:
        raise InputError(f"level = {level}: must lie between 0 and 1")
    values = fit.inputs_of(n, d, inputs)
    scalar = all(np.ndim(v) == 0 for v in values)
    values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in values))
    law = law_named(fit.law)
    named = dict(zip(law.inputs, values, strict=True))
    predicted = np.atleast_1d(fit.predict(**named))
    noise, misfit = fit.noise["sigma"] ** 2, misfit_at(fit, **named) ** 2
    sigma = np.sqrt(noise + misfit)
    # Both scales are estimates from few runs and fewer cuts: Welch and Satterthwaite's degrees of freedom of their sum.
    cuts = max(fit.discrepancy.get("dof", 0.0), 1.0)
    dof = (noise + misfit) ** 2 / np.maximum(noise**2 / fit.noise["dof"] + misfit**2 / cuts, 1e-300)
    ranks = (np.arange(64) + 0.5) / 64
    low, high = np.empty(predicted.shape), np.empty(predicted.shape)
    for i in range(predicted.size):
        centre = np.log(fit.predict_draws(**{k: v.flat[i] for k, v in named.items()})[:, 0])
        spread = centre[:, None] + sigma.flat[i] * stats.t(max(dof.flat[i], 1.0)).ppf(ranks)
        low.flat[i], high.flat[i] = np.exp(np.quantile(spread, [(1 - level) / 2, (1 + level) / 2]))
    low, high = np.minimum(low, predicted), np.maximum(high, predicted)
    return (float(predicted[0]), float(low[0]), float(high[0])) if scalar else (predicted, low, high)


def misfit_at(fit: LawFit, **named):
    """Standard deviation of log loss that the law's own misfit adds at the inputs, by C = 6ND or the only input."""
    values = np.broadcast_arrays(*(np.asarray(v, float) for v in named.values()))
    if not fit.discrepancy:
        return np.zeros(values[0].shape)
    effort = 6.0 * named["N"] * named["D"] if {"N", "D"} <= set(named) else values[0]
    return fit.discrepancy["k"] * np.maximum(np.log10(effort) - fit.discrepancy["origin"], 0.0) ** 2
