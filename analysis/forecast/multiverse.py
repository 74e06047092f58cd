"""One fit, refitted under every convention: how far do the exponent and the target prediction move?

Axes: what N counts, the FLOP formula, the objective, smoothing over repeated runs, and the subset of runs. The baseline
is the first entry of each axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fitting.checks import outliers
from analysis.fitting.fit import fit
from analysis.laws.forms import law_named
from analysis.runs import Runs
from analysis.tables import numbers
from analysis.text import text_table

AXES = ("n", "flops", "objective", "smoothing", "subset")
OBJECTIVES = {
    "huber 1e-3": ("huber", 1e-3),
    "huber 1e-2": ("huber", 1e-2),
    "lad": ("lad", 1e-3),
    "lsq": ("lsq", 1e-3),
    "lsq_raw": ("lsq_raw", 1e-3),
}


@dataclass(frozen=True, eq=False)
class Multiverse:
    """table: a row per universe with its axes, a (N* ~ C^a), predicted (loss at the target), n_runs, converged, reason.

    target: N and D in the baseline's convention; elsewhere N is converted by the counts of the largest run.
    """

    law: str
    target: tuple[float, float]
    table: pd.DataFrame

    @property
    def baseline(self) -> pd.Series:
        return self.table.iloc[0]

    def spread(self) -> pd.DataFrame:
        """Per axis, the range of a and of the prediction when it alone leaves the baseline, the widest first."""
        rows = []
        for axis in AXES:
            same = np.logical_and.reduce([self.table[x] == self.baseline[x] for x in AXES if x != axis])
            rows.append(self._range(axis, self.table[same]))
        rows = sorted(rows, key=lambda r: -np.nan_to_num(r["predicted_high"] - r["predicted_low"]))
        return pd.DataFrame([*rows, self._range("all together", self.table)])

    def _range(self, axis, part):
        ranges = {f"{k}_{end}": float(getattr(part[k], f)()) for k in ("a", "predicted") for end, f in _ENDS}
        return {"axis": axis, "entries": len(part), "failed": int(part["a"].isna().sum())} | ranges

    def summary(self) -> str:
        base, n, d = self.baseline, *self.target
        lines = [
            f"{self.law}: {len(self.table)} universes, {self.table['a'].isna().sum()} of them without a fit",
            "baseline: " + ", ".join(f"{axis} {base[axis]}" for axis in AXES),
            f"baseline a = {base['a']:.4f}, loss at N = {n:.3g}, D = {d:.3g}: {base['predicted']:.4f}",
            "",
        ]
        rows = [["axis", "entries", "a from", "to", "loss from", "to"]]
        for r in self.spread().to_dict("records"):
            ends = (f"{r[k]:.4f}" for k in ("a_low", "a_high", "predicted_low", "predicted_high"))
            rows.append([r["axis"], str(r["entries"]), *ends])
        lines.append(text_table(rows, left=1, indent=2))
        failed = self.table[self.table["a"].isna()]
        lines += [
            f"not fitted: {', '.join(str(r[x]) for x in AXES)}: {r['reason']}" for _, r in failed.head(5).iterrows()
        ]
        lines += [f"one entry only: {axis}" for axis in AXES if len(set(self.table[axis])) == 1]
        return "\n".join(lines)

    def to_json(self) -> dict:
        def plain(frame):
            return frame.astype(object).where(frame.notna(), None).to_dict("records")

        return {
            "law": self.law,
            "target": list(self.target),
            "spread": plain(self.spread()),
            "universes": plain(self.table),
        }


_ENDS = (("low", "min"), ("high", "max"))


def multiverse(runs: Runs, law: str = "chinchilla", target: tuple[float, float] | None = None) -> Multiverse:
    """Refits `law` in every universe. target: (N, D), by default at 10 times the largest compute, at its D/N.

    Raises InputError where the baseline itself cannot be fitted.
    """
    if law_named(law).inputs != ("N", "D"):
        raise InputError(f"law {law!r} is not of N and D: the multiverse varies what they count")
    base = fit(runs, law, 1e-3)
    used = runs.fitted
    if target is None:
        top = int(np.argmax(used.n * used.d))
        target = (float(used.n[top] * 10**0.5), float(used.d[top] * 10**0.5))
    bad = set(outliers(base, runs).index)
    counts = _counts(runs)
    rows = []
    for (n_name, n), flops, objective, smoothing, subset in product(
        counts.items(), _formulas(runs), OBJECTIVES, _smoothings(runs), ("all", "top half", "top quarter", *_parts(bad))
    ):
        row = dict(zip(AXES, (n_name, flops, objective, smoothing, subset), strict=True))
        universe = replace(runs, n=n, n_column=n_name)
        compute = 6 * universe.n * universe.d if flops == "6ND" else universe.flops
        keep = _subset(universe, compute, subset, bad)
        universe = replace(universe.take(keep), flops=compute[keep])
        universe = _smoothed(universe) if smoothing == "mean of repeats" else universe
        name, delta = OBJECTIVES[objective]
        try:
            refit = fit(universe, law, delta, objective=name)
        except InputError as error:
            rows.append(row | {"a": np.nan, "predicted": np.nan, "reason": str(error)})
            continue
        ratio = n[np.argmax(runs.n)] / runs.n.max()
        rows.append(
            row
            | {
                "a": _exponent(refit, universe, flops),
                "predicted": refit.predict(target[0] * ratio, target[1]),
                "n_runs": refit.n_runs,
                "converged": refit.diagnostics["converged"],
                "reason": "",
            }
        )
    return Multiverse(law, target, pd.DataFrame(rows))


def _counts(runs) -> dict:
    """The N that the table counts, the runs' own first."""
    counts = {runs.n_column: runs.n}
    for column in ("n_nonembedding", "n_compute", "n_total"):
        if column in runs.frame.columns and column not in counts:
            values = numbers(runs.frame, column)
            if np.isfinite(values).all() and (values > 0).all():
                counts[column] = values
    return counts


def _formulas(runs):
    counted = np.abs(np.log(runs.flops / (6 * runs.n * runs.d))).max() > 1e-6
    return ("6ND", f"column {runs.c_column}") if counted else ("6ND",)


def _smoothings(runs):
    table = pd.DataFrame({"n": runs.n, "d": runs.d})
    return ("none", "mean of repeats") if table.duplicated().any() else ("none",)


def _parts(bad):
    return ("without smallest N", "without smallest D", *(("without outliers",) if bad else ()))


def _subset(runs, compute, name, bad):
    keep = np.ones(len(runs), bool)
    fitted = compute[~runs.holdout]
    if name.startswith("top"):
        keep = compute >= np.quantile(fitted, 0.5 if name == "top half" else 0.75)
    elif name == "without smallest N":
        keep = runs.n > runs.n.min() * 1.001
    elif name == "without smallest D":
        keep = runs.d > runs.d.min() * 1.001
    elif name == "without outliers":
        keep = ~np.isin(np.arange(len(runs)), list(bad))
    return keep & ~runs.holdout


def _smoothed(runs):
    """Repeated runs (same N and D) as one, at the mean of their log losses."""
    group = pd.DataFrame({"n": runs.n, "d": runs.d}).groupby(["n", "d"]).ngroup().to_numpy()
    _, first = np.unique(group, return_index=True)
    mean = pd.Series(np.log(runs.loss)).groupby(group).mean().to_numpy()
    return replace(runs.take(first), loss=np.exp(mean))


def _exponent(refit, runs, flops) -> float:
    """a of N* ~ C^a at the middle of the runs' compute, with C = k N^u D^v by the FLOP formula (u = v = 1 for 6ND)."""
    u = v = 1.0
    x, y = np.log(runs.n), np.log(runs.d)
    if flops != "6ND":
        _, u, v = np.linalg.lstsq(np.stack([np.ones_like(x), x, y], axis=1), np.log(runs.flops), rcond=None)[0]
    law = law_named(refit.law)
    middle = u * x.mean() + v * y.mean()

    def best(log_c):
        low, high = x.min() - 15, x.max() + 15
        for _ in range(60):
            log_n = 0.5 * (low + high)
            at = [np.array([log_n - refit.centre["N"]]), np.array([(log_c - u * log_n) / v - refit.centre["D"]])]
            by_n, by_d = (float(np.ravel(part)[0]) for part in law.by_input(refit.z, at))
            low, high = (low, log_n) if by_n - by_d * u / v > 0 else (log_n, high)
        return log_n

    return float((best(middle + 0.05) - best(middle - 0.05)) / 0.1)
