"""Runs a sweep on this machine: a pool of worker processes, pinned to cores or to one accelerator each.

The sweep's folder is the only state: sweep.json names the runs, plan.json says who branches from whom, runs/<id>/ holds
each, and a run is finished when its result.json is there. The workers take runs from it by themselves; the launcher
starts them, starts anew those that die, and prints how it goes. Launching again does what is missing. Killing anything
at any moment loses at most the work since the last checkpoint.
"""

import contextlib
import importlib.util
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import InputError
from scaling.execution import Execution
from scaling.exit_codes import PREEMPTED
from scaling.failure import Failure
from scaling.result import read_result
from scaling.trust import hooks
from sweeps.cost import remember_speed
from sweeps.define import Sweep
from sweeps.folder import Launches
from sweeps.launch.asking import NONE, Asking, Open
from sweeps.launch.engine import worker_command
from sweeps.launch.prepare import write_launch
from sweeps.launch.supervisor import GRACE_SECONDS, Start, Supervisor
from sweeps.plan import Unit


@dataclass
class State:
    """How a launch stands; handed to `show` at each change."""

    total_flops: float
    runs: int
    done_flops: float = 0.0  #: of finished runs, before this launch and in it
    began_flops: float = 0.0  #: of the runs finished before this launch
    finished: int = 0
    diverged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    partial_flops: dict[str, float] = field(default_factory=dict)  #: run id -> FLOPs done, of the runs under way
    seconds: float = 0.0
    evaluations: Open = NONE


def launch(
    sweep: Sweep,
    folder: Path,
    workers: int | None = None,
    execution: Execution | None = None,
    show: Callable[[State, str], None] = lambda state, line: None,
) -> State:
    """Trains what is missing of the prepared sweep in `folder`, as `run_pool` says."""
    units = write_launch(sweep, folder, execution or Execution())
    return run_pool(units, folder, worker_command(folder, hooks(sweep.runs)), workers, show)


def run_pool(
    units: dict[str, Unit],
    folder: Path,
    command: list[str],
    workers: int | None = None,
    show: Callable[[State, str], None] = lambda state, line: None,
    began: float | None = None,
) -> State:
    """Trains what is missing of the planned sweep in `folder`, and makes what is missing of its evaluations, by workers
    of this `command`.

    show(state, line): called at each event, with a line to print or "". `began`: time.monotonic() from which the launch
    is timed, by default now. On SIGTERM or Ctrl-C the workers save their state and SystemExit(75) is raised; a second
    launch continues.
    """
    tally = Tally(folder, units, show, time.monotonic() if began is None else began)
    state = tally.state
    tally.count_finished()
    state.began_flops = state.done_flops
    left = len(units) - len(tally.counted)
    if left + state.evaluations.left == 0:
        return state
    places = placements(workers, left + state.evaluations.left)
    tally.workers = len(places)
    (folder / "logs").mkdir(exist_ok=True)
    starts = [start_at(place, command, folder / "logs" / f"worker-{i}.log") for i, place in enumerate(places)]
    supervisor = Supervisor(folder, starts, tally.heard, tally.lost, tally.say)
    stopping = False

    def tick() -> None:
        nonlocal stopping
        if supervisor.asked is not None and not stopping:
            stopping = True
            tally.say("stopping: workers save their state; launch again to continue")
        if stopping and time.monotonic() - supervisor.asked > GRACE_SECONDS:
            supervisor.end(0)
        tally.say("")

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: supervisor.leave()))
        stack.callback(supervisor.end)
        supervisor.run(tick)
        if len(supervisor.stillborn) == len(places):
            raise InputError(supervisor.stillborn[-1])
        tally.log.write(time.monotonic() - tally.began)
        tally.count_finished()  # those that another launcher trained
        if stopping and (len(tally.counted) + len(state.failed) < state.runs or state.evaluations.left):
            raise SystemExit(PREEMPTED)
    return state


class Tally:
    """What a launch knows of its runs, event by event of its workers."""

    def __init__(self, folder: Path, units: dict[str, Unit], show: Callable[[State, str], None], began: float) -> None:
        self.folder, self.units, self.show, self.began = folder, units, show, began
        self.state = State(sum(unit.flops for unit in units.values()), len(units))
        self.counted: set[str] = set()  # runs that are over
        self.log = Launches(folder)
        self.asking = Asking(folder)
        self.workers = 1

    def say(self, line: str) -> None:
        self.state.seconds = time.monotonic() - self.began
        self.show(self.state, line)

    def count(self, run: str, status: str) -> None:
        if run not in self.counted:
            self.counted.add(run)
            self.state.failed.pop(run, None)  # another worker, or another launch, had more luck
            self.state.done_flops += self.units[run].flops
            self.state.finished += status == "finished"
            self.state.diverged += status != "finished"

    def count_finished(self) -> None:
        for run in self.units.keys() - self.counted:
            try:
                result = read_result(self.folder / "runs" / run)
            except InputError as error:
                self.state.failed[run] = str(error)
                continue
            if result is not None:
                self.count(run, result.status)
        self.state.evaluations = self.asking.standing()

    def heard(self, event: dict[str, Any]) -> None:
        """Takes in a worker's event, and shows it."""
        kind, run = event["event"], event.get("run")
        if kind in ("answered", "unanswered"):
            self.say(self.answered(event) if kind == "answered" else self.unanswered(event))
            return
        if run not in self.units:  # "ready", or of a run of another launch, which shows it
            return
        line = ""
        if kind == "note":
            line = f"run {run}: {event['text']}"
        elif kind == "progress":
            unit = self.units[run]
            share = (event["step"] - unit.at) / max(1, unit.config.steps - unit.at)
            self.state.partial_flops[run] = unit.flops * min(1.0, max(0.0, share))
        elif kind == "done":
            line = self.done(event)
        elif kind == "failed" and self.state.failed.get(run) != event["reason"]:  # each worker says so of a refused one
            line = self.failed(run, event["reason"], event["again"])
        self.say(line)

    def done(self, event: dict[str, Any]) -> str:
        config, timing, state = self.units[event["run"]].config, event["timing"], self.state
        state.partial_flops.pop(event["run"], None)
        self.count(event["run"], event["status"])
        self.log.write(time.monotonic() - self.began)
        if "seconds_per_step" in timing:
            remember_speed(config, timing["seconds_per_step"], event["device"], workers=self.workers)
        loss = "diverged" if event["loss"] is None else f"loss {event['loss']:.4f}"
        branch = f", from step {event['at']:,} of {config.steps:,}" if event["at"] else ""
        return (
            f"[{state.finished + state.diverged}/{state.runs}] N {config.counts.n_compute:,}  "
            f"D {config.trained_tokens:,}  {loss}  {timing['seconds']:.1f} s{branch}  ({config.run_id})"
        )

    def answered(self, event: dict[str, Any]) -> str:
        self.state.evaluations = now = self.asking.standing()
        return f"[{now.answered}/{now.wanted}] {event['evaluation']} of run {event['run']}  {event['seconds']:.1f} s"

    def unanswered(self, event: dict[str, Any]) -> str:
        self.state.evaluations = self.asking.standing()
        again = "; trying again" if event["again"] else ""
        return f"evaluation {event['evaluation']} of run {event['run']} failed: {event['reason']}{again}"

    def failed(self, run: str, reason: str, again: bool) -> str:
        self.state.partial_flops.pop(run, None)
        if again:
            return f"run {run} failed ({reason}); trying again"
        self.state.failed[run] = reason
        return f"run {run} failed: {reason} (log: {self.folder / 'logs'})"

    def lost(self, run: str, failure: Failure) -> None:
        """Of a run whose worker died."""
        if run in self.units:
            self.say(self.failed(run, failure.reason, not failure.final))


def start_at(place: dict[str, str], command: list[str], log: Path) -> Start:
    """A worker at a place, as `placements` gives it."""
    environment = {"CUDA_VISIBLE_DEVICES": place["gpu"]} if "gpu" in place else {}
    return Start(command + (["--cores", place["cores"]] if "cores" in place else []), log, environment)


def placements(workers: int | None, runs: int) -> list[dict[str, str]]:
    """What each worker runs on: {"cores": "0"}, {"gpu": "0"}, or {} for the whole machine (a TPU host).

    Raises InputError for a number of workers below 1, or above that of the accelerators.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    gpus, tpu = visible_gpus(), has_tpu()
    if workers is not None and (gpus or tpu) and workers > max(1, len(gpus)):
        raise InputError(f"--workers {workers}: one a GPU, or one a TPU host ({len(gpus) or 1} here)")
    if tpu:
        return [{}]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    wanted = workers or len(gpus) or len(cores)
    wanted = max(1, min(wanted, runs))
    if gpus:
        return [{"gpu": gpu} for gpu in gpus[:wanted]]
    # One core a worker, however few workers: two one-core processes beat one of two cores for small models, and results
    # do not depend on how many workers there are.
    return [{"cores": str(cores[i % len(cores)])} for i in range(wanted)]


def visible_gpus() -> list[str]:
    """The CUDA devices that JAX would use, without starting it: none without its CUDA plugin."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [gpu for gpu in named if gpu and gpu not in ("-1", "NoDevFiles")]
    return sorted(p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*"))


def has_tpu() -> bool:
    """Whether JAX would take this host's TPU."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or not importlib.util.find_spec("libtpu"):
        return False
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
