"""A folder from someone else is not trusted: ids are checked, links do not lead out, nothing that it names is run."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO

from models.errors import InputError
from scaling.config import RUN_ID, RunConfig


def check_run_id(run: object, path: Path | str) -> str:
    """`run`, which `path` names. Raises InputError where it is no id: it becomes part of a path."""
    if not isinstance(run, str) or not RUN_ID.fullmatch(run):
        raise InputError(f"{path}: {run!r} is no run id (12 hex digits); launch the sweep again")
    return run


def check_links(folder: Path) -> None:
    """Raises InputError where an entry of `folder` is a link out of it: what is written there would land elsewhere.

    A link that leads nowhere is left alone.
    """
    if not folder.is_dir():
        return
    home = folder.resolve()
    with os.scandir(folder) as entries:
        links = [entry.path for entry in entries if entry.is_symlink()]
    for path in links:
        if os.path.exists(path) and not Path(path).resolve().is_relative_to(home):
            raise InputError(f"{path}: a link out of {folder}, so nothing is written there; remove it")


def check_no_link_out(folder: Path) -> None:
    """Raises InputError where a link anywhere in `folder` leads out of it: what is read there would be another's."""
    home = folder.resolve()
    for at, folders, files in os.walk(home):
        for path in (Path(at, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise InputError(f"{path}: a link out of {folder}, so it is not read; remove it")


def check_sweep_links(folder: Path) -> None:
    """`check_links` for the folder of a sweep, its runs/ and its logs, of which `scaling status` shows the ends."""
    for part in ("", "runs", "logs", "logs/slurm"):
        check_links(folder / part)


def open_log(path: Path, mode: str) -> IO:
    """`open` for writing a log, which follows no link: a log in a folder from elsewhere may lead to any file."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def hooks(configs: Iterable[RunConfig]) -> tuple[str, ...]:
    """The hooks module:function that these configurations name."""
    return tuple(sorted({config.optim.name for config in configs if ":" in config.optim.name}))


def check_hook(config: RunConfig, allowed: Collection[str]) -> None:
    """Raises InputError where a configuration that was read from a folder names a hook that is not `allowed`.

    Training imports and calls it. Allowed are those of the definition that the user launched.
    """
    for name in hooks([config]):
        if name not in allowed:
            raise InputError(
                f"optim.name = {name!r}: run {config.run_id} of this folder would import and call it; "
                f"allow that with --allow-hook {name}"
            )
