"""Reads a table of finished runs: which columns are N, D, C and loss, which rows count, which are held out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.errors import InputError, nearest_or_all
from analysis.tables import check_positive, named_once, numbers, read_table, rows_where

# Looked for in this order where the column is not named; compared in lower case without blanks and punctuation.
N_NAMES = ("n", "params", "parameters", "nparams", "numparams", "modelsize", "ntotal", "nnonembedding")
D_NAMES = ("d", "tokens", "ntokens", "numtokens", "traintokens", "trainingtokens")
C_NAMES = ("flops", "flop", "trainflops", "trainingflops", "trainingflop", "compute", "c")


@dataclass(frozen=True, eq=False)
class Runs:
    """Finished runs, one per row of `frame`: N, D, loss (nats per token), C in FLOPs, and which rows are held out."""

    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    holdout: np.ndarray
    frame: pd.DataFrame = field(repr=False)
    n_column: str
    d_column: str
    c_column: str
    loss_column: str
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    def column_of(self, name: str) -> str:
        """The column of an input of a law: N, D, C, U (unique tokens), or any that `inputs` names."""
        known = {"N": self.n_column, "D": self.d_column, "C": self.c_column}
        return self.inputs.get(name) or known.get(name) or {"U": "unique_tokens"}.get(name, name)

    def input(self, name: str) -> np.ndarray:
        """The values of an input of a law, (runs,). Raises InputError where the table does not have them."""
        column = self.column_of(name)
        if name in ("N", "D", "C") and name not in self.inputs:
            values = {"N": self.n, "D": self.d, "C": self.flops}[name]
        elif column in self.frame.columns:
            values = numbers(self.frame, column)
        elif name == "x":
            values = self.flops
        else:
            near = nearest_or_all(column, self.frame.columns)
            raise InputError(
                f"the law needs {name}, and there is no column {column!r}; name it with --input {name}=COLUMN{near}"
            )
        check_positive(self.frame, values, column, name)
        return values

    def effort(self, law) -> np.ndarray:
        """What orders runs from cheap to expensive under a law (`Law.effort`), (runs,)."""
        return law.effort({"N": self.n, "D": self.d} | {name: self.input(name) for name in law.inputs[:1]})

    @property
    def fitted(self) -> Runs:
        """The runs a fit may see."""
        return self.take(~self.holdout)

    def take(self, mask) -> Runs:
        return replace(
            self,
            n=self.n[mask],
            d=self.d[mask],
            loss=self.loss[mask],
            flops=self.flops[mask],
            holdout=self.holdout[mask],
            frame=self.frame.iloc[mask],
        )


def read_runs(
    path_or_frame,
    n_column: str | None = None,
    d_column: str | None = None,
    c_column: str | None = None,
    loss_column: str = "loss",
    where: str | None = None,
    holdout: str | None = None,
    inputs: Mapping[str, str] | None = None,
    n_unit: float | None = None,
    d_unit: float | None = None,
    loss_unit: str | None = None,
    signed: bool = False,
) -> Runs:
    """Runs from a CSV or parquet file or a DataFrame.

    N is `n_compute` where present, D is `tokens`, C is `flops`, or the columns named. C = 6ND where only N and D are
    known, D = C / 6N where only N and C are. `where` keeps rows and `holdout` marks rows that no fit may see; both are
    comparisons over the columns, with backticks around names that hold blanks. Rows whose `status` is not "finished"
    are dropped: theirs are not final losses. inputs: {input of a law: column} for laws of something else than N and D,
    as in {"x": "samples"}; with it, a table needs neither N nor D. n_unit and d_unit multiply N and D (1e6 where N is
    in millions); loss_unit "bits" turns bits into nats. A unit that looks wrong and is not
    given is asked for. signed: what is fitted may be 0 or below, as for a law whose metric has the identity link.
    Raises InputError.
    """
    for option, unit in (("--n-unit", n_unit), ("--d-unit", d_unit)):
        if unit is not None and not 0 < unit < np.inf:
            raise InputError(f"{option} {unit}: must be a positive number, such as 1e6 for millions")
    if loss_unit not in (None, "nats", "bits"):
        raise InputError(f"--loss-unit {loss_unit!r}: nats or bits")
    frame = path_or_frame if isinstance(path_or_frame, pd.DataFrame) else read_table(path_or_frame)
    frame, notes = _finished(named_once(frame.reset_index(drop=True)))
    loss_name = _named(frame, loss_column, "loss", "--loss-column")
    inputs = dict(inputs or {})
    for name, column in inputs.items():
        _named(frame, column, name, f"--input {name}=COLUMN")
    if inputs and not {"N", "D", "U"} & set(inputs):
        return _plain_runs(frame, inputs, loss_name, where, holdout, notes, signed)
    n_name = column_for(frame, n_column, "N", "--n-column", ("n_compute",), N_NAMES)
    d_name = column_for(frame, d_column, "D", "--d-column", ("tokens", "D"), D_NAMES, required=False)
    c_name = column_for(frame, c_column, "C", "--c-column", ("flops",), C_NAMES, required=False)
    if d_name is None and c_name is None:
        raise InputError(
            "no column for D: name it with --d-column, or the training FLOPs with --c-column"
            + nearest_or_all("tokens", frame.columns)
        )

    n, loss = numbers(frame, n_name) * (n_unit or 1.0), numbers(frame, loss_name)
    loss = loss * np.log(2.0) if loss_unit == "bits" else loss
    with np.errstate(all="ignore"):
        d = numbers(frame, d_name) * (d_unit or 1.0) if d_name else numbers(frame, c_name) / (6.0 * n)
        flops = numbers(frame, c_name) if c_name else 6.0 * n * d
    derived = {"N": n, "D": d, "C": flops, "flops": flops, "tokens": d}
    scope = frame.assign(**{k: v for k, v in derived.items() if k not in frame.columns})

    keep, held = _kept_and_held(scope, frame.columns, where, holdout)
    frame, n, d, loss, flops, held = (v[keep] for v in (frame, n, d, loss, flops, held))
    frame = frame.reset_index(drop=True)

    runs = Runs(
        n=n,
        d=d,
        loss=loss,
        flops=flops,
        holdout=held,
        frame=frame,
        n_column=n_name,
        d_column=d_name or f"{c_name} / 6 {n_name}",
        c_column=c_name or f"6 {n_name} {d_name}",
        loss_column=loss_name,
        notes=tuple(notes),
        inputs=inputs,
    )
    given = {key for key, unit in (("n", n_unit), ("d", d_unit), ("loss", loss_unit)) if unit is not None}
    return _checked(runs, d_name, c_name, given)


def _checked(runs: Runs, d_name: str | None, c_name: str | None, given: set[str]) -> Runs:
    """The runs, with a note where their FLOPs look odd. Raises InputError where a value or a unit cannot be right."""
    check_positive(runs.frame, runs.loss, runs.loss_column, "loss")
    check_positive(runs.frame, runs.n, runs.n_column, "N")
    check_positive(runs.frame, runs.d, d_name or c_name, "D" if d_name else "D = C/6N")
    check_positive(runs.frame, runs.flops, c_name or "6ND", "C")
    d = runs.d if d_name else np.full_like(runs.d, np.nan)
    if doubt := look_wrong(runs.n, d, runs.loss, runs.n_column, d_name or "", runs.loss_column, given):
        raise InputError(doubt)
    odd = _odd_flops(runs.flops, 6.0 * runs.n * runs.d, c_name) if c_name and d_name else None
    return replace(runs, notes=(*runs.notes, odd)) if odd else runs


def _plain_runs(frame, inputs, loss_name, where, holdout, notes, signed: bool) -> Runs:
    """Rows of a table without N and D, for a law of other inputs: N, D and C are NaN."""
    keep, held = _kept_and_held(frame, frame.columns, where, holdout)
    frame, held = frame[keep].reset_index(drop=True), held[keep]
    loss = numbers(frame, loss_name)
    check_positive(frame, np.where(np.isfinite(loss), 1.0, np.nan) if signed else loss, loss_name, "loss")
    none = np.full(len(frame), np.nan)
    return Runs(none, none, loss, none, held, frame, "", "", "", loss_name, tuple(notes), inputs)


def _finished(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(the rows whose status is "finished", all where there is no status; a note on the others)."""
    if not len(frame):
        raise InputError("the table of runs is empty: no rows to fit")
    if "status" not in frame.columns:
        return frame, []
    status = frame["status"].astype("string").str.strip().fillna("").replace("", "blank")
    finished = status.str.lower().eq("finished").to_numpy(bool)
    if not finished.any():
        states = ", ".join(sorted(status.unique())[:5])
        raise InputError(f"column 'status': none of the {len(frame)} runs is 'finished' (there are: {states})")
    if finished.all():
        return frame, []
    note = f"{(~finished).sum()} of {len(frame)} runs dropped: their status is not 'finished'"
    return frame[finished].reset_index(drop=True), [note]


def _kept_and_held(scope, columns, where, holdout) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are used at all, and which of all rows are held out, (rows,) each."""
    keep = rows_where(scope, columns, where, "--where")
    if not keep.any():
        raise InputError(f"--where {where!r} keeps none of the {len(scope)} runs")
    for column in ("objective", "objective_options"):
        kinds = scope.loc[keep, column].dropna().unique() if column in scope.columns else ()
        if len(kinds) > 1:
            raise InputError(
                f"column {column!r} differs among the runs ({', '.join(map(str, kinds[:5]))}): their losses do not "
                f"compare; choose with --where, such as {column} == {str(kinds[0])!r}"
            )
    if {"objective", "parent"} <= set(scope.columns):  # a table of runs and their losses
        started = scope["parent"][keep].notna() & (scope["parent"][keep].astype(str) != "")
        if started.any() and not started.all():
            raise InputError(
                "column 'parent': some of the runs start from what another run ended with and others do not, so their "
                "D and C do not compare; choose with --where, such as flops_parents == 0"
            )
    if holdout is None:
        return keep, np.zeros(len(scope), bool)
    held = rows_where(scope, columns, holdout, "--holdout")
    if not held[keep].any():
        raise InputError(f"--holdout {holdout!r} matches none of the {keep.sum()} runs: nothing would be held out")
    if held[keep].all():
        raise InputError(f"--holdout {holdout!r} matches all {keep.sum()} runs: none would be left to fit")
    return keep, held


def _odd_flops(flops, flops_6nd, column: str) -> str | None:
    """A line about a column of FLOPs that is far from 6ND, by its unit or by the order of its rows, or None."""
    apart = np.log(flops) - np.log(flops_6nd)
    ratio = float(np.exp(np.median(apart)))
    sorted_apart = np.sort(np.log(flops)) - np.sort(np.log(flops_6nd))
    permuted = np.std(apart) > max(np.log(2.0), 4 * np.std(sorted_apart))
    if not permuted and 0.1 <= ratio <= 10:
        return None
    looks = "; its rows look permuted: sorted, the two agree" if permuted else "; is it in another unit?"
    return f"column {column!r} is {ratio:.3g} times 6ND in the median run{looks}; check it, or leave it out"


def look_wrong(n, d, loss, n_column: str, d_column: str, loss_column: str, given=frozenset()) -> str | None:
    """A line that asks about a unit that looks wrong, or None. `given`: the units already stated (n, d, loss)."""
    if "loss" not in given:
        name = loss_column.lower()
        if any(word in name for word in ("bits", "bpb", "bpc")):
            return f"column {loss_column!r} looks like bits: say --loss-unit bits or --loss-unit nats"
        if "ppl" in name or "perplexity" in name or np.median(loss) > 15:
            return (
                f"column {loss_column!r} (median {np.median(loss):.3g}) looks like perplexity, not nats per token: "
                "give its logarithm, or say --loss-unit nats"
            )
    each = np.median(d / n)  # tokens per parameter: 1e5 is far beyond any run, 1e-3 too
    for key, values, column, odd in (("n", n, n_column, each > 1e5), ("d", d, d_column, each < 1e-3)):
        few = np.isfinite(values).all() and np.max(values) < (1e3 if key == "n" else 1e4)
        if key not in given and (few or odd):
            quantity = "parameters" if key == "n" else "tokens"
            return (
                f"column {column!r} ({key.upper()}) is at most {np.max(values):.4g}: millions, billions of {quantity}? "
                f"say --{key}-unit 1e6 or --{key}-unit 1e9, or --{key}-unit 1 if it is right"
            )
    return None


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named(frame, name, quantity, option):
    if name not in frame.columns:
        raise InputError(
            f"no column {name!r} for {quantity}; name it with {option}{nearest_or_all(name, frame.columns)}"
        )
    return name


def column_for(frame, name, quantity, option, preferred, common, required=True) -> str | None:
    """The column of a quantity: the one named, the first preferred, or the only one of a common name."""
    if name is not None:
        return _named(frame, name, quantity, option)
    for wanted in preferred:
        if wanted in frame.columns:
            return wanted
    likely = [c for c in frame.columns if _key(c) in common]
    if len(likely) == 1:
        return likely[0]
    if likely:
        raise InputError(f"more than one column could be {quantity}: {', '.join(likely)}; choose one with {option}")
    if required:
        columns = ", ".join(map(str, frame.columns[:12]))
        raise InputError(f"no column for {quantity}; name it with {option} (there are: {columns})")
    return None
