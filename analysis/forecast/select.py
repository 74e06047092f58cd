"""Chooses the law by how well it predicts, inside the fitted part: rolling origin over compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.errors import InputError
from analysis.fitting.problem import Problem, pose
from analysis.forecast.backtest import Backtest, backtest, cuts_of
from analysis.laws.forms import JOINT, LAWS, Law
from analysis.runs import Runs

TIE = 1.10
AUTO = {name: LAWS[name] for name in JOINT}


@dataclass(frozen=True, eq=False)
class Score:
    """How a law predicts costlier runs from cheaper ones: mean absolute relative error over cuts and its parts.

    delta and delta_reason: of the objective of its fits, and why (`problem.choose_delta`).
    """

    law: str
    score: float | None
    cuts: int
    predictions: int
    note: str
    backtest: Backtest | None
    delta: float | None = None
    delta_reason: str = ""


def choose_law(
    runs: Runs, laws: Mapping[str, Law] = AUTO, delta: float | None = None, **options
) -> tuple[str, dict[str, Score]]:
    """The law with the lowest error over the cuts, the simpler where another is within 10 % of it; and every score.

    All laws are judged on the same cuts, those the largest law can be fitted to; the size of a law is what is left free
    in it. Where there are none, the laws that cannot be judged are left out one by one, the largest first. Held-out
    runs are never read. delta and options are those of `pose`; a law that lacks a parameter that is held is left out.
    """
    able: dict[str, Problem] = {}
    unable = {}
    for name, law in laws.items():
        try:
            able[name] = pose(runs, law, delta, **options).sample()
        except InputError as error:
            unable[name] = error
    if not able:
        raise min(unable.values(), key=lambda error: len(str(error)))
    first = next(iter(able.values()))
    sizes = {name: len(problem.model.free) for name, problem in able.items()}
    for size in sorted(set(sizes.values()), reverse=True):
        pairs, note = cuts_of(first, size, most=12 if len(first.law.inputs) > 1 else 6)
        if pairs:
            break
    judged = [name for name in able if pairs and sizes[name] <= size]
    scores = {}
    for name in laws:
        of_delta = (able[name].delta, able[name].delta_reason) if name in able else ()
        if name in judged:
            result = backtest(able[name], pairs)
            errors = np.abs(result.relative)
            score = robust_mean(errors, result.cut)
            scores[name] = Score(name, score, len(pairs), len(errors), note, result, *of_delta)
        else:
            reason = str(unable.get(name, "no cut leaves enough runs below it to judge this law"))
            scores[name] = Score(name, None, 0, 0, reason, None, *of_delta)
    if not judged:
        return min(able, key=sizes.get), scores
    lowest = min(scores[name].score for name in judged)
    tied = [name for name in judged if scores[name].score <= TIE * lowest + 1e-6]
    return min(tied, key=lambda name: (sizes[name], scores[name].score)), scores


def robust_mean(errors, cut) -> float:
    """Mean over cuts of the mean error at each, a cut counting for at most three times the median cut."""
    means = np.array([errors[cut == c].mean() for c in np.unique(cut)])
    return float(np.minimum(means, 3.0 * np.median(means)).mean())
