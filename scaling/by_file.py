"""What there is one file of a kind for, found by the file's name: objectives, evaluations. No JAX here.

`scaling/objectives/answers_only.py` defines the class `AnswersOnly`, and the name "answers_only" chooses it. The fields
of the class, a frozen dataclass, are its options.
"""

import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any

from models.errors import InputError, did_you_mean
from scaling.fields import fields_of, from_plain


@functools.cache
def names(package: str) -> tuple[str, ...]:
    """The files of a package that define one, without those whose name begins with an underscore."""
    folder = Path(importlib.import_module(package).__file__).parent
    return tuple(sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")))


def check_name(package: str, name: str, field: str) -> None:
    """Raises InputError, naming the field, where there is no file of this name."""
    known = names(package)
    if name not in known:
        raise InputError(f"{field}.name = {name!r}: expected one of {', '.join(known)}{did_you_mean(str(name), known)}")


def class_of(package: str, name: str, field: str) -> type:
    check_name(package, name, field)
    return getattr(importlib.import_module(f"{package}.{name}"), name.title().replace("_", ""))


def made(package: str, name: str, options: str, field: str) -> Any:
    """The instance of a name, with options as a JSON object. Raises InputError for a misspelt one."""
    kind = class_of(package, name, field)
    try:
        values = json.loads(options or "{}")
    except ValueError:
        values = None
    known = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(values, dict):
        raise InputError(f"{field}.options = {options!r}: expected a JSON object of {', '.join(known) or 'nothing'}")
    for option in values:
        if option not in known:
            expected = ", ".join(known) or "no options"
            raise InputError(
                f"{field}.options: {name} has no {option!r}, expected {expected}{did_you_mean(option, known)}"
            )
    typed = {
        option: from_plain(fields_of(kind)[option][1], v, f"{field}.options {option}") for option, v in values.items()
    }
    return kind(**typed)
