"""One fit under every convention: how far do the exponent a of N* ~ C^a and the loss at a target move?

Axes: what N counts, the FLOP formula, the objective, smoothing of the loss, and the subset of runs ((Mis)Fitting,
2502.18969, lists them as what studies leave unsaid). The baseline is the first entry of each. No intervals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from analysis.checks import outliers
from analysis.errors import InputError
from analysis.fit import fit
from analysis.laws import law_named
from analysis.runs import Runs

AXES = ("n", "flops", "objective", "smoothing", "subset")
OBJECTIVES = {
    "huber 1e-3": ("huber", 1e-3),
    "huber 1e-2": ("huber", 1e-2),
    "lad": ("lad", 1e-3),
    "lsq": ("lsq", 1e-3),
    "lsq_raw": ("lsq_raw", 1e-3),
}
_COUNTS = ("n_nonembedding", "n_compute", "n_total")
_CURVE_LOSSES = ("train_loss", "smoothed_loss", "loss_smoothed", "loss_ema", "loss_mean")
_SUBSETS = ("all", "top half", "top quarter", "without smallest N", "without smallest D")


@dataclass(frozen=True, eq=False)
class Multiverse:
    """table: a row per universe, the baseline first; columns are the axes, then a, predicted (loss at the target),
    value (the objective's), n_runs, converged, and reason (why a or the whole fit is missing, else empty).

    target: N and D in the baseline's convention. notes: what an axis lacks here, and what was converted how.
    """

    law: str
    target: tuple[float, float]
    table: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def baseline(self) -> pd.Series:
        return self.table.iloc[0]

    def spread(self) -> pd.DataFrame:
        """Low, high, range and sd of a and predicted, per axis when it alone leaves the baseline, and over all.

        The most influential axis comes first: the larger of both ranges, each as a share of the baseline's value.
        """
        alone = {a: np.logical_and.reduce([self.table[x] == self.baseline[x] for x in AXES if x != a]) for a in AXES}
        rows = [self._range(axis, self.table[same]) for axis, same in alone.items()]
        rows.sort(key=lambda r: -np.nan_to_num(r["share"]))
        return pd.DataFrame([*rows, self._range("all together", self.table)])

    def _range(self, axis, part) -> dict:
        row = {"axis": axis, "entries": len(part), "failed": int((part["reason"] != "").sum())}
        shares = []
        for key in ("a", "predicted"):
            low, high = part[key].min(), part[key].max()
            sd = part[key].std(ddof=0)
            row |= {f"{key}_low": low, f"{key}_high": high, f"{key}_range": high - low, f"{key}_sd": sd}
            shares.append((high - low) / abs(self.baseline[key]))
        return row | {"share": float(np.nanmax([0.0, *shares]))}

    def summary(self) -> str:
        """A table for a reader, the most influential axis first, then what could not be fitted and why."""
        base, (n, d), failed = self.baseline, self.target, self.table[self.table["reason"] != ""]
        lines = [
            f"{self.law}: {len(self.table)} universes, {len(failed)} of them without a result, "
            f"{(self.table['converged'] == False).sum()} not converged",  # noqa: E712 (missing is not False)
            "baseline: " + ", ".join(f"{axis} {base[axis]}" for axis in AXES) + f", {base['n_runs']:.0f} runs",
            f"baseline a = {base['a']:.4f}, loss at N = {n:.3g}, D = {d:.3g}: {base['predicted']:.4f}",
            "",
            f"  {'axis':<14}{'entries':>7}  {'a from':>8} {'to':>8} {'sd':>8}  {'loss from':>9} {'to':>8} {'sd':>8}",
        ]
        for r in self.spread().to_dict("records"):
            lines.append(
                f"  {r['axis']:<14}{r['entries']:>7}  {r['a_low']:>8.4f} {r['a_high']:>8.4f} {r['a_sd']:>8.4f}  "
                f"{r['predicted_low']:>9.4f} {r['predicted_high']:>8.4f} {r['predicted_sd']:>8.4f}"
            )
        for reason, part in failed.groupby("reason", sort=False):
            where = ", ".join(str(part.iloc[0][x]) for x in AXES)
            more = f" and {len(part) - 1} more" if len(part) > 1 else ""
            lines.append(f"no result: {where}{more}: {reason}")
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict:
        """Plain numbers and strings; None where there is no value."""

        def plain(frame):
            return frame.astype(object).where(frame.notna(), None).to_dict("records")

        told = {"law": self.law, "target": list(self.target), "notes": list(self.notes)}
        return told | {"spread": plain(self.spread()), "universes": plain(self.table)}


def multiverse(runs: Runs, law: str = "chinchilla", target: tuple[float, float] | None = None) -> Multiverse:
    """Refits `law` in every universe; held-out runs stay out.

    target: (N, D) in the baseline's convention, by default the baseline's compute-optimal N and D at 10 times 6ND of
    the dearest fitted run. Another N convention is given the target's N times the ratio of the counts at the largest
    run, and where D = C/6N, the D of the same C. Raises InputError where the baseline itself cannot be fitted.
    """
    if law_named(law).inputs != ("N", "D"):
        raise InputError(f"law {law!r} is not a law of N and D alone: a multiverse varies what they count")
    base = fit(runs, law, 1e-3)
    used = runs.fitted
    target = _target(base, used) if target is None else (float(target[0]), float(target[1]))
    base.inputs_of(*target, {})
    bad = ~np.isin(np.arange(len(runs)), outliers(base, runs).index)
    counts, losses = _counts(runs), _losses(runs)
    formulas = _formulas(runs, counts)
    subsets = (*_SUBSETS, "without outliers") if not bad.all() else _SUBSETS
    largest = int(np.argmax(np.where(runs.holdout, 0.0, runs.n)))
    known: dict = {}
    rows = []
    for n_name, formula, objective, smoothing, subset in product(counts, formulas, OBJECTIVES, losses, subsets):
        ratio = counts[n_name][largest] / runs.n[largest]
        one = replace(runs, n=counts[n_name], n_column=n_name, loss=losses[smoothing])
        one = replace(one, d=one.flops / (6.0 * one.n)) if _derived(runs) else one
        powers = _powers(one.fitted) if formula != "6ND" else (1.0, 1.0)
        keep = _subset(one, one.flops if formula != "6ND" else 6.0 * one.n * one.d, subset, bad)
        point = (target[0] * ratio, target[1] / ratio if _derived(runs) else target[1])
        key = (n_name, objective, smoothing, keep.tobytes())
        if key not in known:
            kept = one.take(keep)
            known[key] = _refit(_merged(kept) if smoothing == "mean of repeats" else kept, law, objective, point)
        found, row = known[key]
        axes = dict(zip(AXES, (n_name, formula, objective, smoothing, subset), strict=True))
        rows.append(axes | row | (_slope(found, one.take(keep), powers) if found else {}))
    table = pd.DataFrame(rows)
    return Multiverse(law, target, table, _notes(runs, table, counts))


def _refit(runs, law, objective, point):
    """(fit or None, columns of its row)."""
    name, delta = OBJECTIVES[objective]
    try:
        found = fit(runs, law, delta, objective=name)
    except (InputError, np.linalg.LinAlgError) as error:
        none = {"a": np.nan, "predicted": np.nan, "value": np.nan}
        return None, none | {"n_runs": len(runs), "converged": None, "reason": str(error)}
    row = {"a": np.nan, "predicted": found.predict(*point), "value": found.objective, "n_runs": found.n_runs}
    return found, row | {"converged": found.diagnostics["converged"], "reason": ""}


def _derived(runs) -> bool:
    return runs.d_column not in runs.frame.columns


def _counts(runs) -> dict:
    """{convention: N, (runs,)} that the table carries, the runs' own first and in its unit."""
    found = {runs.n_column: runs.n}
    unit = np.median(runs.n / pd.to_numeric(runs.frame[runs.n_column]).to_numpy(float))
    for column in _COUNTS:
        if column in runs.frame.columns and column not in found:
            values = unit * pd.to_numeric(runs.frame[column], errors="coerce").to_numpy(float)
            if (np.isfinite(values) & (values > 0)).all():
                found[column] = values
    return found


def _losses(runs) -> dict:
    """{smoothing: loss, (runs,)}: as it is, averaged along the curve, averaged over runs at the same N and D."""
    found = {"none": runs.loss}
    for column in _CURVE_LOSSES:
        if column in runs.frame.columns and column != runs.loss_column:
            values = pd.to_numeric(runs.frame[column], errors="coerce").to_numpy(float)
            if (np.isfinite(values) & (values > 0)).all():
                found[f"column {column}"] = values
    repeats = pd.DataFrame({"n": runs.n, "d": runs.d})[~runs.holdout].duplicated().any()
    return found | ({"mean of repeats": runs.loss} if repeats else {})


def _merged(runs):
    """Runs with one N and D as one run, at the mean of their log loss."""
    group = pd.DataFrame({"n": runs.n, "d": runs.d}).groupby(["n", "d"]).ngroup().to_numpy()
    _, first = np.unique(group, return_index=True)
    return replace(runs.take(first), loss=np.exp(pd.Series(np.log(runs.loss)).groupby(group).mean().to_numpy()))


def _formulas(runs, counts) -> tuple[str, ...]:
    if _derived(runs) or runs.c_column not in runs.frame.columns:
        return ("6ND",)
    apart = max(np.abs(np.log(runs.flops / (6.0 * n * runs.d))).max() for n in counts.values())
    return ("6ND", f"column {runs.c_column}") if apart > 1e-6 else ("6ND",)


def _powers(runs) -> tuple[float, float]:
    """(u, v) of C = k N^u D^v by least squares of logs."""
    terms = np.stack([np.ones(len(runs)), np.log(runs.n), np.log(runs.d)], axis=1)
    return tuple(np.linalg.lstsq(terms, np.log(runs.flops), rcond=None)[0][1:])


def _subset(runs, compute, name, good):
    keep = np.ones(len(runs), bool)
    if name.startswith("top"):
        keep = compute >= np.quantile(compute[~runs.holdout], 0.5 if name == "top half" else 0.75)
    elif name.startswith("without smallest"):
        values = runs.n if name.endswith("N") else runs.d
        keep = values > values[~runs.holdout].min() * 1.001
    elif name == "without outliers":
        keep = good
    return keep & ~runs.holdout


def _best_log_n(found, log_c, powers):
    """log N that minimises the law at u log N + v log D = log_c, or NaN where that is not between e^-30 and e^100."""
    (u, v), law = powers, law_named(found.law)
    low, high = -30.0, 100.0
    for _ in range(70):
        log_n = 0.5 * (low + high)
        at = [np.array([log_n - found.centre["N"]]), np.array([(log_c - u * log_n) / v - found.centre["D"]])]
        by_n, by_d = (float(np.ravel(part)[0]) for part in law.by_input(found.z, at))
        low, high = (low, log_n) if by_n - by_d * u / v > 0 else (log_n, high)
    return log_n if -29.9 < log_n < 99.9 else np.nan


def _slope(found, runs, powers) -> dict:
    """a of N* ~ C^a at the geometric middle of the runs' compute, C = k N^u D^v; with the reason where there is none."""
    if not min(powers) > 0:
        return {"reason": f"C = k N^{powers[0]:.2g} D^{powers[1]:.2g} by the FLOP column: no trade-off of N and D"}
    log_c = powers[0] * np.log(runs.n) + powers[1] * np.log(runs.d)
    middle, step = 0.5 * (log_c.min() + log_c.max()), np.log(1.05)
    a = (_best_log_n(found, middle + step, powers) - _best_log_n(found, middle - step, powers)) / (2 * step)
    return {"a": float(a), "reason": "" if np.isfinite(a) else "the fitted law has no compute-optimal N"}


def _target(base, used):
    log_c = np.log(10.0 * (used.n * used.d).max())
    log_n = _best_log_n(base, log_c, (1.0, 1.0))
    if not np.isfinite(log_n):
        raise InputError("the fitted law has no compute-optimal N to predict at: give the target's N and D")
    return float(np.exp(log_n)), float(np.exp(log_c - log_n))


def _notes(runs, table, counts) -> tuple[str, ...]:
    lacks = {
        "n": f"the table counts N in one way, {runs.n_column}",
        "flops": "D is C / 6N, so 6ND is C" if _derived(runs) else "no column of FLOPs that differs from 6ND",
        "smoothing": "no repeated runs and no loss averaged along the curve",
    }
    notes = [f"one entry only: {axis} ({why})" for axis, why in lacks.items() if table[axis].nunique() == 1]
    if len(counts) > 1:
        same = " and D of the same C" if _derived(runs) else ""
        notes.append(f"the target's N{same} under another count: by the ratio of the counts at the largest run")
    if "without outliers" not in set(table["subset"]):
        notes.append("no outliers beyond 5 robust sigmas: no subset without them")
    return tuple(notes)
