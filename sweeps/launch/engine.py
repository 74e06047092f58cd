"""What the engines for several machines share: the worker as a child process, and following a sweep to its end.

An engine queues, places and retries; which run is trained, each worker decides from the sweep's folder.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from scaling.hosts import end_with_parent
from scaling.run import read_json, read_result
from sweeps.launch.placement import Placement

STARTS = 3  # of a worker that dies at one place, before the place is given up
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


def standing(folder: Path) -> Standing:
    """Raises InputError where the folder is not that of a sweep."""
    ids = read_json(folder / "sweep.json")["runs"]
    statuses, failed = [], {}
    for run in ids:
        result = read_result(folder / "runs" / run)
        if result is not None:
            statuses.append(result["status"])
        elif (folder / "runs" / run / "failed.json").exists():
            with contextlib.suppress(InputError):  # it may be written or removed at this moment
                failed[run] = str(read_json(folder / "runs" / run / "failed.json").get("reason", "unknown"))
    return Standing(len(ids), statuses.count("finished"), statuses.count("diverged"), failed)


def worker_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "sweeps.launch.worker", str(folder.absolute())]


def workers_wanted(placement: Placement, runs_left: int) -> int:
    return min(placement.workers or MOST_WORKERS, runs_left)


def start_worker(command: Sequence[str]) -> subprocess.Popen:
    """The worker as a child that ends with this process, and whose only signal to save and leave is SIGTERM."""

    def prepare() -> None:
        end_with_parent()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's notice goes to all processes of a step

    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=prepare)


def has_ended(child: subprocess.Popen) -> bool:
    """As `child.poll()`, but safe in a signal handler that interrupted a poll of the same child: it takes no lock."""
    try:
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def end_worker(child: subprocess.Popen, seconds: float) -> None:
    """Asks a worker to save and leave, and ends it where it has not after that time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGTERM)
    end = time.monotonic() + seconds
    while not has_ended(child):
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            return
        time.sleep(0.1)


def follow(folder: Path, alive: Callable[[], int], show: Callable[[str], None], every: float = 5.0) -> Standing:
    """Tells how the sweep stands, at each change, until every run has ended or no worker is left; returns the end.

    alive(): the number of workers that wait or work.
    """
    told = None
    while True:
        workers = alive()  # asked first: what the last worker did before it left is then seen
        now = standing(folder)
        if now != told:
            show(f"{now} ({workers} workers)")
            for run in now.failed.keys() - (told.failed if told else {}).keys():
                show(f"run {run} failed: {now.failed[run]}")
            told = now
        if now.left == 0 or workers == 0:
            return now
        time.sleep(every)
