"""Workers as child processes, for every engine: started, listened to, started anew where they die, asked to leave.

A child ends with this process, even where that is killed. The run that a worker dies with counts that as an attempt, so
that a run which kills its workers does not keep them from the others for ever.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling.engine.hosts import ending_with
from scaling.engine.lease import holder
from scaling.exit_codes import BAD_INPUT, DONE, PREEMPTED
from scaling.failure import Failure
from scaling.trust import open_log
from sweeps.launch.attempts import ATTEMPTS, Attempts

GRACE_SECONDS = 60.0  # for workers to save and leave, before they are ended
TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Start:
    """How a worker is started. `log`: where its standard error goes, if not to this process's own."""

    command: Sequence[str]
    log: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  #: beside this process's own


@dataclass
class Child:
    """A worker that runs."""

    place: int
    process: subprocess.Popen
    began: bool = False  #: whether it has begun a run
    runs: dict[str, dict] = field(default_factory=dict)  #: that it trains now: the events with which it began them
    text: bytes = b""  #: of a line that is not whole yet


def show(line: str) -> None:
    print(line, flush=True)


def show_event(event: dict[str, Any]) -> None:
    if event["event"] != "progress":  # that stands in the run's folder
        show(json.dumps(event))


class Supervisor:
    """Workers of the sweep in `folder`, one for each of `starts`.

    heard(event): called with each line of a worker. lost(run, failure): with each run that a worker died with.
    note(line): what else is to be said. `again`: whether a worker that dies is started anew.
    """

    def __init__(
        self,
        folder: Path,
        starts: Sequence[Start],
        heard: Callable[[dict[str, Any]], None] = show_event,
        lost: Callable[[str, Failure], None] = lambda run, failure: show(f"run {run} failed: {failure.reason}"),
        note: Callable[[str], None] = show,
        again: bool = True,
    ) -> None:
        self.folder, self.starts = folder, list(starts)
        self.heard, self.lost, self.note, self.again = heard, lost, note, again
        self.asked: float | None = None  # when the workers were asked to save and leave
        self.children: dict[int, Child] = {}  # by place
        self.in_vain = [0] * len(self.starts)  # starts of each place in a row that began no run
        self.codes: list[int] = []  # with which workers ended that are not started anew
        self.stillborn: list[str] = []  # why workers that never began a run are not started anew

    def run(self, tick: Callable[[], None] = lambda: None) -> int:
        """The highest exit code of the workers, once all have ended: 0 nothing is left to do, 75 left on request, 2 bad
        input, else one died, `ATTEMPTS` times in a row without beginning a run.

        tick() is called every now and then.
        """
        with selectors.DefaultSelector() as self.selector:
            for place in range(len(self.starts)):
                self.start(place)
            while self.children:
                for key, _ in self.selector.select(TICK_SECONDS):
                    self.listen(self.children[key.data])
                for child in list(self.children.values()):
                    if child.process.poll() is not None:
                        self.listen(child, to_end=True)
                        self.ended(child)
                tick()
        return max(self.codes, default=PREEMPTED)

    def leave(self) -> None:
        """Asks the workers to save and leave. For signal handlers too."""
        if self.asked is None:
            self.asked = time.monotonic()
        for child in list(self.children.values()):
            send(child.process, signal.SIGTERM)

    def end(self, seconds: float = GRACE_SECONDS) -> None:
        """Asks the workers to save and leave, and ends those that have not after that time. For signal handlers too."""
        self.leave()
        children = [child.process for child in self.children.values()]
        end = time.monotonic() + seconds
        while not all(map(has_ended, children)) and time.monotonic() < end:
            time.sleep(0.1)
        for child in children:
            send(child, signal.SIGKILL)

    def start(self, place: int) -> None:
        if self.asked is not None:
            return
        start = self.starts[place]
        self.in_vain[place] += 1
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(open_log(start.log, "ab")) if start.log else None
            process = subprocess.Popen(
                ending_with(os.getpid(), start.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **start.environment},
                bufsize=0,
            )
        os.set_blocking(process.stdout.fileno(), False)
        self.children[place] = Child(place, process)
        self.selector.register(process.stdout, selectors.EVENT_READ, place)
        if self.asked is not None:  # while it was started
            send(process, signal.SIGTERM)

    def listen(self, child: Child, to_end: bool = False) -> None:
        """Reads what a worker has written since."""
        while True:
            try:
                chunk = os.read(child.process.stdout.fileno(), 65536)
            except BlockingIOError:
                return
            if not chunk and not to_end:  # it has closed its output; its end is seen by itself
                with contextlib.suppress(KeyError):
                    self.selector.unregister(child.process.stdout)
            if not chunk:
                return
            *lines, child.text = (child.text + chunk).split(b"\n")
            for line in lines:
                self.handle(child, line)
            if not to_end:
                return

    def handle(self, child: Child, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind, run = event["event"], event.get("run")
        except (ValueError, TypeError, KeyError, RecursionError):  # a library that writes where the worker does
            return self.note(line.decode(errors="replace"))
        if kind == "begin":
            child.began, child.runs[run] = True, event
            self.in_vain[child.place] = 0
        elif kind in ("done", "failed", "preempted"):
            child.runs.pop(run, None)
        self.heard(event)

    def ended(self, child: Child) -> None:
        """Takes leave of a worker that has ended; where it died, counts that and starts another."""
        with contextlib.suppress(KeyError):
            self.selector.unregister(child.process.stdout)
        child.process.stdout.close()
        del self.children[child.place]
        code = child.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code not in (DONE, BAD_INPUT) and self.asked is None:
            for run, began in child.runs.items():
                if holder(self.folder / "runs" / run):  # another worker has taken it over and counts its own attempt
                    continue
                attempts = Attempts(self.folder / "runs", began["launch"])
                self.lost(run, attempts.add(run, f"its worker died with {how}", began["attempts"]))
            if self.again and self.in_vain[child.place] < ATTEMPTS:
                return self.start(child.place)
        if code and self.asked is None and not child.began:
            log = self.starts[child.place].log
            self.stillborn.append(f"workers end before they can begin ({how})" + (f"; see {log}" if log else ""))
            self.note(self.stillborn[-1])
        self.codes.append(code if code >= 0 else 128 - code)


def send(process: subprocess.Popen, number: int) -> None:
    """As process.send_signal, but it takes no lock: a signal handler may have interrupted what holds it."""
    if not has_ended(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def has_ended(process: subprocess.Popen) -> bool:
    """As `process.poll() is not None`, without a lock."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
