"""What the engines for several machines share: the worker as a child process, and following a sweep to its end.

An engine queues, places and retries; which run is trained, each worker decides from the sweep's folder.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from scaling.engine.hosts import end_with_parent
from scaling.exit_codes import BAD_INPUT, PREEMPTED
from scaling.folder import read_json
from scaling.result import read_result
from scaling.trust import check_run_id, open_log
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
    ids = [check_run_id(run, folder / "sweep.json") for run in read_json(folder / "sweep.json")["runs"]]
    statuses, failed = [], {}
    for run in ids:
        result = read_result(folder / "runs" / run)
        if result is not None:
            statuses.append(result.status)
        elif (folder / "runs" / run / "failed.json").exists():
            with contextlib.suppress(InputError):  # it may be written or removed at this moment
                failed[run] = str(read_json(folder / "runs" / run / "failed.json").get("reason", "unknown"))
    return Standing(len(ids), statuses.count("finished"), statuses.count("diverged"), failed)


def worker_command(folder: Path, hooks: Sequence[str] = ()) -> list[str]:
    """`hooks`: those of the definition; the worker trains no run of the folder that names another."""
    allowed = [word for hook in hooks for word in ("--allow-hook", hook)]
    return [sys.executable, "-m", "sweeps.launch.worker", str(folder.absolute()), *allowed]


def workers_wanted(placement: Placement, runs_left: int) -> int:
    return min(placement.workers or MOST_WORKERS, runs_left)


class Attended:
    """A worker as a child that ends with this process; it is started anew where it dies, and the run it died with
    counts that as an attempt, so that a run which kills its workers does not keep them from the others for ever.

    `log`: where its standard error goes, if not to this process's own.
    """

    def __init__(self, folder: Path, command: Sequence[str], log: Path | None = None) -> None:
        self.folder, self.command, self.log = folder, list(command), log
        self.asked = False  # to save and leave
        self.child: subprocess.Popen | None = None
        self.doing: dict[str, int] = {}  # the runs that the child trains, and the attempts before this one

    def work(self, starts: int = STARTS) -> int:
        """The exit code of the worker: 0 nothing is left to do, 75 it has left on request, 2 bad input, else it died
        `starts` times."""
        code = PREEMPTED
        for _ in range(starts):
            if self.asked:
                break
            self.child, self.doing = self.start(), {}
            reader = threading.Thread(target=self.read, args=(self.child,), daemon=True)
            reader.start()
            if self.asked:  # while it was started
                self.leave()
            while self.child.poll() is None:
                time.sleep(0.1)
            code = self.child.returncode
            reader.join(5)
            if code in (0, BAD_INPUT) or self.asked:
                break
            reason = f"its worker died with signal {-code}" if code < 0 else f"its worker died with exit code {code}"
            print(reason, flush=True)
            self.count_attempt(reason)
        return code if code >= 0 else 128 - code

    def leave(self) -> None:
        """Asks the worker to save and leave."""
        self.asked = True
        if self.child is not None:
            send(self.child, signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """Asks the worker to save and leave, and ends it where it has not after that time. For signal handlers too."""
        self.leave()
        end = time.monotonic() + seconds
        while self.child is not None and not has_ended(self.child):
            if time.monotonic() > end:
                send(self.child, signal.SIGKILL)
                break
            time.sleep(0.1)

    def start(self) -> subprocess.Popen:
        def prepare() -> None:
            end_with_parent()
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's notice may reach all processes of a step

        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(open_log(self.log, "ab")) if self.log else None
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
            return subprocess.Popen(self.command, text=True, preexec_fn=prepare, **pipes)

    def read(self, child: subprocess.Popen) -> None:
        with child.stdout:
            for line in child.stdout:
                event = {}
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                if event.get("event") == "begin":
                    self.doing[event["run"]] = event.get("attempts", 0)
                elif event.get("event") in ("done", "failed", "preempted"):
                    self.doing.pop(event["run"], None)
                if event.get("event") != "progress":  # that stands in the run's folder
                    print(line, end="", flush=True)

    def count_attempt(self, reason: str) -> None:
        if self.doing:
            from sweeps.launch.worker import Queue
            from sweeps.plan import read_plan

            with contextlib.suppress(InputError):  # a damaged plan: the next worker says so
                queue = Queue(self.folder, *read_plan(self.folder))
                for run, before in self.doing.items():
                    if run in queue.by_id:  # the newest plan may have dropped it
                        queue.failed(queue.by_id[run], reason, before + 1)


def send(child: subprocess.Popen, number: int) -> None:
    """As child.send_signal, but it takes no lock: a signal handler may have interrupted what holds it."""
    if not has_ended(child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)


def has_ended(child: subprocess.Popen) -> bool:
    """As `child.poll() is not None`, without a lock."""
    try:
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


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
