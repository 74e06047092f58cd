"""Runs from their configurations to their results: one loop around the compiled steps, for one run or several.

On several hosts every process runs this loop in step: what depends on a clock or a signal is agreed on between calls of
the compiled program, each host reads its own part of a batch, and process 0 writes the record.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.errors import InputError
from scaling.chain import Parent, parent_of
from scaling.config import RunConfig, canonical_json, check_fits
from scaling.data.batches import Store
from scaling.data.store import open_store
from scaling.engine.feed import Feed, feed, inputs, spread, validation_batches
from scaling.engine.hosts import agree, by_first_host, first_host
from scaling.engine.lease import Busy, Held, lease
from scaling.engine.memory import check_memory, device_limit
from scaling.engine.optim import make_direction
from scaling.engine.parameters import frozen, taken_over
from scaling.engine.program import CHUNK_STEPS, Program, implementation, program_for
from scaling.engine.recorder import Recorder
from scaling.engine.reference import reference_of
from scaling.engine.sharding import check_mesh, make_mesh
from scaling.engine.states import ALONE, BRANCHES, Sharing, States
from scaling.engine.tracking import Sinks, check_sinks
from scaling.execution import Execution
from scaling.folder import check_run_folder, open_run, read_json, set_aside, write_atomically
from scaling.result import RunResult, read_result
from scaling.trust import check_links

CHUNK_SECONDS = 0.25  # the calls are kept about this long, so that a signal or a NaN is noticed soon
PROGRESS_SECONDS = 1.0
SHOWN_WITHIN = 60  # seconds in which a file server shows a file to all hosts


class Preempted(Exception):
    """The run was told to stop; its state is in a checkpoint and the same command continues it."""


def train(
    config: RunConfig,
    folder: Path,
    execution: Execution | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[dict], None] = lambda state: None,
    sharing: Sharing = ALONE,
    held: Held | None = None,
) -> RunResult:
    """Trains the run in `folder`, continuing from its newest checkpoint, else from the latest state that another run
    of `sharing` kept, and returns its result.

    A finished run is not trained again. A loss that is not finite ends the run with status "diverged".
    Raises InputError before anything is made, Preempted once `should_stop()` is true (state saved), Busy where another
    process holds the run, or took it over while this one was silent. `held`: the lease, where the caller has it.
    """
    execution = execution or Execution()
    mesh = make_mesh(execution.mesh)
    source = check(config, folder, execution, mesh)
    with ExitStack() as stack:

        def get_ready() -> None:
            nonlocal held
            if held is None:
                held = stack.enter_context(lease(folder, report=report))
            begin(config, folder, source.store, report)

        by_first_host(get_ready)
        result = read_result(folder)
        if agree(result is not None)[0, 0]:
            while result is None:  # a file server shows it to this host a little later
                time.sleep(0.5)
                result = read_result(folder)
            return result
        with opened(source, folder, execution, mesh, sharing, held, report, progress) as lane:
            program = program_for(config, execution, mesh)
            lane.start(program, mesh)
            advance([lane], alone(program, mesh, lane.frozen), execution, should_stop)
        return lane.result


def check(config: RunConfig, folder: Path, execution: Execution, mesh: Mesh) -> Feed:
    """What feeds the run. Raises InputError where the run cannot be trained so; makes nothing."""
    check_sinks(execution.track)
    implementation(config, execution, mesh)
    check_mesh(dict(mesh.shape), config.model, config.batch_size, config.data.seq_len, execution.accumulate)
    store = open_store(config.data.source, config.data.tokenizer, valid_fraction=config.data.valid_fraction)
    check_fits(config, store)
    check_run_folder(folder, config)
    parent = parent_seen(config, folder)
    make_direction(config.optim)  # a hook that is misspelt
    check_memory(config, execution, dict(mesh.shape), device_limit(mesh.local_devices[0]))
    return feed(config, store, parent)


def parent_seen(config: RunConfig, folder: Path) -> Parent | None:
    """`parent_of`, as the first host sees it: a file server may show a parent's end to others a little later."""
    by_first_host(lambda: parent_of(config, folder))
    for _ in range(SHOWN_WITHIN):
        with suppress(InputError):
            return parent_of(config, folder)
        time.sleep(1.0)
    return parent_of(config, folder)


def begin(config: RunConfig, folder: Path, store: Store, report: Callable[[str], None]) -> None:
    """The run's folder, ready to be trained in. The caller holds the lease."""
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder)
    open_run(folder, config)
    check_corpus(folder, store, report)
    for name in ("checkpoints", BRANCHES):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            set_aside(path)
            report(f"{path.name} was no folder and is set aside; it is made again")
        for entry in path.glob("*"):
            if entry.is_symlink():  # orbax clears what a killed save left, and cannot clear a link
                set_aside(entry, folder)
                report(f"{path.name}/{entry.name} was a link and is set aside")
    if (folder / "failed.json").is_dir():
        set_aside(folder / "failed.json")
    (folder / "failed.json").unlink(missing_ok=True)


def check_corpus(folder: Path, store: Store, report: Callable[[str], None]) -> None:
    """Pins the run to the corpus it began with. Raises InputError where a newer version of it is installed.

    Where the file is damaged, nobody knows that corpus: the states of a run that is not over are set aside with it.
    """
    path = folder / "corpus.json"
    there = None
    if path.exists():
        with suppress(InputError):
            there = read_json(path).get("corpus")
        if not isinstance(there, str):
            there = None
            if not (folder / "result.json").exists():
                for name in ("checkpoints", BRANCHES):
                    set_aside(folder / name)
            set_aside(path)
            report(f"{path.name} was damaged and is set aside, with the states of the run; it begins anew")
    if there is None:
        write_atomically(path, canonical_json({"corpus": store.key}))
    elif there != store.key:
        raise InputError(f"{folder}: was begun on corpus {there}, now {store.key}; move the folder away to begin anew")


@dataclass(eq=False)
class Lane:
    """One run on its way: what it is fed, what records it, what keeps its states, and where it stands."""

    feed: Feed
    recorder: Recorder
    states: States
    started: float  #: seconds, of the monotonic clock
    begun_at: int = 0  #: the step from which this process trains it
    done: int = 0  #: steps
    state: Any = None  #: while it is not in the hands of `advance`
    frozen: Any = field(default_factory=dict)  #: what of its parameters is not trained
    result: RunResult | None = None  #: once it is over

    @property
    def over(self) -> bool:
        return self.result is not None

    @property
    def steps(self) -> int:
        return self.feed.config.steps

    @property
    def at_mark(self) -> bool:
        """Whether other runs branch from where it stands."""
        return self.done in self.states.sharing.saves

    def start(self, program: Program, mesh: Mesh) -> None:
        """From its newest checkpoint, else from a trunk, else from its parent's end, else fresh from the seed."""
        step, state = self.states.begin(program.abstract_state) or (0, None)
        key, parent, parts = jax.random.key(self.feed.config.seed), self.feed.parent, program.parts
        params = functools.cache(lambda: taken_over(parent, parts, mesh))  # read once, and only where it is needed
        if self.feed.objective.reference:
            columns = reference_of(self.feed, self.recorder.folder, program, mesh, params, self.recorder.report)
            self.feed = replace(self.feed, reference=columns)
        if parts.lora.rank:
            self.frozen = frozen(parts, params())
        if parent is not None and state is None:
            state = program.inherit(params(), key)
        self.state = program.init(key) if state is None else state
        self.recorder.sinks.open(step)
        self.begun_at = self.done = step

    def diverge(self, step: int) -> None:
        self.recorder.report(f"loss is not finite at step {step}; the run ends as diverged")
        self.states.clear()
        seconds = {"seconds": round(time.monotonic() - self.started, 3)}
        self.result = self.recorder.finish(None, self.states.branch, seconds, step)


@contextmanager
def opened(
    source: Feed,
    folder: Path,
    execution: Execution,
    mesh: Mesh,
    sharing: Sharing,
    held: Held | None,
    report: Callable[[str], None],
    progress: Callable[[dict], None],
) -> Iterator[Lane]:
    """A run's lane; on every way out its sinks are closed and its saves awaited."""
    sinks = Sinks(execution.track if first_host() else "", source.config, folder, report)
    recorder = Recorder(source, folder, sinks, mesh.size, report, progress, held)
    states = States(recorder, execution.keep_checkpoints, sharing, report)
    status = "failed"
    try:
        yield Lane(source, recorder, states, time.monotonic())
    except Preempted:
        status = "preempted"
        raise
    except Busy:
        status = "lost"
        raise
    finally:
        try:
            states.close()
        finally:
            sinks.finish(status, {})


@dataclass(frozen=True)
class Team:
    """How the states of lanes are held and computed with: one by itself, or several as one program."""

    join: Callable  #: [state of each lane] -> state
    part: Callable  #: state, i -> the state of lane i
    steps: Callable  #: state, lanes, n -> state, {metric: [X] or [M, X]}
    validate: Callable  #: state, batch, weight_B -> sum of losses, [] or [M]
    mesh: Mesh  #: that a lane's own state lies on


def alone(program: Program, mesh: Mesh, frozen: Any) -> Team:
    def steps(state: Any, lanes: Sequence[Lane], n: int) -> tuple[Any, dict[str, jax.Array]]:
        return program.steps(state, frozen, *inputs(lanes[0].feed, mesh, lanes[0].done, n), n)

    def validate(state: Any, batch: Any, weight_B: np.ndarray) -> jax.Array:
        batch = {name: spread(x, mesh) for name, x in batch.items()}
        return program.validate(state["params"], frozen, batch, spread(weight_B, mesh))

    return Team(lambda states: states[0], lambda state, i: state, steps, validate, mesh)


class Pace:
    """How many steps a call makes, so that it takes about CHUNK_SECONDS. All hosts take the first one's."""

    def __init__(self) -> None:
        self.chunk, self.made, self.looked_at = 1, 0, 0  # the last two in steps of a lane
        self.steady: tuple[float, int] | None = None  # when the first call, which compiles, had ended, and its steps

    def step_seconds(self, now: float, steps: int) -> float | None:
        """Seconds a step since the first call, the last of `steps` being over; None before there are any."""
        if self.steady is None or steps <= self.steady[1]:
            return None
        return (now - self.steady[0]) / (steps - self.steady[1])

    def after_call(self, now: float) -> float | None:
        """`step_seconds`, by which the next calls are made."""
        if self.steady is None:
            self.steady = now, self.made
        seconds = self.step_seconds(now, self.looked_at)
        if seconds:
            self.chunk = max(1, min(CHUNK_STEPS, int(CHUNK_SECONDS / seconds)))
        return seconds


def advance(lanes: Sequence[Lane], team: Team, execution: Execution, should_stop: Callable[[], bool]) -> None:
    """Trains the lanes side by side until the first of them ends; the others then have their states back.

    Raises Preempted once `should_stop()` is true, the states saved.
    """
    state = team.join([lane.state for lane in lanes])
    for lane in lanes:
        lane.state = None
    eval_steps = -(-execution.eval_every // lanes[0].feed.config.tokens_per_step)
    pace, stop, saved = Pace(), False, time.monotonic()
    reported, under_way = saved, None
    while True:
        ended = [i for i, lane in enumerate(lanes) if not lane.over and lane.done == lane.steps]
        if ended:
            conclude(lanes, team, state, ended, pace)
        left = {i: lane for i, lane in enumerate(lanes) if not lane.over}
        if stop and left:
            raise Preempted(stopped(lanes))
        if ended or not left:
            break
        for i, lane in left.items():
            if lane.at_mark:
                lane.states.keep(lane.done, team.part(state, i))
        n = min(pace.chunk, *(to_boundary(lane, eval_steps) for lane in left.values()))
        firsts = [lane.done for lane in lanes]
        state, metrics = team.steps(state, lanes, n)
        # While the device computes this call, the host looks at the one before; the first, which compiles, is waited
        # for.
        before, under_way = under_way, (firsts, n, metrics)
        if pace.made == 0:
            before, under_way = under_way, None
        pace.made += n
        for lane in left.values():
            lane.done += n
        if before:
            look(lanes, *before, pace)
        now = time.monotonic()
        seconds = pace.after_call(now)
        if seconds and now - reported >= PROGRESS_SECONDS:
            reported = now
            for lane in left.values():
                if not lane.over:
                    lane.recorder.write_progress(seconds)
        all_hosts = agree(should_stop(), now - saved >= execution.checkpoint_seconds, pace.chunk)
        stop, save, pace.chunk = bool(all_hosts[:, 0].any()), bool(all_hosts[:, 1].any()), int(all_hosts[0, 2])
        due = [lane for lane in left.values() if eval_steps and lane.done % eval_steps == 0 and lane.done < lane.steps]
        settled = stop or save or due or any(lane.at_mark or lane.done == lane.steps for lane in left.values())
        if under_way and settled:
            look(lanes, *under_way, pace)
            under_way = None
        left = {i: lane for i, lane in left.items() if not lane.over}
        if any(not lane.over for lane in due):
            losses = validation(lanes, team, state)
            for i, lane in left.items():
                if lane in due:
                    lane.recorder.validated(lane.done, float(losses[i]))
        if stop or save:
            for i, lane in left.items():
                if lane.done < lane.steps:
                    lane.states.save(lane.done, team.part(state, i))
            saved = time.monotonic()
    for i, lane in enumerate(lanes):
        if not lane.over:
            lane.state = team.part(state, i)


def to_boundary(lane: Lane, eval_steps: int) -> int:
    """Steps up to the next at which a lane's state is wanted: its end, a validation, or where others branch from it."""
    marks = [step for step in (lane.steps, *lane.states.sharing.saves) if step > lane.done]
    if eval_steps:
        marks.append(lane.done + eval_steps - lane.done % eval_steps)
    return min(marks) - lane.done


def look(lanes: Sequence[Lane], firsts: list[int], n: int, metrics: dict[str, jax.Array], pace: Pace) -> None:
    """Notes the metrics of a call of n steps; a lane in which one is not finite ends as diverged."""
    rows = {name: np.atleast_2d(np.asarray(values)) for name, values in jax.device_get(metrics).items()}
    pace.looked_at += n
    for i, lane in enumerate(lanes):
        if not lane.over:
            bad = lane.recorder.steps(firsts[i], {name: values[i, :n] for name, values in rows.items()})
            if bad:
                lane.diverge(bad)


def validation(lanes: Sequence[Lane], team: Team, state: Any) -> np.ndarray:
    """The mean of the losses over the validated windows, nats per token, of each lane."""
    source = lanes[0].feed
    sums = [team.validate(state, batch, weight_B) for batch, weight_B in validation_batches(source, team.mesh)]
    by_lane = np.atleast_2d(np.asarray(jax.device_get(sums), np.float64).T)
    return np.array([np.sum(np.ascontiguousarray(row)) for row in by_lane]) / source.counted


def conclude(lanes: Sequence[Lane], team: Team, state: Any, ended: Sequence[int], pace: Pace) -> None:
    """Keeps the trained models of the lanes that have come to their last step, validates, and writes their results."""
    trained = time.monotonic()
    for i in ended:
        lane, part = lanes[i], team.part(state, i)
        lane.states.save(lane.done, part)
        if lane.at_mark:
            lane.states.keep(lane.done, part)
    losses = validation(lanes, team, state)
    for i in ended:
        lane, loss = lanes[i], float(losses[i])
        if not math.isfinite(loss):
            lane.diverge(lane.done)
            continue
        lane.recorder.validated(lane.done, loss)
        lane.states.close()  # waits until the model is on disk: the result comes last
        timing = timing_of(lane, len(lanes), pace, trained)
        lane.result = lane.recorder.finish(loss, lane.states.branch, timing)


def timing_of(lane: Lane, members: int, pace: Pace, trained: float) -> dict[str, Any]:
    """Seconds of a run that finishes now; the rate of its steps only where they were its own."""
    now = time.monotonic()
    timing = {
        "seconds": round(now - lane.started, 3),
        "first_call_seconds": round(pace.steady[0] - lane.started, 3) if pace.steady else 0.0,
        "validation_seconds": round(now - trained, 3),
        "resumed_at_step": lane.begun_at,
    }
    if members > 1:
        return timing | {"swarm": members}
    seconds = pace.step_seconds(trained, pace.made)
    return timing if seconds is None else timing | {"seconds_per_step": round(seconds, 6)}


def stopped(lanes: Sequence[Lane]) -> str:
    if len(lanes) > 1:
        return f"stopped a swarm of {len(lanes)} runs; the same command continues"
    return f"stopped after step {lanes[0].done} of {lanes[0].steps}; the same command continues"
