"""Frozen dataclasses of plain values, read and written by one walk over their fields. No JAX here.

JSON, dotted paths, options of the command line and columns of tables all follow from it, at any depth of nesting. The
annotations say what a field holds: bool, int, float, str, a dataclass, `tuple[X, ...]`, `dict[str, X]`, or any of them
`| None`. A field marked ADDED is younger than the format: while it equals its default it is absent.
"""

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from models.errors import InputError, did_you_mean

LARGEST = 2**63  # of whole numbers
SHOWN = 60  # characters of a wrong value that an error repeats


@functools.cache
def fields_of(kind: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The fields of a dataclass by name, each with its annotation resolved."""
    hints = typing.get_type_hints(kind)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(kind)}


@functools.cache
def absent_values(kind: type) -> list[tuple[str, Any]]:
    """The name of every field, with the value that it is left out at: its default if marked ADDED, else none."""
    never = object()
    return [(name, default_of(f) if "added" in f.metadata else never) for name, (f, _) in fields_of(kind).items()]


def to_plain(value: Any) -> Any:
    """Nested dicts and lists of plain values. A field marked ADDED, or a whole part, is left out while it equals its
    default."""
    if isinstance(value, (str, int, float)):  # most of them; asked first, as a large sweep asks a million times
        return value
    if dataclasses.is_dataclass(value):
        values = ((name, getattr(value, name), absent) for name, absent in absent_values(type(value)))
        return {name: to_plain(v) for name, v, absent in values if v != absent}
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return {k: to_plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def from_plain(kind: Any, value: Any, path: str = "") -> Any:
    """The inverse of `to_plain`: `value` as what the annotation `kind` says. Whole floats are taken for ints, and ints
    for floats.

    Raises InputError, naming the path, for a value of another type, a number that is not finite, a field that is not
    known, or one that is missing and not marked ADDED.
    """
    if is_union(kind):
        for option in typing.get_args(kind):
            with contextlib.suppress(InputError):
                return from_plain(option, value, path)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        fields, where = fields_of(kind), path or "the run"
        for name in value:
            if name not in fields:
                raise InputError(f"{where} has no field {shown(name)}{did_you_mean(str(name), fields)}")
        missing = [name for name, (f, _) in fields.items() if name not in value and "added" not in f.metadata]
        if missing:
            raise InputError(f"{where} lacks {', '.join(sorted(missing))}")
        return kind(**{name: from_plain(fields[name][1], v, joined(path, name)) for name, v in value.items()})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(from_plain(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {str(k): from_plain(inner[1], v, joined(path, str(k))) for k, v in value.items()}
    elif kind is int and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < LARGEST and int(value) == value:
            return int(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= 1.7e308 and math.isfinite(value):
            return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{path} = {shown(value)}: expected {named(kind)}")


@functools.cache
def leaves(kind: type, path: str = "") -> dict[str, Any]:
    """The dotted path of every field that is no dataclass itself, at any depth, with its annotation."""
    by_path: dict[str, Any] = {}
    for name, (_, inner) in fields_of(kind).items():
        part = part_of(inner)
        by_path |= leaves(part, joined(path, name)) if part else {joined(path, name): inner}
    return by_path


@functools.cache
def parts(kind: type, path: str = "") -> dict[str, type]:
    """The dotted path of every field that is a dataclass, at any depth, with its annotation."""
    by_path: dict[str, Any] = {}
    for name, (_, inner) in fields_of(kind).items():
        if part := part_of(inner):
            by_path |= {joined(path, name): inner} | parts(part, joined(path, name))
    return by_path


def part_of(kind: Any) -> type | None:
    """The dataclass that an annotation names, by itself or beside None."""
    options = typing.get_args(kind) if is_union(kind) else (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def value_at(value: Any, path: str) -> Any:
    """The field at a dotted path; None where it is of a part that is None."""
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` with dotted paths, all at once, so that only the whole has to fit. A part that is None is
    made from its defaults where a field of it is set.
    """
    grouped: dict[str, dict[str, Any]] = {}
    for path, new in changes.items():
        head, _, tail = path.partition(".")
        grouped.setdefault(head, {})[tail] = new
    plain = {}
    for head, inner in grouped.items():
        part = inner.pop("", None) if "" in inner else getattr(value, head)
        if inner:
            kind = part_of(fields_of(type(value))[head][1])
            part = replaced(part, inner) if part is not None else replaced(kind(), inner)
        plain[head] = part
    return dataclasses.replace(value, **plain)


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def named(kind: Any) -> str:
    """An annotation in words."""
    if is_union(kind):
        return " or ".join(map(named, typing.get_args(kind)))
    words = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false"}
    words |= {types.NoneType: "null", tuple: "a list", dict: "an object"}
    return words.get(typing.get_origin(kind) or kind) or f"an object ({kind.__name__})"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def default_of(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
