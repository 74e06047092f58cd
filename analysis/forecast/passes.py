"""Coverage in k: which law of pass@k predicts a k far beyond those it was fitted on, errors shared by problems.

Values of pass@k at several k are of the same problems, so they move together: every interval here is of a bootstrap
over problems, in which the curve is measured, fitted and predicted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.estimators import pass_at_k, pass_at_k_exact
from analysis.fitting.fit import fit_problem
from analysis.fitting.problem import pose
from analysis.fitting.search import solve
from analysis.metric import LEVEL
from analysis.runs import read_runs

LAWS_OF_K = ("pass_at_k", "pass_at_k_beta", "pass_at_k_lognormal")


@dataclass(frozen=True)
class PassFit:
    """A law of pass@k fitted at small k.

    error: mean |log(predicted/measured)| over the held k. held: a row a k, with predicted, measured, and the error
    log(predicted/measured) with its interval (low, high), in which both move with the problems.
    """

    law: str
    params: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    error: float
    held: pd.DataFrame


def fit_passes(
    k,
    p=None,
    samples=None,
    correct=None,
    fit_up_to: float = 64,
    laws: Sequence[str] = LAWS_OF_K,
    cluster=None,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, PassFit]:
    """Each law fitted to the mean of pass@k over problems at the k up to `fit_up_to`, and judged at the others.

    The best by held-out k comes first. p, (problems,), where the chance of each problem is known; else `samples` and
    `correct` of each. The fit is least squares on the logit. cluster: (problems,) labels of problems, or of runs, that
    are resampled together. Raises InputError where fewer than three k are fitted, or none is held.
    """
    ks = np.unique(np.asarray(k, int))
    curves = pass_at_k_exact(p, ks) if p is not None else pass_at_k(samples, correct, ks)
    fitted = ks <= fit_up_to
    if fitted.sum() < 3 or fitted.all():
        raise InputError(
            f"k: {fitted.sum()} values up to {fit_up_to:g} and {(~fitted).sum()} above; 3 and 1 are needed"
        )
    names = np.arange(len(curves)) if cluster is None else np.asarray(cluster).astype(str)
    _, group = np.unique(names, return_inverse=True)
    sums = np.zeros((group.max() + 1, len(ks)))
    np.add.at(sums, group, curves)
    size = np.bincount(group).astype(float)
    counts = np.random.default_rng(seed).multinomial(len(size), np.full(len(size), 1 / len(size)), size=draws)
    drawn = (counts @ sums) / (counts @ size)[:, None]
    mean = curves.mean(axis=0)
    for values in (mean, drawn):
        if not ((values > 0) & (values < 1)).all():
            raise InputError("pass@k: is 0 or 1 at some k, where no law can be told from another; take other k")
    fits = [_fit(law, ks, mean, drawn, fitted) for law in laws]
    return {one.law: one for one in sorted(fits, key=lambda one: one.error)}


def _fit(law: str, ks, mean, drawn, fitted) -> PassFit:
    frame = pd.DataFrame({"k": ks[fitted], "value": mean[fitted]})
    runs = read_runs(frame, inputs={"k": "k"}, loss_column="value")
    # All k are of the same problems: one weight each, not that of so many trials.
    spread = pose(runs, law).metric.spread(runs.loss)
    problem = pose(runs, law, objective="lsq", weights=spread**2, cluster="none")
    one = fit_problem(problem)
    metric, model = problem.metric, problem.model
    start = np.repeat(one.z[None, model.free], len(drawn), axis=0)
    z = model.z(solve(model, metric.to_link(drawn[:, fitted]), start, problem.weights, "lsq", warm=True))
    predicted, again = (
        one.predict(k=ks[~fitted].astype(float)),
        metric.from_link(one.linked(z, [ks[~fitted].astype(float)])),
    )
    tail = 50 * (1 - LEVEL)
    with np.errstate(all="ignore"):
        error, errors = np.log(predicted / mean[~fitted]), np.log(again / drawn[:, ~fitted])
    low, high = np.nanpercentile(errors, [tail, 100 - tail], axis=0)
    held = pd.DataFrame(
        {"k": ks[~fitted], "predicted": predicted, "measured": mean[~fitted], "error": error, "low": low, "high": high}
    )
    params = one.params_of(z)
    ends = {name: tuple(map(float, np.nanpercentile(v, [tail, 100 - tail]))) for name, v in params.items()}
    return PassFit(law, one.params, ends, float(np.mean(np.abs(error))), held)
