"""Where prepared data lives, and the lock that keeps two processes from preparing the same thing."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError


def cache_root(cache_dir: Path | None = None) -> Path:
    """`cache_dir`, else $SCALING_CACHE, else ~/.cache/scaling-laws. Nothing is created."""
    chosen = cache_dir or os.environ.get("SCALING_CACHE") or Path("~/.cache/scaling-laws")
    return Path(chosen).expanduser().absolute()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`, waiting for it. The kernel drops it when the process dies, however it dies.

    The lock file stays: to unlink it would let two processes hold locks on two files of the same name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"cache_dir: {str(path.parent)!r} cannot be written ({error.strerror}); "
            "set SCALING_CACHE to a folder that can"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
