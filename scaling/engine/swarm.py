"""A swarm: runs of one shape that differ in learning rate, seed or data order, trained as one program.

The members' states are stacked and the steps of `scaling/engine/program.py` mapped over them, members split over the
devices of the mesh. For small models an accelerator takes hardly longer for many than for one; a CPU does, so there it
is off. A swarm has no state of its own: every member has its folder, curve, checkpoints and result as if it were alone,
goes on alone with what it began in a swarm, and the other way round.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.config import ModelConfig
from models.implementation import Implementation
from models.sizing import training_bytes
from scaling.alike import compiled_optim, same_swarm
from scaling.config import OptimConfig, RunConfig
from scaling.engine.lease import Held
from scaling.engine.loop import (
    ALONE,
    CHUNK_SECONDS,
    PROGRESS_SECONDS,
    VALIDATION_TOKENS,
    Preempted,
    Run,
    Sharing,
    begin,
    check,
    resident,
)
from scaling.engine.memory import device_limit
from scaling.engine.program import CHUNK_STEPS, functions, implementation
from scaling.engine.sharding import make_mesh, replicated
from scaling.execution import Execution
from scaling.result import RunResult, read_result

MOST_MEMBERS = 64  # beyond, a program grows without gaining
MEMORY_SHARE = 0.8  # of a device: the estimate of a member's bytes is one


@dataclass(frozen=True)
class Member:
    config: RunConfig
    folder: Path
    sharing: Sharing = ALONE
    held: Held | None = None  #: the lease, where the caller has it


def capacity(config: RunConfig) -> int:
    """How many members of this shape fit into the memory of this process's devices."""
    devices = jax.local_devices()
    needs = training_bytes(config.model, config.batch_size, config.data.seq_len)
    return max(1, min(MOST_MEMBERS, int(MEMORY_SHARE * device_limit(devices[0]) * len(devices) / needs)))


def train_swarm(
    members: Sequence[Member],
    execution: Execution | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str, str], None] = lambda run, line: None,
    progress: Callable[[dict], None] = lambda state: None,
) -> list[RunResult]:
    """Trains the members together and returns their results, in their order.

    The caller holds every member's folder. report(run id, line). A member whose loss is not finite ends as diverged and
    leaves the others alone. Raises Preempted once `should_stop()` is true, with every member's state saved.
    """
    execution = dataclasses.replace(execution or Execution(), mesh="", accumulate=1)
    alone = make_mesh()  # that a member's own state and bookkeeping lie on
    runs = []
    for member in members:
        store = check(member.config, member.folder, execution, alone)
        begin(member.config, member.folder, store)
        tell = functools.partial(report, member.config.run_id)
        runs.append(
            Run(
                member.config,
                member.folder,
                execution,
                alone,
                store,
                should_stop,
                tell,
                progress,
                member.sharing,
                member.held,
            )
        )
    try:
        todo = [run for run in runs if read_result(run.folder) is None]
        if len({same_swarm(run.config) for run in todo}) > 1:
            raise ValueError("a swarm's members must be of one shape")
        lanes = []
        for run in todo:
            step, state = run.start()
            lanes.append(Lane(run, step, state))
        while lanes:
            train_lanes(lanes, execution, should_stop)
            lanes = [lane for lane in lanes if not lane.over]
        return [read_result(run.folder) for run in runs]
    finally:
        for run in runs:
            run.kept.close()
            run.checkpointer.close()


@dataclass
class Lane:
    """One member's place in the stack."""

    run: Run
    done: int  #: steps
    state: Any  #: while it is not in the stack
    over: bool = False


def train_lanes(lanes: list[Lane], execution: Execution, should_stop: Callable[[], bool]) -> None:
    """Trains the lanes side by side until the first of them ends; then all states are handed back to their lanes."""
    first = lanes[0].run.config
    devices = np.asarray(jax.local_devices())
    size = -(-len(lanes) // len(devices)) * len(devices)  # padded with copies, so that it splits over the devices
    program = compile_swarm(
        first.model,
        compiled_optim(first),
        first.dtype,
        implementation(first, execution, make_mesh()),
        first.data.seq_len,
        Mesh(devices, ("members",)),
    )
    padded = lanes + lanes[-1:] * (size - len(lanes))
    state = program.stack([lane.state for lane in padded])
    for lane in lanes:
        lane.state = None
    started = saved = told = time.monotonic()
    chunk, at_first, steady = 1, sum(lane.done for lane in lanes), None
    alive = [True] * len(lanes)
    while True:
        for i, lane in enumerate(lanes):
            if alive[i] and lane.done in lane.run.sharing.saves:
                lane.run.keep(lane.done, member_of(state, i))
        ended = [i for i, lane in enumerate(lanes) if alive[i] and lane.done == lane.run.config.steps]
        if ended:
            finish(program, state, lanes, ended, started)
        if ended or not any(alive):
            break
        n = min([chunk, *(to_boundary(lane) for lane, live in zip(lanes, alive, strict=True) if live)])
        began = time.monotonic()
        state, metrics = program.steps(state, *inputs(padded, n, program.mesh), n)
        losses, norms = (np.asarray(jax.device_get(metrics[name]))[:, :n] for name in ("loss", "grad_norm"))
        now = time.monotonic()
        if steady is None:
            steady = now  # the first call compiles
        else:
            chunk = max(1, min(CHUNK_STEPS, int(CHUNK_SECONDS / ((now - began) / n))))
        for i, lane in enumerate(lanes):
            first_step, lane.done = lane.done, lane.done + n
            if alive[i]:
                bad = lane.run.record(first_step, n, {"loss": losses[i], "grad_norm": norms[i]})
                if bad:
                    lane.run.diverged(bad, now - started)
                    alive[i], lane.over = False, True
        if now - told >= PROGRESS_SECONDS and now > steady:
            told = now
            rate = (sum(lane.done for lane in lanes) - at_first) / (now - started)
            for i, lane in enumerate(lanes):
                if alive[i]:
                    lane.run.tell(lane.done, len(lanes) / rate)
        stop = should_stop()
        if stop or now - saved >= execution.checkpoint_seconds:
            saved = now
            for i, lane in enumerate(lanes):
                if alive[i] and lane.done < lane.run.config.steps:
                    lane.run.save(lane.done, member_of(state, i))
        if stop and any(live and lane.done < lane.run.config.steps for lane, live in zip(lanes, alive, strict=True)):
            for i, lane in enumerate(lanes):
                if alive[i] and lane.done == lane.run.config.steps:
                    finish(program, state, lanes, [i], started)
                lane.run.checkpointer.close()
                if not lane.over:
                    lane.run.sinks.finish("preempted", {})
            raise Preempted(f"stopped a swarm of {len(lanes)} runs; the same command continues")
    for i, lane in enumerate(lanes):
        if not lane.over:
            lane.state = member_of(state, i)


def inputs(lanes: list[Lane], n: int, mesh: Mesh) -> tuple[Any, np.ndarray, np.ndarray]:
    """(data_M, lr_MX, decay_MX) of the next n steps of every lane; the corpus, where it is resident, once for all."""
    data, lr, decay = zip(*(lane.run.inputs(lane.done, n) for lane in lanes), strict=True)
    stacked = {name: np.stack([np.asarray(d[name]) for d in data]) for name in data[0] if name != "corpus"}
    if "corpus" in data[0]:
        stacked["corpus"] = resident(lanes[0].run.store, mesh)
    return stacked, np.stack(lr), np.stack(decay)


def to_boundary(lane: Lane) -> int:
    """Steps up to the next at which a member's state is wanted: its end, or where others branch from it."""
    marks = [lane.run.config.steps, *lane.run.sharing.saves]
    return min(mark - lane.done for mark in marks if mark > lane.done)


def finish(program: "Swarm", state: Any, lanes: list[Lane], ended: list[int], started: float) -> None:
    """Validates all lanes at once and writes the results of those that have `ended`."""
    run = lanes[ended[0]].run
    T = run.config.data.seq_len
    windows_NU = run.store.valid_windows(T)
    size = max(1, VALIDATION_TOKENS // T)
    total = np.zeros(jax.tree.leaves(state)[0].shape[0])
    for at in range(0, len(windows_NU), size):
        part_BU = windows_NU[at : at + size]
        weight_B = np.zeros(size, np.float32)
        weight_B[: len(part_BU)] = 1.0
        padded_BU = np.pad(part_BU, ((0, size - len(part_BU)), (0, 0)))
        total += np.asarray(jax.device_get(program.validate(state["params"], padded_BU, weight_B)), np.float64)
    for i in ended:
        lane, loss = lanes[i], float(total[i]) / (len(windows_NU) * T)
        lane.over = True
        lane.run.save(lane.done, member_of(state, i))
        if not math.isfinite(loss):
            lane.run.diverged(lane.done, time.monotonic() - started)
            continue
        lane.run.validated(lane.done, loss)
        lane.run.kept.close()
        lane.run.checkpointer.close()
        timing = {"seconds": round(time.monotonic() - started, 3), "swarm": len(lanes)}
        lane.run.finish(loss, timing)


def member_of(state: Any, i: int) -> Any:
    """The state of one member, on one device, as it would be alone."""
    return jax.device_put(jax.tree.map(lambda x: x[i], state), replicated(make_mesh()))


@dataclass(frozen=True)
class Swarm:
    """Compiled functions over stacked members, M of them; see `scaling.engine.program.Program`."""

    steps: Callable  #: state_M, data_M, lr_MX, decay_MX, n -> state_M, {"loss": [M, X], "grad_norm": [M, X]}
    validate: Callable  #: params_M, tokens_BU, weight_B -> sums of losses [M]
    stack: Callable  #: list of states -> state_M, split over the devices
    mesh: Mesh


@functools.lru_cache(maxsize=8)
def compile_swarm(
    model: ModelConfig, optim: OptimConfig, dtype: str, how: Implementation, seq_len: int, mesh: Mesh
) -> Swarm:
    _, steps, validate = functions(model, optim, dtype, how, 1, seq_len)
    split, whole = NamedSharding(mesh, PartitionSpec("members")), NamedSharding(mesh, PartitionSpec())

    def stack(states: list[Any]) -> Any:
        return jax.device_put(jax.tree.map(lambda *x: jnp.stack([jax.device_get(a) for a in x]), *states), split)

    def steps_of_all(state: Any, data: dict, lr_MX: jax.Array, decay_MX: jax.Array, n: jax.Array) -> tuple:
        axes = {name: None if name == "corpus" else 0 for name in data}
        return jax.vmap(steps, in_axes=(0, axes, 0, 0, None))(state, data, lr_MX, decay_MX, n)

    return Swarm(
        steps=jax.jit(steps_of_all, donate_argnums=0, out_shardings=(split, whole)),
        validate=jax.jit(jax.vmap(validate, in_axes=(0, None, None)), out_shardings=whole),
        stack=stack,
        mesh=mesh,
    )
