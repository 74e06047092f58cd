"""A worker process: `python -m sweeps.launch.worker DIR` trains runs of the sweep in DIR until nothing is left to do.

The sweep's folder is the queue. Every engine (local, Slurm, Ray) only supplies such processes, on as many machines as
share the folder: each takes a run that is ready and that nobody holds, the dearest first but branches rather where
their program is loaded, trains it, and looks again. A worker lives on from run to run, so imports and compiled programs
are paid for once. What happens is written to standard output as JSON lines; everything that libraries print goes to
standard error.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.sizing import training_bytes
from scaling.alike import same_program, same_swarm
from scaling.config import canonical_json
from scaling.engine.lease import Busy, Held, Leases, holder, lease
from scaling.execution import Execution
from scaling.exit_codes import PREEMPTED
from scaling.folder import read_json, write_atomically
from scaling.result import RunResult
from scaling.trust import check_hook, check_sweep_links
from sweeps.plan import Unit, read_plan, sources

ATTEMPTS = (
    3  # per run and launch: a run that raises or loses its worker is tried again; bad input and divergence are not
)
POLL_SECONDS = 0.5  # between looks at runs that others hold
NOTHING, LATER = -1, -2
HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
MEMORY_SHARE = 0.9  # of it, for all workers together; the bytes of a run are an estimate
SMALL = 0.02  # of it: runs below are not counted, as no machine has so many cores for so little memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", default="", help="cores to be pinned to, such as 0 or 0,1")
    parser.add_argument("--parent", type=int, help="process id of the launcher, with which this one ends")
    parser.add_argument("--allow-hook", action="append", default=[], help="module:function that a run may name")
    args = parser.parse_args(argv)
    if args.parent:
        die_with(args.parent)
    stop = threading.Event()

    def listen() -> None:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which passes it on as SIGTERM

    listen()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if args.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})

    from scaling.engine import hosts
    from scaling.engine.runtime import set_up_jax
    from scaling.execution import mesh_sizes

    check_sweep_links(args.folder)
    execution = Execution(**read_json(args.folder / "execution.json"))
    together = hosts.detected(os.environ)
    set_up_jax(1 if together else math.prod(mesh_sizes(execution.mesh).values()))
    if together:
        hosts.connect(hosts.Hosts())
        listen()  # jax.distributed takes SIGTERM for itself

    def say(event: str, **fields) -> None:
        channel.write(json.dumps({"event": event, **fields}) + "\n")

    say("ready")
    return work(args.folder, execution, say, stop.is_set, args.allow_hook)


def work(
    folder: Path, execution: Execution, say: Callable[..., None], stop: Callable[[], bool], hooks: Collection[str] = ()
) -> int:
    """Trains runs of the sweep in `folder` until none is left (0), or `stop()` is true and the state saved (75).

    `hooks`: those that a run may name. Events said: begin, note, progress, done, failed; each with `run`. Of several
    hosts that train together, the first chooses and the others follow.
    """
    from scaling.engine.hosts import agree
    from scaling.engine.loop import Preempted, first_host

    queue, leases = Queue(folder, *read_plan(folder)), Leases()
    while True:
        queue.refresh()
        with contextlib.ExitStack() as stack:
            chosen, held = NOTHING, None
            if first_host():
                chosen, held = (LATER, None) if stop() else queue.choose(stack, leases)
                for run, reason in queue.newly_refused():
                    tell_failure(run, reason)
                    say("failed", run=run, reason=reason, again=False)
            choices = agree(chosen, queue.number)
            chosen = int(choices[0, 0])
            if agree(stop())[:, 0].any():
                return PREEMPTED
            if chosen == NOTHING:
                return 0
            # Or hosts that do not all see the newest plan yet.
            apart = len(set(choices[:, 1])) > 1
            if chosen == LATER or apart:
                time.sleep(POLL_SECONDS)
                if apart:
                    queue.reread()
                continue
            team = [(queue.units[chosen], held)]
            if swarming(execution):
                team += queue.peers(queue.units[chosen], stack, leases)
            attempts = {unit.run_id: queue.attempts(unit) for unit, _ in team}
            for run, count in attempts.items():
                say("begin", run=run, attempts=count)
            try:
                for unit, _ in team:
                    check_hook(unit.config, hooks)
                for result in trained(team, queue, execution, say, stop):
                    queue.over.add(result.run)
                    fields = {"timing": result.timing, "device": result.where.get("device")}
                    at = result.branched_at_step
                    say("done", run=result.run, at=at, status=result.status, loss=result.loss, **fields)
            except Preempted:
                for run in attempts:
                    say("preempted", run=run)
            except Busy as lost:  # another worker took the run over while this one was silent
                say("note", run=team[0][0].run_id, text=str(lost))
                for run in attempts:
                    say("preempted", run=run)
            except Exception as error:  # one run's failure is reported and leaves the others alone
                again = not isinstance(error, InputError)
                reason = f"{type(error).__name__}: {error}".splitlines()[0] if again else str(error)
                if again:
                    traceback.print_exc()
                for unit, _ in team:
                    run, tried = unit.run_id, attempts[unit.run_id] + 1
                    tell_failure(run, reason)
                    # Bad input does not mend by trying again, but in a swarm it may be another member's.
                    final = tried >= ATTEMPTS or (not again and len(team) == 1)
                    queue.failed(unit, reason, tried, final)
                    say("failed", run=run, reason=reason, again=not final)


def tell_failure(run: str, reason: str) -> None:
    """`scaling status` finds the log of a failed run by this line."""
    print(f"run {run} failed: {reason}", file=sys.stderr, flush=True)


def trained(
    team: Sequence[tuple[Unit, Held | None]],
    queue: "Queue",
    execution: Execution,
    say: Callable[..., None],
    stop: Callable[[], bool],
) -> list[RunResult]:
    """The results of the runs of `team`: one alone, or several of one shape as a swarm."""
    from scaling.engine.loop import Sharing, train
    from scaling.engine.swarm import Member, train_swarm

    def note(run: str, text: str) -> None:
        say("note", run=run, text=text)

    def progress(state: dict) -> None:
        say("progress", **state)

    members = [
        Member(
            unit.config,
            queue.run(unit.run_id),
            Sharing(unit.saves, tuple((queue.run(r), n) for r, n in sources(unit, queue.units))),
            held,
        )
        for unit, held in team
    ]
    if len(members) > 1:
        return train_swarm(members, execution, stop, note, progress)
    one = members[0]
    tell = functools.partial(note, one.config.run_id)
    return [train(one.config, one.folder, execution, stop, tell, progress, one.sharing, one.held)]


def swarming(execution: Execution) -> bool:
    """Whether runs of one shape train together: on one host, and by itself only where it is an accelerator's."""
    import jax

    if execution.swarm == "off" or execution.mesh or jax.process_count() > 1:
        return False
    return execution.swarm == "on" or jax.default_backend() != "cpu"


class Queue:
    """The runs of a sweep's folder, as one worker sees them."""

    def __init__(self, folder: Path, launch: str, units: Sequence[Unit]) -> None:
        self.folder = folder
        self.over: set[str] = set()  # runs that have a result
        self.compiled: set = set()  # same_program of those that this worker has ready
        self.refused: dict[str, list[str]] = {}  # why a run's folder could not be used, at each try
        self.told: set[str] = set()  # runs that were given up for it
        self.read: tuple[int, int] | None = None  # the state of the plan last read here
        self.take(launch, units)

    def take(self, launch: str, units: Sequence[Unit]) -> None:
        self.launch, self.units = launch, tuple(units)
        self.by_id = {unit.run_id: unit for unit in units}
        self.order = sorted(range(len(units)), key=lambda i: -units[i].flops)
        #: equal on hosts that follow one plan; small, as hosts tell each other whole numbers below 2^24
        self.number = zlib.crc32(" ".join([launch, *self.by_id]).encode()) % 2**24

    def refresh(self) -> None:
        """Takes over what another launch has added to the plan since; runs that it no longer has stay in the queue."""
        state = plan_state(self.folder)
        if state == self.read:
            return
        with contextlib.suppress(InputError):  # removed or damaged: the plan at hand is still good
            launch, units = read_plan(self.folder)
            named = {unit.run_id for unit in units}
            self.take(launch, [*units, *(unit for unit in self.units if unit.run_id not in named)])
        self.read = state

    def reread(self) -> None:
        """Follows the plan as it is now and nothing else: for hosts that have seen different ones."""
        with contextlib.suppress(InputError):
            self.take(*read_plan(self.folder))

    def newly_refused(self) -> list[tuple[str, str]]:
        """(run, reason) of the runs given up, as their folder cannot be used, since this was last asked."""
        new = [run for run, tries in self.refused.items() if len(tries) >= ATTEMPTS and run not in self.told]
        self.told.update(new)
        for run in new:
            with contextlib.suppress(OSError):  # the folder may not hold this either
                self.failed(self.by_id[run], self.refused[run][-1], len(self.refused[run]), final=True)
        return [(run, self.refused[run][-1]) for run in new]

    def run(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id

    def choose(self, stack: contextlib.ExitStack, leases: Leases) -> tuple[int, Held | None]:
        """(index, lease) of a unit that is ready, held until `stack` ends; LATER, where others hold what is left, or
        NOTHING.
        """
        waiting = False
        for i in sorted(self.order, key=self.loads):  # else the dearest first
            unit = self.units[i]
            if self.finished(unit.run_id) or self.given_up(unit):
                continue
            waiting = True
            memory = training_bytes(unit.config.model, unit.config.batch_size, unit.config.data.seq_len)
            try:
                if not self.ready(unit) or not self.fits(memory):
                    continue
                held = stack.enter_context(lease(self.run(unit.run_id), leases=leases, memory=memory))
            except Busy:
                continue
            except OSError as error:  # this run's folder is at fault, or the disk: the others may still be trained
                self.refused.setdefault(unit.run_id, []).append(f"its folder cannot be used: {error}")
                continue
            if not self.finished(unit.run_id):  # by another, before it let go
                self.compiled.add(same_program(unit.config))
                return i, held
        return LATER if waiting else NOTHING, None

    def loads(self, i: int) -> bool:
        """Whether a unit, short as a branch is, would have this worker load a program for it: better another's."""
        unit = self.units[i]
        return unit.after is not None and same_program(unit.config) not in self.compiled

    def peers(self, unit: Unit, stack: contextlib.ExitStack, leases: Leases) -> list[tuple[Unit, Held]]:
        """Units of the shape and length of `unit` that are ready, each held until `stack` ends: as many as fit."""
        from scaling.engine.swarm import capacity

        found: list[tuple[Unit, Held]] = []
        key, room = same_swarm(unit.config), capacity(unit.config) - 1
        for other in self.units:
            alike = (other.config.steps, other.at) == (unit.config.steps, unit.at) and same_swarm(other.config) == key
            untried = self.attempts(other) == self.attempts(unit) == 0  # what failed in a swarm is tried alone
            if len(found) == room or not alike or not untried or other is unit or self.finished(other.run_id):
                continue
            if self.ready(other):
                with contextlib.suppress(Busy, OSError):
                    found.append((other, stack.enter_context(lease(self.run(other.run_id), leases=leases))))
        return found

    def fits(self, memory: int) -> bool:
        """Whether a run of so many bytes goes beside those that this machine trains now, or nothing else is trained."""
        if memory < SMALL * HOST_MEMORY:
            return True
        found = (holder(self.run(unit.run_id)) for unit in self.units)
        others = sum(said["bytes"] or 0 for said in found if said and said["here"])
        return others == 0 or memory + others <= MEMORY_SHARE * HOST_MEMORY

    def finished(self, run_id: str) -> bool:
        # os.path, unlike Path, says no where a folder cannot be looked into.
        if run_id not in self.over and os.path.exists(self.run(run_id) / "result.json"):
            self.over.add(run_id)
        return run_id in self.over

    def ready(self, unit: Unit) -> bool:
        """Whether the state that it begins from is kept, or will never be."""
        if unit.after is None or os.path.isdir(self.run(unit.after) / "branches" / str(unit.at)):
            return True
        return self.finished(unit.after) or self.given_up(self.by_id[unit.after])

    def given_up(self, unit: Unit) -> bool:
        said = self.failure(unit)
        tries = max(len(self.refused.get(unit.run_id, ())), int(said.get("attempts", 0)))
        return bool(said.get("final")) or tries >= ATTEMPTS

    def attempts(self, unit: Unit) -> int:
        """How often this launch tried the run in vain."""
        return int(self.failure(unit).get("attempts", 0))

    def failure(self, unit: Unit) -> dict[str, Any]:
        """What failed.json says of this launch; nothing where it is of another."""
        path = self.run(unit.run_id) / "failed.json"
        try:
            said = read_json(path) if os.path.exists(path) else {}
        except InputError:
            return {}
        return said if said.get("launch") == self.launch else {}

    def failed(self, unit: Unit, reason: str, attempts: int, final: bool = False) -> None:
        """Keeps that the run failed. `final`: trying again in this launch would not help."""
        record = {"reason": reason, "attempts": attempts, "launch": self.launch} | ({"final": True} if final else {})
        self.run(unit.run_id).mkdir(parents=True, exist_ok=True)
        write_atomically(self.run(unit.run_id) / "failed.json", canonical_json(record))


def plan_state(folder: Path) -> tuple[int, int] | None:
    """Changes whenever plan.json is written anew; None where it is not there."""
    with contextlib.suppress(OSError):
        found = os.stat(folder / "plan.json")
        return found.st_ino, found.st_mtime_ns
    return None


def die_with(parent: int) -> None:
    """Ends this process when the launcher's ends, even by kill -9: it would train on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
