"""A worker process: `python -m sweeps.launch.worker DIR` trains runs of the sweep in DIR until nothing is left to do.

Every engine (local, Slurm, Ray) only supplies such processes, on as many machines as share the folder: each takes a run
from it (sweeps/launch/queue.py), trains it, and looks again. A worker lives on from run to run, so imports and compiled
programs are paid for once. What happens is written to standard output as JSON lines; everything that libraries print
goes to standard error.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from models.errors import InputError
from scaling.config import RunConfig
from scaling.engine.hosts import PARENT
from scaling.engine.lease import Busy, Held, Leases
from scaling.execution import Execution
from scaling.exit_codes import PREEMPTED
from scaling.failure import Failure
from scaling.folder import holds_only
from scaling.result import RunResult
from scaling.trust import check_hook, check_sweep_links
from sweeps.folder import read_execution, restore_config
from sweeps.launch.asking import Asking
from sweeps.launch.queue import LATER, NOTHING, SHORTEST, Queue
from sweeps.plan import Unit

ASK = -3  # beside the queue's NOTHING and LATER: a finished run is asked


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", default="", help="cores to be pinned to, such as 0 or 0,1")
    parser.add_argument("--allow-hook", action="append", default=[], help="module:function that a run may name")
    parser.add_argument("--only-evaluate", action="store_true", help="train nothing: ask the runs that are finished")
    args = parser.parse_args(argv)
    end_with_launcher()
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
    execution = read_execution(args.folder)
    together = hosts.detected(os.environ)
    set_up_jax(1 if together else math.prod(mesh_sizes(execution.mesh).values()))
    if together:
        hosts.connect(hosts.Hosts())
        listen()  # jax.distributed takes SIGTERM for itself

    def say(event: str, **fields) -> None:
        channel.write(json.dumps({"event": event, **fields}) + "\n")

    say("ready")
    return work(args.folder, execution, say, stop.is_set, args.allow_hook, not args.only_evaluate)


def work(
    folder: Path,
    execution: Execution,
    say: Callable[..., None],
    stop: Callable[[], bool],
    hooks: Collection[str] = (),
    training: bool = True,
) -> int:
    """Trains runs of the sweep in `folder`, and asks those that are finished what evaluations.json wants of them, until
    nothing is left (0), or `stop()` is true and the state saved (75).

    `hooks`: those that a run may name. `training`: whether runs are trained, or only asked. Events said: begin, note,
    progress, done, preempted, failed, answered, unanswered; each with `run`. Of several hosts that train together, the
    first chooses and the others follow; they do not ask, which is left to workers of one host.
    """
    import jax

    from scaling.engine.hosts import agree, first_host

    queue, leases, asking, alone = Queue(folder), Leases(), Asking(folder), jax.process_count() == 1
    while True:
        queue.refresh()
        with contextlib.ExitStack() as stack:
            chosen, held, asked = NOTHING, None, None
            if first_host():
                if stop():
                    chosen = LATER
                elif training:
                    chosen, held = queue.choose(stack, leases)
                if held is None and alone and not stop() and (asked := asking.choose(stack, leases)):
                    chosen = ASK
                for run, failure in queue.refusals:
                    report_failure(run, failure, say)
                queue.refusals.clear()
            choices = agree(chosen, queue.number)
            chosen = int(choices[0, 0])
            if agree(stop())[:, 0].any():
                return PREEMPTED
            if chosen == NOTHING:
                return 0
            if chosen == ASK:
                if asked:
                    asking.ask(*asked, say, stop)
                continue
            # Or hosts that do not all see the newest plan yet.
            apart = len(set(choices[:, 1])) > 1
            if chosen == LATER or apart:
                wait(queue.pause(), stop)
                if apart:
                    queue.reread()
                continue
            team = [(queue.units[chosen], held)]
            if swarming(execution):
                team += queue.peers(queue.units[chosen], stack, leases)
            attempt(team, queue, execution, say, stop, hooks)


def wait(seconds: float, stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SHORTEST))


def attempt(
    team: Sequence[tuple[Unit, Held | None]],
    queue: Queue,
    execution: Execution,
    say: Callable[..., None],
    stop: Callable[[], bool],
    hooks: Collection[str],
) -> None:
    """Trains the runs of `team`. What goes wrong with them is recorded, said, and leaves other runs alone."""
    from scaling.engine.loop import Preempted

    before = {unit.run_id: queue.attempts.of(unit.run_id).attempts for unit, _ in team}
    for run, count in before.items():
        say("begin", run=run, attempts=count, launch=queue.launch)
    try:
        for unit, _ in team:
            check_hook(unit.config, hooks)
        for result in trained(team, queue, execution, say, stop):
            queue.mark_over(result.run)
            fields = {"timing": result.timing, "device": result.where.get("device")}
            at = result.branched_at_step
            say("done", run=result.run, at=at, status=result.status, loss=result.loss, **fields)
    except (Preempted, Busy) as stopped:
        if isinstance(stopped, Busy):  # another worker took the run over while this one was silent
            say("note", run=team[0][0].run_id, text=str(stopped))
        for run in before:
            say("preempted", run=run)
    except Exception as error:
        again = not isinstance(error, InputError)
        reason = f"{type(error).__name__}: {error}".splitlines()[0] if again else str(error)
        if again:
            traceback.print_exc()
        # Bad input does not mend by trying again, but in a swarm it may be another member's.
        final = not again and len(team) == 1
        for run, count in before.items():
            report_failure(run, queue.failed(run, reason, count, final), say)


def report_failure(run: str, failure: Failure, say: Callable[..., None]) -> None:
    """Also to the log: `scaling status` finds the log of a failed run by this line."""
    print(f"run {run} failed: {failure.reason}", file=sys.stderr, flush=True)
    say("failed", run=run, reason=failure.reason, again=not failure.final)


def trained(
    team: Sequence[tuple[Unit, Held | None]],
    queue: Queue,
    execution: Execution,
    say: Callable[..., None],
    stop: Callable[[], bool],
) -> list[RunResult]:
    """The results of the runs of `team`: one alone, or several of one shape as a swarm."""
    from scaling.engine.hosts import by_first_host
    from scaling.engine.loop import Sharing, train
    from scaling.engine.swarm import Member, train_swarm

    def note(run: str, text: str) -> None:
        say("note", run=run, text=text)

    def progress(state: dict) -> None:
        say("progress", **state)

    members = []
    for unit, held in team:
        folder = queue.folder_of(unit.run_id)
        by_first_host(functools.partial(restore, folder, unit.config))
        sharing = Sharing(unit.saves, tuple(queue.sources(unit)))
        members.append(Member(unit.config, folder, sharing, held))
    if len(members) > 1:
        return train_swarm(members, execution, stop, note, progress)
    (member,) = members
    report = functools.partial(note, member.config.run_id)
    return [train(member.config, member.folder, execution, stop, report, progress, member.sharing, member.held)]


def restore(folder: Path, config: RunConfig) -> None:
    """config.json of a run that has begun, where it is lost; that of a fresh one is written once all is checked."""
    if not holds_only(folder, "failed.json"):
        restore_config(folder, config)


def swarming(execution: Execution) -> bool:
    """Whether runs of one shape train together: on one host, and by itself only where it is an accelerator's."""
    import jax

    if execution.swarm == "off" or execution.mesh or jax.process_count() > 1:
        return False
    return execution.swarm == "on" or jax.default_backend() != "cpu"


def end_with_launcher() -> None:
    """Ends this process when its launcher's ends, even by kill -9, also where no Linux sees to it (hosts.BOUND)."""
    parent = os.environ.get(PARENT)
    if parent is None or not parent.isdigit():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
