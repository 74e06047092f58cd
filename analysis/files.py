"""Writes a file whole or not at all, and never through a link out of the folder that was named."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from analysis.errors import InputError


def inside(folder, *names: str) -> Path:
    """The path of a file below `folder`, to be written. Raises InputError where a link on the way leads out of it."""
    root = Path(os.path.realpath(folder))
    path = root.joinpath(*names)
    parent = Path(os.path.realpath(path.parent))
    if not parent.is_relative_to(root):
        raise InputError(f"{path.parent}: is a link out of {folder}, where nothing is written; remove the link")
    return path


def write_text(path, text: str) -> Path:
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content: bytes) -> Path:
    """Writes beside the target and moves it there: no reader sees half a file, and a link is replaced, not followed."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be written: {error.strerror}; choose another place with --out") from error
        raise
    return path
