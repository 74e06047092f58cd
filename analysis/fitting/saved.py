"""Reads a saved fit. The file may come from anyone: every field is checked here, once, before anything uses it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from analysis.errors import InputError
from analysis.fitting.problem import OBJECTIVES
from analysis.fitting.result import FORMAT, RANGES, LawFit
from analysis.laws.forms import law_named

AGAIN = "make it again with: scaling fit RUNS --out fit.json"


def load_fit(path) -> LawFit:
    """The fit that `LawFit.save` wrote. Raises InputError where the file is missing, damaged or not a fit."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise InputError(f"{path} cannot be read as a fit ({reason}); {AGAIN}") from error
    if not isinstance(record, dict) or "format" not in record:
        raise InputError(f"{path} is not a fit of ours; {AGAIN}")
    if record["format"] != FORMAT:
        raise InputError(f"{path} was written by another version; {AGAIN}")
    try:
        return _read(record)
    except _Damaged as error:
        raise InputError(f"{path} is not a fit of ours, or is damaged: {error}; {AGAIN}") from error


class _Damaged(Exception):
    """A field of the file is not what `save` writes."""


def _no_constant(name):
    raise ValueError(f"{name} is no number")


def _read(record: dict) -> LawFit:
    try:
        law = law_named(_text(record, "law"))
    except InputError as error:
        raise _Damaged(str(error)) from error
    z = _array(record, "z", (law.size,))
    draws = None if record.get("draws") is None else _array(record, "draws", (-1, law.size))
    names = set(law.parameters)
    diagnostics = _diagnostics(record)
    fit = LawFit(
        law=law.name,
        params=_numbers(record, "params", names, names),
        objective=_number(record, "objective", 0),
        n_runs=int(_number(record, "n_runs", 1)),
        delta=_number(record, "delta", 1e-300),
        n_column=_text(record, "n_column"),
        diagnostics=diagnostics,
        objective_name=_text(record, "objective_name", OBJECTIVES),
        z=z,
        centre=_numbers(record, "centre", set(law.inputs), set(law.inputs), -1e3, 1e3),
        fitted_range=_spans(
            record, "fitted_range", {RANGES.get(k, k) for k in law.inputs} | _compute(law), positive=True
        ),
        noise=_numbers(record, "noise", {"sigma", "dof"}, {"sigma", "dof"}, 0, 1e12),
        intervals=_spans(record, "intervals", names) if record.get("intervals") else {},
        discrepancy=_discrepancy(record),
        draws=draws,
        notes=tuple(_texts(record, "notes")),
        fixed=_numbers(record, "fixed", set(), names) if record.get("fixed") else {},
        tied=_pairs(record, names),
        columns=_columns(record, law.inputs),
        delta_reason=_text(record, "delta_reason", default=""),
        unit=_text(record, "unit", default=""),
        weighting=_weighting(record),
        cluster=None if record.get("cluster") is None else _text(record, "cluster"),
    )
    _consistent(fit, law)
    return fit


def _consistent(fit: LawFit, law) -> None:
    """The parts must belong together, and the law must be finite in the middle of the runs."""
    if not fit.noise["dof"] > 0 or fit.noise["sigma"] > 1e3:
        raise _Damaged("noise: sigma and dof must be those of a fit")
    with np.errstate(all="ignore"):
        meant = fit.params_of(fit.z)
        for name, value in fit.params.items():
            if not np.isclose(value, float(meant[name]), rtol=1e-6, atol=1e-9):
                raise _Damaged(f"params: {name} is not the one of z")
        middle = {k: math.sqrt(low * high) for k, (low, high) in fit.fitted_range.items()}
        point = [middle[RANGES.get(name, name)] for name in law.inputs]
        drawn = fit.z[None] if fit.draws is None else fit.draws
        for label, z in (("z", fit.z[None]), ("draws", drawn)):
            value = fit.metric.from_link(fit.linked(z, point))
            if not np.isfinite(value).any() or np.nanmax(np.abs(value)) > 1e100:
                raise _Damaged(f"{label}: the law is not finite within the fitted range")


def _compute(law) -> set[str]:
    return {"flops"} if {"N", "D"} <= set(law.inputs) else set()


def _is_number(value) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _number(record, name, low=-math.inf, high=math.inf) -> float:
    value = record.get(name)
    if not _is_number(value) or not low <= value <= high:
        raise _Damaged(f"{name}: a number was expected")
    return float(value)


def _text(record, name, known=None, default=None) -> str:
    value = record.get(name, default)
    if not isinstance(value, str) or (known is not None and value not in known):
        raise _Damaged(f"{name}: " + (f"one of {', '.join(known)} was expected" if known else "a text was expected"))
    return value


def _texts(record, name) -> list[str]:
    value = record.get(name, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _Damaged(f"{name}: a list of texts was expected")
    return value


def _array(record, name, shape) -> np.ndarray:
    """Finite numbers of the shape, where -1 stands for two or more."""
    value = record.get(name)
    rows = value if len(shape) == 2 else [value]
    if not isinstance(rows, list) or (len(shape) == 2 and len(rows) < 2):
        raise _Damaged(f"{name}: numbers were expected")
    for row in rows:
        if not isinstance(row, list) or len(row) != shape[-1] or not all(map(_is_number, row)):
            raise _Damaged(f"{name}: {shape[-1]} finite numbers were expected")
    array = np.array(value, dtype=np.float64)
    if np.abs(array).max() > 1e6:
        raise _Damaged(f"{name}: beyond anything a law can hold")
    return array


def _object(record, name) -> dict:
    value = record.get(name)
    if not isinstance(value, dict):
        raise _Damaged(f"{name}: an object was expected")
    return value


def _numbers(record, name, needed: set, known: set, low=-math.inf, high=math.inf) -> dict[str, float]:
    value = _object(record, name)
    if not needed <= set(value) <= known:
        raise _Damaged(f"{name}: {', '.join(sorted(needed or known))} were expected")
    return {key: _number(value, key, low, high) for key in value}


def _spans(record, name, known: set, positive: bool = False) -> dict[str, list[float]]:
    """{name: [low, high]}; every one of `known` is needed."""
    value = _object(record, name)
    if set(value) != known:
        raise _Damaged(f"{name}: {', '.join(sorted(known))} were expected")
    for key, pair in value.items():
        good = isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) and pair[0] <= pair[1]
        if not good or (positive and not (pair[0] > 1e-100 and pair[1] < 1e100)):
            raise _Damaged(f"{name}: {key} must be [low, high]")
    return {key: [float(v) for v in pair] for key, pair in value.items()}


def _discrepancy(record) -> dict[str, float]:
    if not record.get("discrepancy"):
        return {}
    keys = {"k", "dof", "origin"}
    misfit = _numbers(record, "discrepancy", keys, keys, -1e3, 1e6)
    if not 0 <= misfit["k"] <= 1e3 or misfit["dof"] < 0:
        raise _Damaged("discrepancy: k and dof must be at least 0")
    return misfit


def _diagnostics(record) -> dict:
    value = _object(record, "diagnostics")
    for name in ("gradient_norm", "starts", "starts_agree", "condition_number"):
        _number(value, name)
    if not isinstance(value.get("converged"), bool):
        raise _Damaged("diagnostics: converged must be true or false")
    if value.get("second_best") is not None:
        _number(value, "second_best")
    bounds = value.get("at_bound", {})
    if isinstance(bounds, list):  # a fit saved without the cost of its bounds
        bounds = dict.fromkeys(_texts(value, "at_bound"), 0.0)
    elif not isinstance(bounds, dict) or not all(map(_is_number, bounds.values())):
        raise _Damaged("diagnostics: at_bound must hold numbers")
    second = value.get("second_best_params")
    if second is not None and not (isinstance(second, dict) and all(map(_is_number, second.values()))):
        raise _Damaged("diagnostics: second_best_params must hold numbers")
    return value | {"at_bound": bounds}


def _pairs(record, names: set) -> tuple[tuple[str, str], ...]:
    value = record.get("tied", [])
    good = isinstance(value, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(v, str) and v in names for v in p) for p in value
    )
    if not good:
        raise _Damaged("tied: pairs of parameters were expected")
    return tuple((a, b) for a, b in value)


def _columns(record, inputs) -> dict[str, str]:
    value = record.get("columns", {})
    if (
        not isinstance(value, dict)
        or not set(value) <= set(inputs)
        or not all(isinstance(v, str) for v in value.values())
    ):
        raise _Damaged("columns: the column of each input was expected")
    return value


def _weighting(record) -> dict:
    value = record.get("weighting", {})
    if not isinstance(value, dict) or set(value) not in (set(), {"weights"}, {"target", "kappa"}):
        raise _Damaged("weighting: weights, or target and kappa, were expected")
    if "weights" in value:
        weights = value["weights"]
        if not isinstance(weights, list) or not all(_is_number(w) and w >= 0 for w in weights):
            raise _Damaged("weighting: weights must be numbers of at least 0")
    elif value:
        _number(value, "target", 1e-300)
        _number(value, "kappa", 0)
    return value
