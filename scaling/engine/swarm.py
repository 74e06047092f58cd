"""A swarm: runs of one shape that differ in learning rate, seed or data order, trained as one program.

The members' states are stacked and the steps of `scaling/engine/program.py` mapped over them, members split over the
devices of the mesh. For small models an accelerator takes hardly longer for many than for one; a CPU does, so there it
is off. A swarm has no state of its own: every member has its folder, curve, checkpoints and result as if it were alone,
goes on alone with what it began in a swarm, and the other way round.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling.alike import same_swarm
from scaling.config import RunConfig
from scaling.engine.feed import inputs, resident
from scaling.engine.lease import Held
from scaling.engine.loop import Lane, Team, advance, begin, check, opened
from scaling.engine.memory import device_limit, member_bytes
from scaling.engine.program import LOGIT_BYTES, Recipe, functions, program_for, recipe
from scaling.engine.sharding import make_mesh, replicated
from scaling.engine.states import ALONE, Sharing
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
    # The logits of a validation are made in parts of LOGIT_BYTES for all members of a device, and their exponentials.
    room = MEMORY_SHARE * device_limit(devices[0]) - 2 * LOGIT_BYTES
    return max(1, min(MOST_MEMBERS, int(room * len(devices) / member_bytes(config))))


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
    mesh = make_mesh()  # that a member's own state and bookkeeping lie on
    with ExitStack() as stack:
        lanes = []
        for member in members:
            tell = functools.partial(report, member.config.run_id)
            source = check(member.config, member.folder, execution, mesh)
            begin(member.config, member.folder, source.store, tell)
            if read_result(member.folder) is None:
                where = (member.folder, execution, mesh, member.sharing, member.held)
                lanes.append(stack.enter_context(opened(source, *where, tell, progress)))
        if len({same_swarm(lane.feed.config) for lane in lanes}) > 1:
            raise ValueError("a swarm's members must be of one shape")
        for lane in lanes:
            lane.start(program_for(lane.feed.config, execution, mesh), mesh)
        while lanes:
            advance(lanes, together(lanes, execution, mesh), execution, should_stop)
            lanes = [lane for lane in lanes if not lane.over]
    return [read_result(member.folder) for member in members]


def together(lanes: Sequence[Lane], execution: Execution, mesh: Mesh) -> Team:
    """The lanes as one program, split over the devices; filled up with copies of the last, so that they divide."""
    devices = np.asarray(jax.local_devices())
    members = Mesh(devices, ("members",))
    local = -(-len(lanes) // len(devices))
    filling = local * len(devices) - len(lanes)
    split, first = NamedSharding(members, PartitionSpec("members")), lanes[0].feed
    frozen = jax.device_put(lanes[0].frozen, NamedSharding(members, PartitionSpec()))  # of one parent, so all alike
    steps_of_all, validate_all = compile_swarm(recipe(first.config, execution, mesh, local), members)

    def join(states: list[Any]) -> Any:
        states = states + states[-1:] * filling
        return jax.device_put(jax.tree.map(lambda *x: jnp.stack([jax.device_get(a) for a in x]), *states), split)

    def part(state: Any, i: int) -> Any:
        """The state of one member, on one device, as it would be alone."""
        return jax.device_put(jax.tree.map(lambda x: x[i], state), replicated(mesh))

    def steps(state: Any, lanes: Sequence[Lane], n: int) -> tuple[Any, dict[str, jax.Array]]:
        living = next(lane for lane in lanes if not lane.over)
        # One that is over computes on, unrecorded, with another's batches: its own may have come to their end.
        fed = [living if lane.over else lane for lane in lanes]
        data, lr, decay = zip(
            *(inputs(lane.feed, mesh, lane.done, n) for lane in fed + fed[-1:] * filling), strict=True
        )
        each = [{name: part for name, part in d.items() if name != "whole"} for d in data]
        stacked = jax.tree.map(lambda *x: np.stack(x), *each)
        if "whole" in data[0]:
            stacked["whole"] = resident(first.store, first.objective, members)
        return steps_of_all(state, frozen, stacked, np.stack(lr), np.stack(decay), n)

    def validate(state: Any, batch: Any, weight_B: np.ndarray) -> jax.Array:
        return validate_all(state["params"], frozen, batch, weight_B)

    return Team(join, part, steps, validate, mesh)


@functools.lru_cache(maxsize=8)
def compile_swarm(recipe: Recipe, members: Mesh) -> tuple[Callable, Callable]:
    """`steps` and `validate` of `scaling.engine.program.Program`, over stacked states, data, rates and decays."""
    of_one = functions(recipe)
    split, whole = NamedSharding(members, PartitionSpec("members")), NamedSharding(members, PartitionSpec())

    def steps(
        state: Any, frozen: Any, data: dict, lr_MX: jax.Array, decay_MX: jax.Array, n: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        axes = {name: None if name == "whole" else 0 for name in data}
        return jax.vmap(of_one.steps, in_axes=(0, None, axes, 0, 0, None))(state, frozen, data, lr_MX, decay_MX, n)

    return (
        jax.jit(steps, donate_argnums=0, out_shardings=(split, whole)),
        jax.jit(jax.vmap(of_one.validate, in_axes=(0, None, None, None)), out_shardings=whole),
    )
