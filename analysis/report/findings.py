"""The whole analysis of one table of runs: fit every law, choose one, predict the runs held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fitting.checks import duplicates, outlier_note, unidentified
from analysis.fitting.fit import fit
from analysis.fitting.result import LawFit
from analysis.forecast.allocate import size_exponent
from analysis.forecast.select import Score, choose_law
from analysis.laws.forms import JOINT, LAWS, law_named
from analysis.runs import Runs
from analysis.tables import numbers
from analysis.uncertainty.bootstrap import bootstrap
from analysis.uncertainty.predict import predict_runs

HOLDOUT_COLUMNS = ("n", "d", "flops", "predicted", "low", "high", "measured", "error")


@dataclass(frozen=True, eq=False)
class Findings:
    """`fit` is the chosen law's; `fits` and `scores` are by law; `holdout` has a row per held-out run and law.

    holdout columns: n, d, flops, predicted, low, high (90 %), measured, error (relative, signed), law. `doubts`: what a
    reader must know first.
    """

    runs: Runs
    fit: LawFit
    fits: Mapping[str, LawFit]
    scores: Mapping[str, Score]
    holdout: pd.DataFrame
    requested: str
    doubts: tuple[str, ...] = ()

    @property
    def law(self) -> str:
        return self.fit.law

    def held_out(self, law: str | None = None) -> pd.DataFrame:
        """The hold-out table of one law, by default the chosen one, cheapest run first."""
        return self.holdout[self.holdout["law"] == (law or self.law)].reset_index(drop=True)

    def mean_abs_error(self, law: str | None = None) -> float | None:
        """Mean |relative error| over the held-out runs; None where none are held out."""
        error = self.held_out(law)["error"]
        return float(error.abs().mean()) if len(error) else None

    def coverage(self, law: str | None = None) -> float | None:
        """The share of held-out runs inside their 90 % interval; None where none are held out."""
        table = self.held_out(law)
        return float(table["measured"].between(table["low"], table["high"]).mean()) if len(table) else None

    def to_json(self) -> dict:
        """Plain numbers and strings, for json.dumps."""
        return {
            "law": self.law,
            "params": dict(self.fit.params),
            "intervals": dict(self.fit.intervals),
            "objective": self.fit.objective,
            "n_runs": self.fit.n_runs,
            "holdout": [
                {column: float(row[column]) for column in HOLDOUT_COLUMNS} for row in self.held_out().to_dict("records")
            ],
            "mean_abs_error": self.mean_abs_error(),
            "selection": {
                name: {"score": s.score, "cuts": s.cuts, "predictions": s.predictions, "note": s.note}
                for name, s in self.scores.items()
            },
            "all_laws": {
                name: {
                    "params": dict(fit.params),
                    "intervals": dict(fit.intervals),
                    "objective": fit.objective,
                    "mean_abs_error": self.mean_abs_error(name),
                    "coverage": self.coverage(name),
                    "misfit": fit.discrepancy["k"],
                }
                for name, fit in self.fits.items()
            },
            "diagnostics": dict(self.fit.diagnostics)
            | {"noise": dict(self.fit.noise), "discrepancy": dict(self.fit.discrepancy), "notes": list(self.fit.notes)},
            "n_column": self.fit.n_column,
            "cluster": self.fit.cluster,
            "delta": {"value": self.fit.delta, "reason": self.fit.delta_reason},
            "warnings": list(self.doubts),
        }


def analyse(
    runs: Runs,
    law: str = "auto",
    seed: int = 0,
    delta: float | None = None,
    draws: int = 1000,
    cluster: str | None = None,
    **options,
) -> Findings:
    """Fits every law the runs can identify and predicts the held-out runs with each; deterministic given the seed.

    law: "auto" chooses by validation inside the fitted part (`select`), or the name of a law of the loss by N and D.
    cluster and options (objective, fixed, tied) are those of `problem.pose`, the latter in the choice and in every fit:
    a law that lacks a parameter that is held is left out. Raises InputError.
    """
    form = law_named(law if law != "auto" else JOINT[0])
    if not form.allocates:
        raise InputError(
            f"law {law!r} gives the {form.target} by {', '.join(form.inputs)}: the analysis of a sweep needs a law of "
            "the loss by N and D"
        )
    laws = {name: LAWS[name] for name in dict.fromkeys((*JOINT, form.name))}
    try:
        chosen, scores = choose_law(runs, laws, delta, **options)
    except InputError:
        if law != "auto":
            fit(runs, law, delta, **options)  # the message about the law that was asked for is the helpful one
        raise
    chosen = chosen if law == "auto" else law
    fits = {}
    for name in laws:
        try:
            best = fit(runs, name, delta, **options)
        except InputError:
            if name == chosen:
                raise
            continue
        fits[name] = bootstrap(best, runs, draws, seed, cluster, scores[name].backtest)

    held = runs.take(runs.holdout)
    held = held.take(np.argsort(held.flops, kind="stable"))
    tables = []
    for name, fitted in fits.items():
        p = predict_runs(fitted, held)
        values = (held.n, held.d, held.flops, p.value, p.low, p.high, held.loss, p.value / held.loss - 1.0)
        tables.append(pd.DataFrame(dict(zip(HOLDOUT_COLUMNS, values, strict=True)) | {"law": name}))
    holdout, doubts = pd.concat(tables, ignore_index=True), tuple(doubts_of(fits[chosen], runs))
    return Findings(runs, fits[chosen], fits, scores, holdout, law, doubts)


def doubts_of(fit: LawFit, runs: Runs) -> list[str]:
    """Lines about the runs and the fit that a reader must know: copies, outliers, what is not pinned down."""
    lines = [duplicates(runs), outlier_note(fit, runs), *unidentified(fit, runs)]
    return [line for line in lines if line]


def n_sensitivity(result: Findings, draws: int = 300, seed: int = 0) -> pd.DataFrame:
    """The exponent a of N* ~ C^a under each count of N that the runs carry, for the chosen law and Chinchilla's.

    Columns: n_column, law, a, low, high (90 %), mean_abs_error (of the held-out runs, None without).
    """
    rows = []
    for column in ("n_nonembedding", "n_compute", "n_total"):
        if column not in result.runs.frame.columns:
            continue
        n = numbers(result.runs.frame, column)
        if not (np.isfinite(n).all() and (n > 0).all()):
            continue
        runs = replace(result.runs, n=n, n_column=column)
        for name in dict.fromkeys((result.law, "chinchilla")):
            try:
                refit = bootstrap(fit(runs, name, result.fit.delta), runs, draws, seed, result.fit.cluster)
            except InputError:
                continue
            a, low, high = size_exponent(refit)
            held = runs.holdout
            error = np.abs(refit.predict(n[held], runs.d[held]) / runs.loss[held] - 1.0).mean() if held.any() else None
            rows.append({"n_column": column, "law": name, "a": a, "low": low, "high": high, "mean_abs_error": error})
    return pd.DataFrame(rows, columns=["n_column", "law", "a", "low", "high", "mean_abs_error"])
