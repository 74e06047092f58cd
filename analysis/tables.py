"""Tables from anywhere: read, pooled, their columns as numbers, and the rows where an expression holds."""

from __future__ import annotations

import ast
import csv
import re
import warnings
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import InputError, nearest_or_all
from analysis.text import printable

_THOUSANDS = r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?"
_ALLOWED = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, ast.Constant),
    *(ast.List, ast.Tuple, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)


def read_table(path: str | PathLike) -> pd.DataFrame:
    """The rows of a CSV (separated by commas, semicolons or tabs) or parquet file. Raises InputError."""
    path = Path(fspath(path))
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a CSV or parquet file of runs")
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".pq", ".csv", ".txt", ".tsv"):
        raise InputError(f"{path}: {suffix or 'no suffix'} is not a table of runs; give a .csv or .parquet file")
    try:
        if suffix in (".parquet", ".pq"):
            return named_once(pd.read_parquet(path))
        with warnings.catch_warnings(), path.open(encoding="utf-8-sig") as stream:
            warnings.simplefilter("error", pd.errors.ParserWarning)
            separator = _separator(stream.readline())
            stream.seek(0)
            frame = pd.read_csv(stream, sep=separator, skipinitialspace=True, low_memory=False, index_col=False)
    except InputError:
        raise
    except Exception as error:  # pandas and pyarrow raise a dozen kinds; all mean that the file cannot be read
        reason = str(error).strip().splitlines()
        raise InputError(f"{path} cannot be read as {suffix[1:]}: {reason[0] if reason else error!r}") from error
    frame = named_once(frame)
    if separator == ";":  # there a comma is the decimal point
        for column in frame.columns[frame.dtypes.map(pd.api.types.is_string_dtype)]:
            if not frame[column].astype("string").str.count(",").max() > 1:
                frame[column] = frame[column].astype("string").str.replace(",", ".", regex=False)
    return frame


def _separator(head: str) -> str:
    """Of the comma, the semicolon and the tab the one that splits the head of a table most."""
    return max(",;\t", key=lambda mark: len(next(csv.reader([head], delimiter=mark), [])))


def named_once(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its columns' names as text without blanks at the ends. Raises InputError for a repeated one."""
    frame = frame.set_axis([str(column).strip() for column in frame.columns], axis=1)
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise InputError(f"column {repeated[0]!r} is there twice: rename or drop one")
    return frame


def pool(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Several tables as one; `sweep` says which a run is from, unless a table says it itself.

    A run that is in two (same `run`) is taken where it is finished. Where some tables have a `status`, the rows of the
    others count as finished. Raises InputError where the losses do not compare.
    """
    named = [frame if "sweep" in frame.columns else frame.assign(sweep=name) for name, frame in frames.items()]
    if any("status" in frame.columns for frame in named):
        named = [frame if "status" in frame.columns else frame.assign(status="finished") for frame in named]
    pooled = pd.concat(named, ignore_index=True)
    if {"run", "status"} <= set(pooled.columns):
        pooled = pooled.iloc[np.argsort(pooled["status"].ne("finished"), kind="stable")]
    if "run" in pooled.columns:
        pooled = pooled[~pooled["run"].duplicated() | pooled["run"].isna()]
    for column in {"source", "tokenizer", "corpus"} & set(pooled.columns):
        kinds = pooled.dropna(subset=column).groupby("sweep")[column].agg(set)
        if any(kind != kinds.iloc[0] for kind in kinds):
            shown = ", ".join(sorted(map(str, set.union(*kinds)))[:5])
            raise InputError(f"column {column!r} differs among the tables ({shown}): their losses do not compare")
    return pooled.sort_index().reset_index(drop=True)


def numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64, (rows,): "1,000,000" is a million, what is no number is NaN."""
    values = frame[column]
    if not pd.api.types.is_numeric_dtype(values):
        text = values.astype("string").str.strip()
        grouped = text.str.fullmatch(_THOUSANDS).fillna(False).to_numpy(bool)
        values = text.str.replace(",", "", regex=False) if grouped.any() else text
        values = pd.to_numeric(values, errors="coerce")
    return values.to_numpy(np.float64, na_value=np.nan)


def rows_where(scope: pd.DataFrame, columns, expression: str | None, option: str) -> np.ndarray:
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
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{option} {expression!r} is not an expression over columns, such as 'flops > 1e12'"
        ) from error
    names, compared_as_text = {}, set()
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or isinstance(node, ast.Pow):
            raise InputError(
                f"{option} {expression!r}: only comparisons of columns and numbers joined by and, or, not are allowed"
            )
        if isinstance(node, ast.Name):
            known = node.id.startswith("quoted_column_") and node.id[14:].isdigit()
            names[node.id] = quoted[int(node.id[14:])] if known and int(node.id[14:]) < len(quoted) else node.id
        if isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node)
        ):
            compared_as_text |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    for name in names.values():
        if name not in scope.columns:
            raise InputError(f"{option} {expression!r}: no column {name!r}{nearest_or_all(name, columns)}")
    if not names:
        raise InputError(f"{option} {expression!r} names no column; write a comparison such as 'flops > 1e12'")
    # A column of numbers in which one cell is a word is text for pandas: compared with a number, the word is missing.
    local = {k: scope[name] if k in compared_as_text else _as_numbers(scope, name) for k, name in names.items()}
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            answer = pd.DataFrame(local).eval(text.strip(), engine="python")
    except Exception as error:  # pandas raises many kinds for an expression it cannot work out
        reason = str(error).strip().splitlines()
        raise InputError(f"{option} {expression!r} cannot be worked out: {reason[0] if reason else error!r}") from error
    answer = np.asarray(answer)
    if answer.shape != (len(scope),) or answer.dtype.kind not in "bO":
        raise InputError(f"{option} {expression!r} is not true or false for each run; write a comparison")
    return answer if answer.dtype.kind == "b" else np.array([value is True for value in answer.tolist()], bool)


def _as_numbers(scope: pd.DataFrame, name: str):
    column = scope[name]
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return column
    values = numbers(scope, name)
    return pd.Series(values, scope.index) if np.isfinite(values).any() else column


def check_positive(frame: pd.DataFrame, values: np.ndarray, column: str, quantity: str) -> None:
    """Raises InputError, with the first such row and a remedy, where a value is not positive and finite."""
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        first = int(np.argmax(bad))
        cell = frame[column].iloc[first] if column in frame.columns else values[first]
        raise InputError(
            f"column {column!r} ({quantity}): {bad.sum()} of {len(bad)} runs have no positive finite value, the first "
            f"in row {first}: {printable(str(cell))}; drop or repair them, for example "
            f"--where '`{column}` > 0 and `{column}` < 1e300'"
        )
