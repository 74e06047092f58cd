"""A fit for one target: every law errs, so runs far below the target's compute count less (methods: misspecification).

The error of run i has variance sigma^2 (1 + (kappa x^2)^2), x its decades of compute below the target. kappa and the
law are chosen together by rolling origin inside the fitted runs, each cut aiming at the runs it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fitting.fit import fit_problem
from analysis.fitting.problem import Problem, pose, target_weights
from analysis.fitting.result import LawFit
from analysis.fitting.search import solve
from analysis.forecast.backtest import cuts_of, first_fits
from analysis.forecast.select import TIE, robust_mean
from analysis.laws.forms import JOINT, LAWS, Law
from analysis.runs import Runs

KAPPA = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, eq=False)
class Targeted:
    """`fit`, the chosen law's, weighted for the target, which it keeps; `kappa` per squared decade; `scores` per law
    and kappa: mean absolute relative error of the rolling origins.
    """

    fit: LawFit
    kappa: float
    scores: pd.DataFrame


def fit_for_target(
    runs: Runs, target: float, laws: Mapping[str, Law] | None = None, kappas=KAPPA, **options
) -> Targeted:
    """Fits the law and the kappa that predict costlier runs best, for a prediction at `target` FLOPs (6ND).

    options (delta, objective, fixed, tied, cluster) are those of `pose`; a law that lacks a parameter that is held is
    left out. Held-out runs are never read. The lowest score wins, a law with fewer parameters where it is within 10 %.
    Raises InputError where no law can be judged.
    """
    if not 0 < target < np.inf:
        raise InputError(f"target = {target}: must be a number of FLOPs above 0")
    laws = {name: LAWS[name] for name in JOINT} if laws is None else dict(laws)
    able, refused = {}, None
    for name, law in laws.items():
        try:
            able[name] = pose(runs, law, target=target, **options)
        except InputError as error:
            refused = error
    if not able:
        raise refused
    largest = max(able.values(), key=lambda problem: len(problem.model.free))
    pairs, _ = cuts_of(largest.sample())
    if not pairs:
        raise InputError(
            f"{len(runs.fitted)} runs: no cut in compute leaves enough runs below it to choose by; add runs"
        )
    rows = [row for name, problem in able.items() for row in _scores(name, problem.sample(), pairs, kappas)]
    scores = pd.DataFrame(rows, columns=["law", "parameters", "kappa", "score"])
    best = scores.loc[scores.groupby("law")["score"].idxmin()]
    chosen = best[best["score"] <= TIE * best["score"].min()].sort_values(["parameters", "score"]).iloc[0]
    kappa = float(chosen["kappa"])
    aimed = fit_problem(_aimed(able[chosen["law"]], kappa))
    return Targeted(aimed, kappa, scores)


def _aimed(problem: Problem, kappa: float) -> Problem:
    """The problem, posed for its target with kappa 0, at another kappa."""
    target = problem.weighting["target"]
    weights = problem.weights * target_weights(problem.effort, target, kappa)
    return replace(problem, weights=weights, weighting={"target": target, "kappa": kappa})


def _scores(name: str, problem: Problem, pairs, kappas):
    """(law, parameters, kappa, score) for each kappa; the fits of one kappa start from those of the last."""
    model, target, metric = problem.model, problem.target, problem.metric
    measured = problem.observed
    with np.errstate(all="ignore"):
        u = first_fits(problem, pairs)
        for kappa in kappas:
            aimed = _aimed(problem, kappa)
            weights = np.array([aimed.weights_of(below, above) for below, above in pairs])
            u = solve(model, target, u, weights, problem.objective, problem.delta, warm=True)
            value = metric.from_link(problem.law.linked(model.z(u), problem.inputs, metric.link)[0])
            errors = [np.abs(value[i, above] / measured[above] - 1) for i, (_, above) in enumerate(pairs)]
            cut = np.repeat(np.arange(len(pairs)), [len(e) for e in errors])
            yield name, len(model.free), kappa, robust_mean(np.concatenate(errors), cut)
