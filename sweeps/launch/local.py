"""Runs a sweep on this machine: a pool of worker processes, pinned to cores or to one accelerator each.

The sweep's folder is the only state: sweep.json names the runs, plan.json says who branches from whom, runs/<id>/ holds
each, and a run is finished when its result.json is there. The workers take runs from it by themselves; the launcher
starts them, starts anew those that die, and tells how it goes. Launching again does what is missing. Killing anything
at any moment loses at most the work since the last checkpoint.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis.errors import InputError as AnalysisInputError
from models.errors import InputError
from scaling.config import canonical_json, check_fits
from scaling.data.store import open_store
from scaling.execution import Execution
from scaling.exit_codes import PREEMPTED
from scaling.folder import check_run_folder, holds_only, read_json, write_atomically
from scaling.result import read_result
from scaling.trust import check_sweep_links, hooks, open_log
from sweeps.cost import remember_speed
from sweeps.define import Sweep, keep_definition
from sweeps.launch.engine import worker_command
from sweeps.launch.worker import ATTEMPTS, Queue
from sweeps.plan import Unit, plan_in, read_plan, write_plan
from sweeps.table import planned_row

GRACE_SECONDS = 60.0  # for workers to save and leave, before they are ended


@dataclass
class Worker:
    process: subprocess.Popen
    place: int
    jobs: dict[str, Unit] = field(default_factory=dict)  #: by run id; several are a swarm
    buffer: bytes = b""


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


def prepare(name: str, sweep: Sweep, folder: Path) -> None:
    """Checks the sweep, then writes sweep.json. Raises InputError before anything is made."""
    of_a_sweep = any((folder / name).exists() for name in ("sweep.json", "plan.json"))
    if folder.exists() and not of_a_sweep and not holds_only(folder):
        raise InputError(f"--out {folder}: not empty and not the folder of a sweep; choose another")
    check_sweep_links(folder)
    corpora = check(sweep)
    for config in sweep.runs:
        run = folder / "runs" / config.run_id
        result = read_result(run)
        if result is not None:
            check_run_folder(run, config)
        if result is not None and result.corpus != corpora[config.run_id]:
            raise InputError(f"{run}: was trained on another version of {config.data.source!r}; move it away")
    description = {
        "name": name,
        "holdout": sweep.holdout,
        "law": sweep.law,
        "runs": [config.run_id for config in sweep.runs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    description |= keep_definition(sweep, folder)
    write_atomically(folder / "sweep.json", json.dumps(description, indent=1) + "\n")
    (folder / "runs").mkdir(exist_ok=True)


def named_runs(folder: Path) -> set[str]:
    """The ids of the runs that the sweep in `folder` has so far; none where there is no sweep, or a damaged one."""
    with contextlib.suppress(InputError):
        runs = read_json(folder / "sweep.json").get("runs")
        return {str(run) for run in runs} if isinstance(runs, list) else set()
    return set()


def check(sweep: Sweep) -> dict[str, str]:
    """The key of each run's corpus, by run id. Raises InputError where a run, the hold-out or the law cannot work."""
    from analysis.laws.forms import law_named
    from analysis.runs import read_runs

    stores = {}
    corpora = {}
    for config in sweep.runs:
        key = (config.data.source, config.data.tokenizer, config.data.valid_fraction)
        if key not in stores:
            stores[key] = open_store(key[0], key[1], valid_fraction=key[2])
        check_fits(config, stores[key])
        corpora[config.run_id] = stores[key].key
    if sweep.law != "auto":
        law_named(sweep.law)
    if sweep.holdout is not None:
        planned = pd.DataFrame([planned_row(config) for config in sweep.runs])
        try:
            read_runs(planned.assign(status="finished", loss=1.0), holdout=sweep.holdout)
        except AnalysisInputError as error:  # which knows it as an option
            raise InputError(str(error).replace("--holdout", "holdout")) from None
    return corpora


def launch(
    sweep: Sweep,
    folder: Path,
    workers: int | None = None,
    execution: Execution | None = None,
    show: Callable[[State, str], None] = lambda state, line: None,
    began: float | None = None,
    sharing: bool = True,
) -> State:
    """Trains what is missing of the sweep in `folder` (see `prepare`), the dearest runs first.

    show(state, line): called at each event, with a line to print or "". `began`: time.monotonic() from which the launch
    is timed, by default now. On SIGTERM or Ctrl-C the workers save their state and SystemExit(75) is raised; a second
    launch continues.
    """
    started = time.monotonic() if began is None else began
    units = write_launch(sweep, folder, execution or Execution(), sharing)
    queue, allowed = Queue(folder, *read_plan(folder)), hooks(sweep.runs)
    state = State(sum(u.flops for u in units.values()), len(units))
    counted: set[str] = set()

    def count(unit: Unit, status: str) -> None:
        if unit.run_id not in counted:
            counted.add(unit.run_id)
            state.failed.pop(unit.run_id, None)  # another worker, or another launch, had more luck
            state.done_flops += unit.flops
            state.finished += status == "finished"
            state.diverged += status != "finished"

    def count_finished() -> None:
        for unit in units.values():
            if unit.run_id not in counted and (result := read_result(queue.run(unit.run_id))) is not None:
                count(unit, result.status)

    count_finished()
    state.began_flops = state.done_flops
    if len(counted) == len(units):
        return state
    places = placements(workers, len(units) - len(counted))
    lost: dict[str, int] = {}  # workers that died with a run
    stillborn = dict.fromkeys(range(len(places)), 0)  # starts of each worker in a row that never began a run
    pool: dict[int, Worker] = {}
    log = Launches(folder / "launches.json")
    (folder / "logs").mkdir(exist_ok=True)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        selector = stack.enter_context(selectors.DefaultSelector())
        stack.callback(end_all, pool)

        def start(place: int) -> None:
            stillborn[place] += 1
            pool[place] = Worker(
                start_worker(folder, places[place], folder / "logs" / f"worker-{place}.log", allowed), place
            )
            selector.register(pool[place].process.stdout, selectors.EVENT_READ, place)

        def failed(unit: Unit, reason: str, again: bool) -> str:
            state.partial_flops.pop(unit.run_id, None)
            if again or unit.run_id not in units:
                return f"run {unit.run_id} failed ({reason}); trying again" if again else ""
            state.failed[unit.run_id] = reason
            return f"run {unit.run_id} failed: {reason} (log: {folder / 'logs'})"

        def died(unit: Unit, code: int) -> str:
            """What to tell of a worker that ended within a run, which is tried again, but not for ever."""
            lost[unit.run_id] = lost.get(unit.run_id, 0) + 1
            queue.refresh()  # failures are counted by the latest launch
            attempts = max(lost[unit.run_id], queue.attempts(unit) + 1)
            reason = "its worker died with " + (f"signal {-code}" if code < 0 else f"exit code {code}")
            queue.failed(unit, reason, attempts)
            return failed(unit, reason, attempts < ATTEMPTS)

        def handle(worker: Worker, event: dict) -> str:
            kind, run = event["event"], event.get("run")
            if run is not None and run not in units:
                queue.refresh()
                if run not in queue.by_id:
                    return ""
            unit = units.get(run) or queue.by_id.get(run)
            if kind == "begin":
                stillborn[worker.place] = 0
                worker.jobs[unit.run_id] = unit
            elif kind in ("done", "failed", "preempted"):
                worker.jobs.pop(run, None)
            if run is not None and run not in units:  # of another launch, which tells of it
                return ""
            if kind == "note":
                return f"run {event['run']}: {event['text']}"
            elif kind == "progress":
                done = (event["step"] - unit.at) / max(1, unit.config.steps - unit.at)
                state.partial_flops[event["run"]] = unit.flops * min(1.0, max(0.0, done))
            elif kind == "done":
                state.partial_flops.pop(unit.run_id, None)
                count(unit, event["status"])
                log.write(time.monotonic() - started)
                timing, config = event["timing"], unit.config
                if "seconds_per_step" in timing:
                    remember_speed(config, timing["seconds_per_step"], event["device"], workers=len(places))
                loss = "diverged" if event["loss"] is None else f"loss {event['loss']:.4f}"
                n, D = config.counts.n_compute, config.trained_tokens
                done = state.finished + state.diverged
                branch = f", from step {event['at']:,} of {config.steps:,}" if event["at"] else ""
                seconds = f"{timing['seconds']:.1f} s{branch}"
                return f"[{done}/{state.runs}] N {n:,}  D {D:,}  {loss}  {seconds}  ({config.run_id})"
            elif kind == "failed" and state.failed.get(run) != event["reason"]:  # each worker says so of a refused one
                return failed(unit, event["reason"], event["again"])
            return ""

        for place in range(len(places)):
            start(place)
        told_stop = None
        while pool:
            for key, _ in selector.select(timeout=0.5):
                worker = pool[key.data]
                chunk = os.read(worker.process.stdout.fileno(), 65536)
                worker.buffer += chunk
                *lines, worker.buffer = worker.buffer.split(b"\n")
                for line in lines:
                    state.seconds = time.monotonic() - started
                    show(state, handle(worker, json.loads(line)))
                if not chunk:
                    selector.unregister(worker.process.stdout)
                    code = worker.process.wait()
                    worker.process.stdout.close()
                    del pool[key.data]
                    for unit in worker.jobs.values() if code != 0 and not stopping else ():
                        show(state, died(unit, code))
                    if code != 0 and not stopping and stillborn[key.data] < ATTEMPTS:
                        start(key.data)
                    elif code != 0 and not stopping:
                        log_file = folder / "logs" / f"worker-{key.data}.log"
                        said = f"workers end before they can begin (exit code {code}); see {log_file}"
                        if not pool:
                            raise InputError(said)
                        show(state, said)
            state.seconds = time.monotonic() - started
            show(state, "")
            if stopping and told_stop is None:
                told_stop = time.monotonic()
                show(state, "stopping: workers save their state; launch again to continue")
                for worker in pool.values():
                    worker.process.terminate()
            if told_stop is not None and time.monotonic() - told_stop > GRACE_SECONDS:
                for worker in pool.values():
                    worker.process.kill()
                break
        log.write(time.monotonic() - started)
        count_finished()  # those that another launcher trained
        if stopping and len(counted) + len(state.failed) < state.runs:
            raise SystemExit(PREEMPTED)
    return state


def write_launch(sweep: Sweep, folder: Path, execution: Execution, sharing: bool = True) -> dict[str, Unit]:
    """Writes what workers read, plan.json and execution.json; the units by run id, in the order of the sweep."""
    units = plan_in(folder, sweep.runs, sharing)
    write_atomically(folder / "execution.json", json.dumps(dataclasses.asdict(execution)) + "\n")
    write_plan(folder, units, uuid.uuid4().hex[:12])
    return {unit.run_id: unit for unit in units}


@dataclass
class Launches:
    """launches.json: the wall-clock seconds of each launch, so that a report can add them up. Of no weight: what cannot
    be read or written is left out.
    """

    path: Path
    earlier: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.earlier = seconds_of(self.path)

    def write(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            write_atomically(self.path, canonical_json({"seconds": [*self.earlier, round(seconds, 3)]}))


def seconds_of(launches: Path) -> list[float]:
    """What is kept of the launches, in a file that may be missing or damaged."""
    with contextlib.suppress(InputError):
        said = read_json(launches).get("seconds")
        return [s for s in said if isinstance(s, int | float)] if isinstance(said, list) else []
    return []


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


def start_worker(folder: Path, place: dict[str, str], log: Path, hooks: Sequence[str] = ()) -> subprocess.Popen:
    environment = dict(os.environ)
    if "gpu" in place:
        environment["CUDA_VISIBLE_DEVICES"] = place["gpu"]
    command = [*worker_command(folder, hooks), "--parent", str(os.getpid())]
    command += ["--cores", place["cores"]] if "cores" in place else []
    with open_log(log, "ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, env=environment, bufsize=0
        )


def end_all(pool: dict[int, Worker]) -> None:
    """Lets workers that are left save and leave, then ends them."""
    for worker in pool.values():
        worker.process.terminate()
    end = time.monotonic() + (GRACE_SECONDS if pool else 0.0)
    for worker in pool.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, end - time.monotonic()))
        worker.process.kill()
        worker.process.wait()
        worker.process.stdout.close()
