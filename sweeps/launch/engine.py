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
from sweeps.launch.asking import NONE, Asking, Open
from sweeps.launch.placement import Placement

MOST_WORKERS = 8  # where the placement does not say how many


@dataclass(frozen=True)
class Standing:
    """How a sweep stands, by the folders of its runs."""

    runs: int
    finished: int
    diverged: int
    failed: dict[str, str]  #: run id -> reason, of runs without a result
    evaluations: Open = NONE  #: of the finished runs

    @property
    def left(self) -> int:
        """Runs to train and evaluations to make."""
        return self.runs - self.finished - self.diverged + self.evaluations.left

    def __str__(self) -> str:
        left = self.left - self.evaluations.left
        runs = f"{self.runs} runs: {self.finished} finished, {self.diverged} diverged, {left} left"
        if not self.evaluations.wanted:
            return runs
        failed = f", {len(self.evaluations.failed)} failed" if self.evaluations.failed else ""
        return f"{runs}; {self.evaluations.answered} of {self.evaluations.wanted} evaluations{failed}"


def standing(folder: Path, known: dict[str, str] | None = None, asking: Asking | None = None) -> Standing:
    """How the sweep stands now. Raises InputError where the folder is not that of a sweep.

    known: run id -> status of runs that are over, which are not looked at again; what is found is added to it. asking:
    likewise, of evaluations.
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
    return Standing(len(runs), count["finished"], count["diverged"], failed, (asking or Asking(folder)).standing())


def worker_command(folder: Path, hooks: Sequence[str] = (), training: bool = True) -> list[str]:
    """`hooks`: those of the definition; the worker trains no run of the folder that names another. `training`: else it
    only asks what is finished.
    """
    allowed = [word for hook in hooks for word in ("--allow-hook", hook)]
    only = [] if training else ["--only-evaluate"]
    return [sys.executable, "-m", "sweeps.launch.worker", str(folder.absolute()), *allowed, *only]


def workers_wanted(placement: Placement, runs_left: int) -> int:
    return min(placement.workers or MOST_WORKERS, runs_left)


def follow(folder: Path, alive: Callable[[], int], show: Callable[[str], None], every: float = 5.0) -> Standing:
    """Prints how the sweep stands, at each change, until every run has ended or no worker is left; returns the end.

    alive(): the number of workers that wait or work.
    """
    known: dict[str, str] = {}
    asking = Asking(folder)
    shown: Standing | None = None
    while True:
        workers = alive()  # asked first: what the last worker did before it left is then seen
        now = standing(folder, known, asking)
        if now != shown:
            show(f"{now} ({workers} workers)")
            for run in now.failed.keys() - (shown.failed if shown else {}).keys():
                show(f"run {run} failed: {now.failed[run]}")
            for pair in now.evaluations.failed.keys() - (shown.evaluations.failed if shown else {}).keys():
                show(f"evaluation {pair[1]} of run {pair[0]} failed: {now.evaluations.failed[pair]}")
            shown = now
        if now.left == 0 or workers == 0:
            return now
        time.sleep(every)
