"""The files of a run's folder: written whole, read with a remedy where they are damaged. No JAX here."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from models.errors import InputError
from scaling.config import RunConfig

# What costs least where a file of a run or a sweep is damaged.
REMEDIES = {
    "result.json": "remove it and launch again",
    "slurm.json": "remove it",
    "coordinates.json": "remove it",
} | dict.fromkeys(("sweep.json", "plan.json", "execution.json"), "launch the sweep again, which writes it anew")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `path` whole or not at all: a temporary file in the same folder, flushed to disk, then renamed.

    Where `path` is a link, the link is replaced and what it leads to is left alone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk is reported without a name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path, folder: Path | None = None) -> None:
    """Renames what is damaged, where it is there, to damaged-NAME-... beside it, or in `folder`: a name that nothing
    has yet.
    """
    if os.path.lexists(path):
        path.rename((folder or path.parent) / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises InputError, with the remedy, where it is not whole."""
    remedy = REMEDIES.get(path.name, "move the folder away and launch again")
    try:
        with open(path, opener=without_waiting) as file:
            value = json.load(file)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; {remedy}")
    return value


def without_waiting(path: str, flags: int) -> int:
    """Opens a file; of a named pipe, which nobody may ever write to, it reads nothing."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run's folder. Raises InputError, naming the folder, where it is not whole."""
    try:
        return RunConfig.from_dict(read_json(folder / "config.json"))
    except InputError as error:
        raise InputError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def check_run_folder(folder: Path, config: RunConfig) -> None:
    """Raises InputError where `folder` holds another run, or something that is no run. Makes nothing."""
    path = folder / "config.json"
    if path.exists():
        there = read_config(folder)
        if there != config:
            raise InputError(f"{folder}: holds another run ({there.run_id}, not {config.run_id}); choose another --out")
    elif folder.exists() and not holds_only(folder, "lock", "failed.json", "config.json"):
        raise InputError(f"{folder}: not empty and without a config.json, so not a run; choose another --out")


def holds_only(folder: Path, *names: str) -> bool:
    """Whether nothing lies in `folder` but these, leases, the logs of hosts, and what a killed writer left."""
    others = ("*.tmp", "host-*.log", "lease-*", "damaged-*")
    return all(p.name in names or any(p.match(other) for other in others) for p in folder.iterdir())


def open_run(folder: Path, config: RunConfig) -> None:
    """Writes config.json where it is not there yet, and clears what killed writers left. The caller holds the lease."""
    check_run_folder(folder, config)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if not (folder / "config.json").exists():
        write_atomically(folder / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
