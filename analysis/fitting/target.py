"""A fit for one target: every law errs, so runs far below the target's compute count less (methods: misspecification).

The error of run i has variance sigma^2 (1 + (kappa x^2)^2), x its decades of compute below the target. kappa and the
law are chosen together by rolling origin inside the fitted runs, each cut aiming at the runs it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fitting.fit import LawFit, Model, centred, check_identifiable, fit, solve
from analysis.fitting.optimise import minimise
from analysis.forecast.backtest import cuts_of
from analysis.forecast.select import TIE, robust_mean
from analysis.laws.forms import JOINT, LAWS, Law
from analysis.runs import Runs

KAPPA = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, eq=False)
class Targeted:
    """`fit`, the chosen law's, weighted for the target; `kappa` per squared decade; `weights` (runs,); `scores` per law
    and kappa: mean absolute relative error of the rolling origins.
    """

    fit: LawFit
    kappa: float
    weights: np.ndarray
    scores: pd.DataFrame


def target_weights(effort, target: float, kappa: float):
    """1 / (1 + (kappa x^2)^2), x = decades of `effort` (FLOPs, (runs,)) below `target`."""
    below = np.maximum(np.log10(target) - np.log10(effort), 0.0)
    return 1.0 / (1.0 + (kappa * below**2) ** 2)


def fit_for_target(
    runs: Runs, target: float, laws: Mapping[str, Law] | None = None, delta: float = 1e-3, kappas=KAPPA
) -> Targeted:
    """Fits the law and the kappa that predict dearer runs best, for a prediction at `target` FLOPs (6ND).

    Held-out runs are never read. The lowest score wins, a law with fewer parameters where it is within 10 %. Raises
    InputError where no law can be judged.
    """
    if not 0 < target < np.inf:
        raise InputError(f"target = {target}: must be a number of FLOPs above 0")
    used = runs.fitted
    laws = {name: LAWS[name] for name in JOINT} if laws is None else dict(laws)
    able = {}
    for name, law in laws.items():
        try:
            check_identifiable(used, law)
            able[name] = law
        except InputError as error:
            refused = error
    if not able:
        raise refused
    largest = max(able.values(), key=lambda law: law.size)
    pairs, _ = cuts_of(used, largest.size, largest)
    if not pairs:
        raise InputError(f"{len(used)} runs: no cut in compute leaves enough runs below it to choose by; add runs")
    rows = [row for name, law in able.items() for row in _scores(used, name, law, pairs, delta, kappas)]
    scores = pd.DataFrame(rows, columns=["law", "parameters", "kappa", "score"])
    best = scores.loc[scores.groupby("law")["score"].idxmin()]
    chosen = best[best["score"] <= TIE * best["score"].min()].sort_values(["parameters", "score"]).iloc[0]
    law = laws[chosen["law"]]
    weights = target_weights(runs.effort(law), target, chosen["kappa"])
    return Targeted(fit(runs, law.name, delta, weights=weights), float(chosen["kappa"]), weights, scores)


def _scores(used: Runs, name: str, law: Law, pairs, delta, kappas):
    """(law, parameters, kappa, score) for each kappa; the fits of one kappa start from those of the last."""
    inputs, observed, _ = centred(used, law)
    model, target, effort = Model(law, inputs), np.log(observed), used.effort(law)
    starts = [law.starts(observed[below], [v[below] for v in inputs]) for below, _ in pairs]
    counts = [len(s) for s in starts]
    flat = np.repeat(np.array([below for below, _ in pairs], float), counts, axis=0)
    z, cost = minimise(model, target, np.concatenate(starts), flat, delta=0.1, iterations=40)
    ends = np.cumsum(counts)
    z = z[[e - c + int(np.argmin(cost[e - c : e])) for e, c in zip(ends, counts, strict=True)]]
    aims = [10 ** np.log10(effort[above]).mean() for _, above in pairs]
    for kappa in kappas:
        w = np.array([b * target_weights(effort, aim, kappa) for (b, _), aim in zip(pairs, aims, strict=True)])
        z = solve(model, target, z, w, delta=delta, warm=True)
        value = model(z)[0]
        errors = [np.abs(np.expm1(value[i, above] - target[above])) for i, (_, above) in enumerate(pairs)]
        cut = np.repeat(np.arange(len(pairs)), [len(e) for e in errors])
        yield name, law.size, kappa, robust_mean(np.concatenate(errors), cut)
