"""The files of a sweep's folder: sweep.json, execution.json and launches.json, each read and checked here alone."""

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import InputError
from scaling.config import RunConfig, canonical_json
from scaling.execution import Execution
from scaling.folder import read_json, set_aside, write_atomically
from scaling.trust import check_run_id

AGAIN = "launch the sweep again, which writes it anew"


@dataclass(frozen=True)
class Description:
    """What sweep.json says of a sweep."""

    name: str
    runs: tuple[str, ...]  #: their ids
    holdout: str | None = None
    law: str = "auto"
    definition: dict[str, str] | None = None  #: name and digest of the file that defines it


def write_description(folder: Path, description: Description) -> None:
    write_atomically(folder / "sweep.json", json.dumps(dataclasses.asdict(description), indent=1) + "\n")


def read_description(folder: Path) -> Description:
    """Raises InputError where sweep.json is not there or not whole."""
    path = folder / "sweep.json"
    fields = read_json(path)
    runs, name = fields.get("runs"), fields.get("name", folder.name)
    holdout, law = fields.get("holdout"), fields.get("law", "auto")
    if not isinstance(runs, list):
        raise InputError(f"{path}: has no list of runs; {AGAIN}")
    for name_, value in {"name": name, "law": law, "holdout": "" if holdout is None else holdout}.items():
        if not isinstance(value, str):
            raise InputError(f"{path}: {name_} = {value!r}, expected text; {AGAIN}")
    return Description(name, tuple(check_run_id(run, path) for run in runs), holdout, law)


def is_sweep(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("sweep.json", "plan.json"))


def named_runs(folder: Path) -> set[str]:
    """The ids of the runs that the sweep in `folder` has so far; none where there is no sweep, or a damaged one."""
    with contextlib.suppress(InputError):
        return set(read_description(folder).runs)
    return set()


def write_execution(folder: Path, execution: Execution) -> None:
    write_atomically(folder / "execution.json", json.dumps(dataclasses.asdict(execution)) + "\n")


def read_execution(folder: Path) -> Execution:
    """Raises InputError where execution.json is not there or not whole."""
    path = folder / "execution.json"
    fields = read_json(path)
    defaults = dataclasses.asdict(Execution())
    for name, value in fields.items():
        kind = type(defaults.get(name))
        fits = isinstance(value, kind) or (kind is float and type(value) is int)
        if name not in defaults or not fits or (kind is not bool and isinstance(value, bool)):
            raise InputError(f"{path}: {name} = {value!r} is not what this version reads; {AGAIN}")
    try:
        return Execution(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}; {AGAIN}") from None


def lacks_config(run: Path) -> bool:
    """Whether config.json is not in a run's folder, or cannot be read."""
    try:
        read_json(run / "config.json")
    except InputError:
        return True
    return False


def restore_config(run: Path, config: RunConfig) -> None:
    """Writes config.json anew where it is lost: the folder's name is the run's id, which no other configuration has."""
    if lacks_config(run):
        set_aside(run / "config.json")
        write_atomically(run / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")


@dataclass
class Launches:
    """launches.json: the wall-clock seconds of each launch, so that a report can add them up. Of no weight: what cannot
    be read or written is left out.
    """

    folder: Path
    earlier: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.earlier = seconds_of_launches(self.folder)

    def write(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            text = canonical_json({"seconds": [*self.earlier, round(seconds, 3)]})
            write_atomically(self.folder / "launches.json", text)


def seconds_of_launches(folder: Path) -> list[float]:
    """What is kept of the launches of a sweep, in a file that may be missing or damaged."""
    with contextlib.suppress(InputError):
        seconds = read_json(folder / "launches.json").get("seconds")
        if isinstance(seconds, list):
            return [s for s in seconds if type(s) in (int, float) and 0 <= s < math.inf]
    return []
