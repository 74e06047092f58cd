"""How sure a fit is: bootstrap draws, intervals of parameters, and the size of the law's own misfit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from scipy import optimize

from analysis.errors import InputError
from analysis.fitting.problem import MANY, Problem
from analysis.fitting.result import LawFit
from analysis.fitting.search import solve
from analysis.forecast.backtest import Backtest, backtest, origin_of
from analysis.metric import LEVEL, Prediction
from analysis.runs import Runs


def bootstrap(
    fit: LawFit,
    runs: Runs | Problem,
    n: int = 1000,
    seed: int = 0,
    cluster: str | None = None,
    validation: Backtest | None = None,
) -> LawFit:
    """The fit with `n` bootstrap draws, 90 % intervals by parameter, and its discrepancy term.

    With at least ten runs per parameter (or 20 clusters) whole runs (clusters) are resampled. A small sweep does not
    survive that, so there the fitted losses get new noise: its scale is that of the residuals over n - p degrees of
    freedom, itself drawn anew each time; with clusters, part of it is common to each (`_shared_noise`). cluster: a
    column whose runs share their noise, other than the one of the fit. Weights, objective and what is held are those
    of the fit. Refits start at the optimum; of more than MANY runs there are none: the draws are normal, from the
    sandwich covariance of the optimum.
    """
    if n < 2:
        raise InputError(f"n = {n}: at least 2 bootstrap draws are needed")
    problem = fit.problem(runs, cluster)
    with np.errstate(all="ignore"):
        draws = (_refits if len(problem) <= MANY else _normal)(fit, problem, n, np.random.default_rng(seed))
        natural = fit.params_of(draws)
    tail = 50.0 * (1.0 - LEVEL)
    intervals = {k: [float(q) for q in np.percentile(v, [tail, 100.0 - tail])] for k, v in natural.items()}
    validation = backtest(problem) if validation is None else validation
    misfit = discrepancy(validation) | {"origin": origin_of(problem.effort)}
    return replace(fit, draws=draws, intervals=intervals, discrepancy=misfit, cluster=problem.cluster)


def derived(fit: LawFit, of: Callable[[Mapping], np.ndarray], level: float = LEVEL) -> Prediction:
    """A quantity that follows from the parameters of a fit with draws, and its interval: of(parameters), as in
    `derived(fit, lambda p: p["s"] / p["u"])`. Draws in which it is not finite are left out, and the notes say how many.
    """
    if fit.draws is None:
        raise InputError("derived: the fit has no bootstrap draws, so no interval; call bootstrap first")
    with np.errstate(all="ignore"):
        value, drawn = float(of(fit.params)), np.asarray(of(fit.params_of(fit.draws)), float)
    kept = drawn[np.isfinite(drawn)]
    lost = len(drawn) - len(kept)
    notes = (f"{lost} of {len(drawn)} bootstrap draws give no finite value: left out",) if lost else ()
    if not len(kept):
        return Prediction(value, None, None, level, "", notes)
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Prediction(value, float(low), float(high), level, "", notes)


def _refits(fit: LawFit, problem: Problem, n: int, rng) -> np.ndarray:
    """(n, size) optima of resampled runs, or of the fitted values under new noise."""
    model, law, group, own, units = problem.model, problem.law, problem.group, problem.weights, problem.clusters
    weights, target = own, problem.target
    if units >= (10 * law.size if group is None else 20):
        counts = rng.multinomial(units, np.full(units, 1.0 / units), size=n).astype(float)
        weights = own * (counts if group is None else counts[:, group])
    else:
        metric, dof, rows = problem.metric, fit.noise["dof"], len(problem)
        fitted = law.linked(fit.z, problem.inputs, metric.link)[0]
        if group is None:
            scale = fit.noise["sigma"] / np.sqrt(np.maximum(own, 1e-12))
            factor = np.sqrt(dof / rng.chisquare(dof, size=(n, 1)))
            drawn = fitted + scale * factor * rng.standard_normal((n, rows))
        else:
            drawn = fitted + _shared_noise(fit, problem, n, rng) / np.sqrt(np.maximum(own, 1e-12))
        target = metric.from_link(drawn) if model.link != metric.link else drawn
    start = np.repeat(fit.z[None, model.free], n, axis=0)
    return model.z(solve(model, target, start, weights, problem.objective, problem.delta, warm=True))


def _shared_noise(fit: LawFit, problem: Problem, n: int, rng) -> np.ndarray:
    """(n, rows) noise of weight 1, part of it shared by each cluster.

    The two variances solve the moment equations of the residuals' squares between and within clusters: the fit follows
    part of what a cluster shares, so that with few clusters the residuals alone show too little of it. Each sum of
    squares is drawn anew, over chi-square of its degrees of freedom.
    """
    rows, root = len(problem), np.sqrt(problem.weights)
    jacobian = np.nan_to_num(problem.law.linked(fit.z, problem.inputs, problem.metric.link)[1]) * root
    jacobian = jacobian if problem.model.matrix is None else problem.model.matrix @ jacobian
    basis = np.linalg.svd(jacobian.T, full_matrices=False)[0]
    rest = np.eye(rows) - basis @ basis.T
    member = (problem.group[:, None] == np.arange(problem.clusters)).astype(float)
    between = member @ (member / member.sum(axis=0)).T
    residual = np.clip(problem.residuals(fit.z), -3 * fit.noise["sigma"], 3 * fit.noise["sigma"])
    matrix, squares, dof = np.empty((2, 2)), np.empty(2), np.empty(2)
    for i, part in enumerate((between, np.eye(rows) - between)):
        seen = rest @ part @ rest
        matrix[i] = np.sum((seen @ member) * member), np.trace(seen)
        squares[i], dof[i] = residual @ part @ residual, max(np.trace(seen), 1.0)
    drawn = squares * dof / rng.chisquare(dof, size=(n, 2))
    shared, single = np.maximum(np.linalg.lstsq(matrix, drawn.T, rcond=None)[0], 0.0)
    swing = rng.standard_normal((n, problem.clusters))[:, problem.group]
    return np.sqrt(shared)[:, None] * swing + np.sqrt(single)[:, None] * rng.standard_normal((n, rows))


def _normal(fit: LawFit, problem: Problem, n: int, rng) -> np.ndarray:
    """(n, size) draws about the optimum, of covariance H^-1 V H^-1 (Huber 1967): H the objective's curvature, V the
    variance of its gradient, summed by cluster.
    """
    model, weights = problem.model, problem.weights
    u = fit.z[model.free]
    value, jacobian = model(u)
    residual, delta = value - problem.target, problem.last_delta
    # The share of runs within a small delta, from a wider window in which their density hardly changes.
    window = max(delta, 0.2 * float(np.median(np.abs(residual))))
    share = delta / window if np.isfinite(delta) else 1.0
    inside = np.abs(residual) <= window
    score = jacobian * (weights * np.clip(residual, -delta, delta))
    units = problem.clusters
    if problem.group is not None:
        score = np.stack([np.bincount(problem.group, row, units) for row in score])
    moves = (u > model.low) & (u < model.high)
    inverse = np.linalg.pinv(share * ((jacobian * (weights * inside)) @ jacobian.T)[np.ix_(moves, moves)])
    covariance = inverse @ (score[moves] @ score[moves].T) @ inverse * units / (units - 1)
    factor = np.sqrt((units - 1) / rng.chisquare(units - 1, size=(n, 1)))
    draws = np.repeat(u[None], n, axis=0)
    draws[:, moves] += factor * rng.multivariate_normal(np.zeros(moves.sum()), covariance, size=n, method="eigh")
    return model.z(np.clip(draws, model.low, model.high))


def discrepancy(validation: Backtest) -> dict[str, float]:
    """The law's misfit, sd of log loss per squared decade of compute past the median run, from rolling origins.

    The error of a costlier run has variance v + (k x^2)^2, v what noise and the cut's own uncertainty explain, x
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
