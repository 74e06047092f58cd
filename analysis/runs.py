"""Reads a table of finished runs: which columns are N, D, C and loss, which rows count, which are held out."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import InputError, close_match

# Looked for in this order where the column is not named; compared in lower case without blanks and punctuation.
_N_NAMES = ("n", "params", "parameters", "nparams", "numparams", "modelsize", "ntotal", "nnonembedding")
_D_NAMES = ("d", "tokens", "ntokens", "numtokens", "traintokens", "trainingtokens")
_C_NAMES = ("flops", "flop", "trainflops", "trainingflops", "trainingflop", "compute", "c")


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
            values = _numbers(self.frame, column)
        elif name == "x":
            values = self.flops
        else:
            near = close_match(column, self.frame.columns)
            raise InputError(
                f"the law needs {name}, and there is no column {column!r}; name it with --input {name}=COLUMN{near}"
            )
        _check_positive(self.frame, values, column, name)
        return values

    def effort(self, law) -> np.ndarray:
        """What orders runs from cheap to dear under a law: 6ND, or its only input, (runs,)."""
        return 6.0 * self.n * self.d if {"N", "D"} <= set(law.inputs) else self.input(law.inputs[0])

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
) -> Runs:
    """Runs from a CSV or parquet file or a DataFrame.

    N is `n_compute` where present, D is `tokens`, C is `flops`, or the columns named. C = 6ND where only N and D are
    known, D = C / 6N where only N and C are. `where` keeps rows and `holdout` marks rows that no fit may see; both are
    comparisons over the columns, with backticks around names that hold blanks. Rows whose `status` is not "finished"
    are dropped: theirs are not final losses. inputs: {input of a law: column} for laws of something else than N and D,
    as in {"x": "samples"}; with it, a table needs neither N nor D. n_unit and d_unit multiply N and D (1e6 where N is
    in millions); loss_unit "bits" turns bits into nats. A unit that looks wrong and is not
    given is asked for. Raises InputError.
    """
    for option, unit in (("--n-unit", n_unit), ("--d-unit", d_unit)):
        if unit is not None and not 0 < unit < np.inf:
            raise InputError(f"{option} {unit}: must be a positive number, such as 1e6 for millions")
    if loss_unit not in (None, "nats", "bits"):
        raise InputError(f"--loss-unit {loss_unit!r}: nats or bits")
    frame = path_or_frame.copy() if isinstance(path_or_frame, pd.DataFrame) else _read(path_or_frame)
    frame = frame.reset_index(drop=True)
    frame.columns = [str(c) for c in frame.columns]
    if not len(frame):
        raise InputError("the table of runs is empty: no rows to fit")
    notes = []
    if "status" in frame.columns:
        finished = frame["status"].astype("string").str.strip().str.lower().eq("finished").fillna(False).to_numpy(bool)
        if not finished.any():
            states = ", ".join(sorted(frame["status"].astype(str).unique())[:5])
            raise InputError(f"column 'status': none of the {len(frame)} runs is 'finished' (found: {states})")
        if not finished.all():
            notes.append(f"{(~finished).sum()} of {len(frame)} runs dropped: their status is not 'finished'")
            frame = frame[finished].reset_index(drop=True)

    loss_name = _named(frame, loss_column, "loss", "--loss-column")
    inputs = dict(inputs or {})
    for name, column in inputs.items():
        _named(frame, column, name, f"--input {name}=COLUMN")
    if inputs and not {"N", "D", "U"} & set(inputs):
        return _plain_runs(frame, inputs, loss_name, where, holdout, notes)
    n_name = _column(frame, n_column, "N", "--n-column", ("n_compute",), _N_NAMES)
    d_name = _column(frame, d_column, "D", "--d-column", ("tokens", "D"), _D_NAMES, required=False)
    c_name = _column(frame, c_column, "C", "--c-column", ("flops",), _C_NAMES, required=False)
    if d_name is None and c_name is None:
        raise InputError(
            "no column for D: name it with --d-column, or the training FLOPs with --c-column"
            + close_match("tokens", frame.columns)
        )

    n, loss = _numbers(frame, n_name) * (n_unit or 1.0), _numbers(frame, loss_name)
    loss = loss * np.log(2.0) if loss_unit == "bits" else loss
    with np.errstate(all="ignore"):
        d = _numbers(frame, d_name) * (d_unit or 1.0) if d_name else _numbers(frame, c_name) / (6.0 * n)
        flops = _numbers(frame, c_name) if c_name else 6.0 * n * d
    derived = {"N": n, "D": d, "C": flops, "flops": flops, "tokens": d}
    scope = frame.assign(**{k: v for k, v in derived.items() if k not in frame.columns})

    keep = _rows(scope, frame.columns, where, "--where")
    if not keep.any():
        raise InputError(f"--where {where!r} keeps none of the {len(frame)} runs")
    held = _rows(scope, frame.columns, holdout, "--holdout") if holdout is not None else np.zeros(len(frame), bool)
    frame, n, d, loss, flops, held = (v[keep] for v in (frame, n, d, loss, flops, held))
    frame = frame.reset_index(drop=True)

    _check_positive(frame, loss, loss_name, "loss")
    _check_positive(frame, n, n_name, "N")
    _check_positive(frame, d, d_name or c_name, "D" if d_name else "D = C/6N")
    _check_positive(frame, flops, c_name or "6ND", "C")
    given = {key for key, unit in (("n", n_unit), ("d", d_unit), ("loss", loss_unit)) if unit is not None}
    doubt = look_wrong(n, d if d_name else np.full_like(d, np.nan), loss, n_name, d_name or "", loss_name, given)
    if doubt:
        raise InputError(doubt)
    if holdout is not None and not held.any():
        raise InputError(f"--holdout {holdout!r} matches none of the {len(frame)} runs: nothing would be held out")
    if holdout is not None and held.all():
        raise InputError(f"--holdout {holdout!r} matches all {len(frame)} runs: none would be left to fit")
    return Runs(
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


def _plain_runs(frame, inputs, loss_name, where, holdout, notes) -> Runs:
    """Rows of a table without N and D, for a law of other inputs: N, D and C are NaN."""
    keep = _rows(frame, frame.columns, where, "--where")
    if not keep.any():
        raise InputError(f"--where {where!r} keeps none of the {len(frame)} runs")
    held = _rows(frame, frame.columns, holdout, "--holdout") if holdout is not None else np.zeros(len(frame), bool)
    frame, held = frame[keep].reset_index(drop=True), held[keep]
    loss = _numbers(frame, loss_name)
    _check_positive(frame, loss, loss_name, "loss")
    none = np.full(len(frame), np.nan)
    return Runs(none, none, loss, none, held, frame, "", "", "", loss_name, tuple(notes), inputs)


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


def _read(path: str | PathLike) -> pd.DataFrame:
    path = Path(fspath(path))
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a CSV or parquet file of runs")
    suffix = path.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if suffix in (".csv", ".txt", ".tsv"):
            return pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
    except Exception as error:  # pandas and pyarrow raise a dozen kinds; all mean that the file cannot be read
        reason = str(error).strip().splitlines()
        raise InputError(f"{path} cannot be read as {suffix[1:]}: {reason[0] if reason else error!r}") from error
    raise InputError(f"{path}: {suffix or 'no suffix'} is not a table of runs; give a .csv or .parquet file")


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named(frame, name, quantity, option):
    if name not in frame.columns:
        raise InputError(f"no column {name!r} for {quantity}; name it with {option}{close_match(name, frame.columns)}")
    return name


def _column(frame, name, quantity, option, preferred, common, required=True):
    if name is not None:
        return _named(frame, name, quantity, option)
    for wanted in preferred:
        if wanted in frame.columns:
            return wanted
    found = [c for c in frame.columns if _key(c) in common]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"more than one column could be {quantity}: {', '.join(found)}; choose one with {option}")
    if required:
        columns = ", ".join(map(str, frame.columns[:12]))
        raise InputError(f"no column for {quantity}; name it with {option} (there are: {columns})")
    return None


def _numbers(frame, name) -> np.ndarray:
    return pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _check_positive(frame, values, column, quantity):
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        shown = frame[column].iloc[first] if column in frame.columns else values[first]
        count = f"{bad.sum()} of {len(bad)} runs have"
        raise InputError(
            f"column {column!r} ({quantity}): {count} no positive finite value, the first in row {first}: {shown}; "
            f"drop or repair them, for example --where '`{column}` > 0'"
        )


_ALLOWED = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, ast.Constant),
    *(ast.List, ast.Tuple, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)


def _rows(scope: pd.DataFrame, columns, expression: str | None, option: str) -> np.ndarray:
    """The rows where the expression holds. Only comparisons over columns are let through: no calls, no attributes."""
    if expression is None:
        return np.ones(len(scope), bool)
    quoted: list[str] = []

    def plain(match):
        quoted.append(match.group(1))
        return f"quoted_column_{len(quoted) - 1}"

    text = re.sub(r"`([^`]*)`", plain, expression)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(
            f"{option} {expression!r} is not an expression over columns, such as 'flops > 1e12'"
        ) from error
    names = {}
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or isinstance(node, ast.Pow):
            raise InputError(
                f"{option} {expression!r}: only comparisons of columns and numbers joined by and, or, not are allowed"
            )
        if isinstance(node, ast.Name):
            known = node.id.startswith("quoted_column_") and node.id[14:].isdigit()
            names[node.id] = quoted[int(node.id[14:])] if known and int(node.id[14:]) < len(quoted) else node.id
    for name in names.values():
        if name not in scope.columns:
            raise InputError(f"{option} {expression!r}: no column {name!r}{close_match(name, columns)}")
    if not names:
        raise InputError(f"{option} {expression!r} names no column; write a comparison such as 'flops > 1e12'")
    try:
        local = pd.DataFrame({plain_name: scope[name] for plain_name, name in names.items()})
        answer = local.eval(text, engine="python")
    except Exception as error:  # pandas raises many kinds for an expression it cannot work out
        reason = str(error).strip().splitlines()
        raise InputError(f"{option} {expression!r} cannot be worked out: {reason[0] if reason else error!r}") from error
    answer = np.asarray(answer)
    if answer.shape != (len(scope),) or answer.dtype.kind not in "bO":
        raise InputError(f"{option} {expression!r} is not true or false for each run; write a comparison")
    return np.array([value is True or value is np.True_ for value in answer.tolist()], bool)
