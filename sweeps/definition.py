"""Definitions by name or as a file of one's own: sweeps of sweeps/library, studies of sweeps/studies. No JAX here."""

import contextlib
import importlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from models.errors import InputError, did_you_mean

T = TypeVar("T")


def defined(kind: str, package: str, name: str, of: type[T], make: Callable[[ModuleType], Any]) -> tuple[str, Path, T]:
    """(short name, file, what it defines) of a named definition of `package`, or of a file NAME.py.

    kind: "sweep" or "study", also the name of the function that the file must have; make(module) calls it, and must
    return an `of`. Raises InputError for an unknown name (with the nearest), a file without the function, or one that
    fails.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"{kind} file {name!r}: not found")
        spec = importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        short, execute = path.stem, lambda: spec.loader.exec_module(module)
    else:
        known = names_in(package)
        if name not in known:
            hint, names = did_you_mean(name, known), ", ".join(known)
            there = f"there are {names}, or give a FILE.py" if known else "give a FILE.py"
            raise InputError(f"{kind} {name!r}: no such {kind}{hint} ({there})")
        module, short, execute = importlib.import_module(f"{package}.{name}"), name, lambda: None
    search = list(sys.path)
    sys.path.insert(0, str(Path(name).resolve().parent))  # its neighbours can be imported, as by a script
    with interrupts() as interrupt:
        try:
            execute()
            if not callable(getattr(module, kind, None)):
                raise InputError(f"{kind} file {name!r}: defines no function {kind}() that returns a {of.__name__}")
            made = make(module)
        except InputError as error:
            raise InputError(f"{name}: {error}" if name not in str(error) else str(error)) from None
        except BaseException as error:  # SystemExit and the like too: it is the definition's mistake
            if interrupt:
                raise
            raise InputError(f"{kind} file {name!r}: failed with {type(error).__name__}: {error}") from None
        finally:
            sys.path[:] = search
    if not isinstance(made, of):
        raise InputError(f"{kind} file {name!r}: {kind}() returned {type(made).__name__}, expected a {of.__name__}")
    return short, Path(module.__file__), made


def names_in(package: str) -> list[str]:
    """The names of the definitions in a package of ours; a file whose name begins with an underscore is none."""
    folder = Path(importlib.import_module(package).__file__).parent
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, which raises KeyboardInterrupt as ever: code within may raise that too."""
    seen: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield seen
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
