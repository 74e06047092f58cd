"""failed.json in a run's folder: why its last attempt failed, and how many there were. No JAX here."""

import os
from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from scaling.config import canonical_json
from scaling.folder import read_json, set_aside, write_atomically


@dataclass(frozen=True)
class Failure:
    reason: str
    attempts: int = 1
    launch: str = ""  #: the launch that counts these attempts
    final: bool = False  #: that launch does not try the run again


def read_failure(folder: Path) -> Failure | None:
    """The last failure of the run in `folder`; None without one. A damaged file is a failure of no attempts."""
    path = folder / "failed.json"
    try:
        fields = read_json(path)
    except InputError:
        if not os.path.lexists(path):
            return None
        fields = {}
    reason, attempts, launch = fields.get("reason"), fields.get("attempts", 0), fields.get("launch", "")
    return Failure(
        reason if isinstance(reason, str) and reason else "its failed.json is damaged; launch again",
        attempts if type(attempts) is int and attempts > 0 else 0,
        launch if isinstance(launch, str) else "",
        fields.get("final") is True,
    )


def write_failure(folder: Path, failure: Failure) -> None:
    record = {"reason": failure.reason, "attempts": failure.attempts, "launch": failure.launch, "final": failure.final}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "failed.json").is_dir():
        set_aside(folder / "failed.json")
    write_atomically(folder / "failed.json", canonical_json(record))
