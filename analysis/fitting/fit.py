"""Fits a law to runs: the global optimum of a robust objective, with a certificate.

The objective is the sum of Huber on log loss (or another metric's link). With N and D centred, delta is lowered step by
step from a small grid of starts (methods: centred continuation); every derivative is analytic, everything float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.fitting.optimise import gradient_and_curvature, minimise, refine
from analysis.fitting.problem import MANY, Problem, pose
from analysis.fitting.result import RANGES, LawFit
from analysis.fitting.search import objective_value, other_basin, search, solve
from analysis.runs import Runs


def fit(
    runs: Runs,
    law: str,
    delta: float | None = None,
    weights=None,
    objective: str = "huber",
    fixed: Mapping[str, float] | None = None,
    tied: Sequence[tuple[str, str]] = (),
    cluster: str | None = None,
) -> LawFit:
    """Fits the law to the runs that are not held out; the options are those of `problem.pose`. Raises InputError."""
    return fit_problem(pose(runs, law, delta, weights, objective, fixed, tied, cluster))


def fit_problem(problem: Problem) -> LawFit:
    """The optimum of a problem, as a fit without intervals. Raises InputError where no start can be evaluated."""
    with np.errstate(all="ignore"):
        return _fit(problem)


def _fit(problem: Problem) -> LawFit:
    law, model, target, w = problem.law, problem.model, problem.target, problem.weights
    objective, delta = problem.objective, problem.delta
    few = problem.sample()
    starts = law.starts(few.observed, few.inputs)[:, model.free]
    minima, cost, agree, tried = search(few.model, few.target, starts, few.weights, objective, delta)
    rival = other_basin(few.model, few.target, minima, few.weights, objective, delta)
    best, lowest = minima[0], cost[0]
    if few is not problem:
        if objective == "lad":
            best = solve(model, target, minima[:1], w, objective, delta, warm=True)[0]
        else:
            best = minimise(model, target, minima[:1], w, problem.last_delta)[0][0]
        lowest = objective_value(model, best, target, w, objective, delta)
    u = refine(model, best, target, w, problem.last_delta)
    least = float(min(lowest, objective_value(model, u, target, w, objective, delta)))
    gradient, pull, condition = gradient_and_curvature(model, u, target, w, problem.last_delta)
    gradient_norm = float(np.abs(gradient).max())
    z = model.z(u)
    return LawFit(
        law=law.name,
        params=_params(problem, z),
        objective=least,
        n_runs=len(problem),
        delta=delta,
        delta_reason=problem.delta_reason,
        n_column=problem.runs.n_column,
        diagnostics={
            "gradient_norm": gradient_norm,
            "starts": tried,
            "starts_agree": agree,
            "condition_number": condition,
            "converged": bool(gradient_norm <= (1e-3 if objective == "lad" else 1e-6) * pull + 1e-14),
            "second_best": None if rival is None else float(cost[rival] / max(cost[0], 1e-300) - 1.0),
            "second_best_params": None if rival is None else _params(problem, model.z(minima[rival])),
            "minima": len(minima),
            "at_bound": _at_bound(problem, u, least),
        },
        objective_name=objective,
        z=z,
        centre=dict(problem.centre),
        fitted_range=_ranges(problem),
        noise=problem.noise(z),
        notes=(*problem.runs.notes, *_sampled(problem), *_doubts(problem, condition)),
        fixed=dict(problem.fixed),
        tied=problem.tied,
        columns={name: problem.runs.column_of(name) for name in law.inputs},
        unit=problem.unit,
        weighting=dict(problem.weighting),
        cluster=problem.cluster,
    )


def _sampled(problem: Problem) -> list[str]:
    if len(problem) <= MANY:
        return []
    return [
        f"{len(problem):,} runs: the optimum was searched, and laws are judged, on {MANY:,} of them; it was then "
        "refined on all, and intervals of parameters are from its sandwich covariance, not from refits"
    ]


def _params(problem: Problem, z) -> dict[str, float]:
    law = problem.law
    return {k: float(v) for k, v in law.params(z, {k: problem.centre[k] for k in law.centred}).items()}


def _ranges(problem: Problem) -> dict[str, list[float]]:
    used, law = problem.runs.fitted, problem.law
    ranges = {RANGES.get(k, k): used.input(k) for k in law.inputs}
    if {"N", "D"} <= set(law.inputs):
        ranges["flops"] = 6 * used.n * used.d
    return {k: [float(v.min()), float(v.max())] for k, v in ranges.items()}


def _at_bound(problem: Problem, u, least: float) -> dict[str, float]:
    """{coordinate at its bound: by what share the objective would fall were its bounds moved out by their own size}."""
    model, law = problem.model, problem.law
    costs = {}
    for k in np.flatnonzero((u <= model.low) | (u >= model.high)):
        wider = model.at(model.inputs)
        wider.low, wider.high = model.low.copy(), model.high.copy()
        side, out = (wider.low, -1.0) if u[k] <= model.low[k] else (wider.high, 1.0)
        side[k] += out * max(abs(side[k]), 1.0)
        freed, _ = minimise(wider, problem.target, u[None], problem.weights, problem.last_delta)
        moved = objective_value(wider, freed[0], problem.target, problem.weights, problem.objective, problem.delta)
        costs[law.coordinates[model.free[k]].name] = float(max(1.0 - moved / max(least, 1e-300), 0.0))
    return costs


def _doubts(problem: Problem, condition: float) -> list[str]:
    values = {name: len(np.unique(v)) for name, v in zip(problem.law.inputs, problem.inputs, strict=True)}
    few = [f"{name} takes {count} values" for name, count in values.items() if count < 3]
    if few:
        return [f"{' and '.join(few)}: at least 3 are needed to tell its exponent from the floor E"]
    if condition > 1e12:
        return ["these runs do not pin down every parameter (see the condition number): add runs at other N and D"]
    return []
