"""Laws side by side: how well each predicts costlier runs, by how far it is extrapolated, and information criteria."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import InputError
from analysis.fitting.fit import fit
from analysis.forecast.backtest import Backtest
from analysis.forecast.select import Score, choose_law
from analysis.laws.forms import LAWS, Law
from analysis.runs import Runs
from analysis.uncertainty.bootstrap import discrepancy

# Fewer runs per parameter than this, and a law's fit says little about it.
RUNS_PER_PARAMETER = 3
BINS = (1.0, 1.5, 2.0, 4.0, 8.0, np.inf)


def compare(runs: Runs, laws: Mapping[str, Law], delta: float | None = None) -> tuple[str, pd.DataFrame]:
    """(the law rolling origin would choose, a row per law): validation error, AICc, BIC, held-out error, delta, note.

    AICc (Hurvich and Tsai 1989: AIC corrected for few runs) and BIC are Gaussian, from least squares fits to the runs
    not held out, and stand as differences from the lowest; they judge the fit, where the validation error judges the
    prediction. Errors are relative. A note warns where parameters are many for the runs. delta: see `choose_delta`.
    """
    chosen, scores = choose_law(runs, laws, delta)
    rows = [_row(runs, name, law, scores[name], delta) for name, law in laws.items()]
    columns = ("law", "parameters", "validation", "cuts", "daicc", "dbic", "holdout", "noise", "delta", "delta_reason")
    table = pd.DataFrame(rows, columns=[*columns, "note"])
    for column in ("daicc", "dbic"):
        table[column] = pd.to_numeric(table[column])
        table[column] -= table[column].min()
    return chosen, table.sort_values("validation", na_position="last", ignore_index=True)


def _row(runs: Runs, name: str, law: Law, score: Score, delta: float | None) -> dict:
    row = {"law": name, "parameters": law.size, "validation": score.score, "cuts": score.cuts}
    try:
        least, robust = fit(runs, name, delta, objective="lsq"), fit(runs, name, delta)
    except InputError as error:
        return row | {"note": str(error)}
    count, free = least.n_runs, law.size + 1  # the noise's scale is a parameter too
    deviance = count * np.log(max(least.objective, 1e-30))
    spare = count - free - 1
    held = runs.take(runs.holdout)
    error = robust.predict(**{i: held.input(i) for i in law.inputs}) / held.loss - 1.0 if len(held) else None
    few = f"{name}: {law.size} parameters are many for {count} runs" if count < RUNS_PER_PARAMETER * law.size else ""
    return row | {
        "daicc": deviance + 2 * free + 2 * free * (free + 1) / spare if spare > 0 else np.nan,
        "dbic": deviance + np.log(count) * free,
        "holdout": None if error is None else float(np.abs(error).mean()),
        "noise": robust.noise["sigma"],
        "delta": robust.delta,
        "delta_reason": robust.delta_reason,
        "note": "; ".join(filter(None, (few, score.note))),
    }


def by_factor(validation: Backtest, factor, level: float = 0.9) -> pd.DataFrame:
    """Errors of a backtest by how far they extrapolate: a row per bin of the compute factor past the cut's top.

    factor (predictions,): effort of the predicted run over that of the most expensive fitted one. `coverage` is that of
    the interval without and with the law's misfit, whose size comes from the other cuts. Errors are relative.
    """
    plain, full = np.empty(len(validation.error), bool), np.empty(len(validation.error), bool)
    bound = stats.norm.ppf(0.5 + level / 2)
    for cut in np.unique(validation.cut):
        here = validation.cut == cut
        others = Backtest(
            validation.law,
            np.unique(validation.cut[~here], return_inverse=True)[1],
            *(v[~here] for v in (validation.error, validation.distance, validation.variance)),
            validation.fitted,
        )
        k = discrepancy(others)["k"] if (~here).any() else 0.0
        misfit = (k * validation.distance[here] ** 2) ** 2
        miss = np.abs(validation.error[here])
        plain[here] = miss <= bound * np.sqrt(validation.variance[here])
        full[here] = miss <= bound * np.sqrt(validation.variance[here] + misfit)
    error = np.abs(np.expm1(validation.error) if validation.relative is None else validation.relative)
    rows = []
    for low, high in pairwise(BINS):
        inside = (factor > low) & (factor <= high)
        if inside.any():
            rows.append(
                {
                    "factor": f"{low:g} to {high:g}" if np.isfinite(high) else f"above {low:g}",
                    "predictions": int(inside.sum()),
                    "mean_error": float(error[inside].mean()),
                    "worst_error": float(error[inside].max()),
                    "coverage_noise_only": float(plain[inside].mean()),
                    "coverage": float(full[inside].mean()),
                }
            )
    return pd.DataFrame(rows)


def laws_for(runs: Runs, names=None) -> dict[str, Law]:
    """The laws named, or all those of the inputs that the table has: N and D, or the one it names."""
    from analysis.laws.forms import JOINT, SINGLE, law_named

    if names:
        return {name: law_named(name) for name in names}
    if runs.n_column:
        return {name: LAWS[name] for name in (*JOINT, "over_training", "farseer")}
    return {name: LAWS[name] for name in SINGLE}
