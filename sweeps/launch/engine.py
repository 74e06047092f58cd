"""What the engines for several machines share: the worker's command, and following a sweep to its end.

An engine queues, places and retries; which run is trained, each worker decides from the sweep's folder.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from scaling.failure import read_failure
from scaling.result import read_result
from sweeps.folder import read_description
from sweeps.launch.placement import Placement

MOST_WORKERS = 8  # where the placement does not say how many


@dataclass(frozen=True)
class Standing:
    """How a sweep stands, by the folders of its runs."""

    runs: int
    finished: int
    diverged: int
    failed: dict[str, str]  #: run id -> reason, of runs without a result

    @property
    def left(self) -> int:
        return self.runs - self.finished - self.diverged

    def __str__(self) -> str:
        return f"{self.runs} runs: {self.finished} finished, {self.diverged} diverged, {self.left} left"


def standing(folder: Path, known: dict[str, str] | None = None) -> Standing:
    """How the sweep stands now. Raises InputError where the folder is not that of a sweep.

    known: run id -> status of runs that are over, which are not looked at again; what is found is added to it.
    """
    known = {} if known is None else known
    runs, failed = read_description(folder).runs, {}
    begun: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        begun.update(os.listdir(folder / "runs"))
    for run in runs:
        if run not in begun or run in known:
            continue
        try:
            if (result := read_result(folder / "runs" / run)) is not None:
                known[run] = result.status
            elif (failure := read_failure(folder / "runs" / run)) is not None:
                failed[run] = failure.reason
        except InputError as error:  # a damaged result
            failed[run] = str(error)
    count = Counter(known[run] for run in runs if run in known)
    return Standing(len(runs), count["finished"], count["diverged"], failed)


def worker_command(folder: Path, hooks: Sequence[str] = ()) -> list[str]:
    """`hooks`: those of the definition; the worker trains no run of the folder that names another."""
    allowed = [word for hook in hooks for word in ("--allow-hook", hook)]
    return [sys.executable, "-m", "sweeps.launch.worker", str(folder.absolute()), *allowed]


def workers_wanted(placement: Placement, runs_left: int) -> int:
    return min(placement.workers or MOST_WORKERS, runs_left)


def follow(folder: Path, alive: Callable[[], int], show: Callable[[str], None], every: float = 5.0) -> Standing:
    """Prints how the sweep stands, at each change, until every run has ended or no worker is left; returns the end.

    alive(): the number of workers that wait or work.
    """
    known: dict[str, str] = {}
    shown: Standing | None = None
    while True:
        workers = alive()  # asked first: what the last worker did before it left is then seen
        now = standing(folder, known)
        if now != shown:
            show(f"{now} ({workers} workers)")
            for run in now.failed.keys() - (shown.failed if shown else {}).keys():
                show(f"run {run} failed: {now.failed[run]}")
            shown = now
        if now.left == 0 or workers == 0:
            return now
        time.sleep(every)
