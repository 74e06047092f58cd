"""Commands that train sweeps and look after them: sweep, status."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from analysis.text import printable
from models.errors import InputError
from scaling.exit_codes import DONE, FAILED
from sweeps.cli.parse import add_execution, command, fail, number, whole

HEARTBEAT_SECONDS = 5.0


def cmd_sweep(argv: list[str]) -> int:
    parser = command(
        "sweep",
        "scaling sweep quickstart --dry-run",
        "Train a named sweep (sweeps/library) or one defined in FILE.py. Launched again, it does what is missing.",
    )
    parser.add_argument("name", metavar="NAME|FILE.py")
    parser.add_argument("--dial", type=number, help="compute of a named sweep, as a multiple of its smallest form")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost; train nothing")
    parser.add_argument("--json", action="store_true", help="of --dry-run: FLOPs, seconds and runs as JSON")
    parser.add_argument("--out", type=Path, help="the sweep's folder (default: runs/NAME)")
    parser.add_argument("--workers", type=whole, help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--no-sharing", action="store_true", help="train every run from its beginning (same results)")
    parser.add_argument("--swarm", default="auto", help="auto (on an accelerator), on, off: runs of one shape together")
    parser.add_argument("--on", choices=["local", "slurm", "ray"], default="local", help="where the workers run")
    parser.add_argument("--placement", type=Path, metavar="FILE.toml", help="what each worker gets, and where")
    parser.add_argument("--wait", action="store_true", help="with --on slurm: follow the jobs to the end")
    add_execution(parser)
    args = parser.parse_args(argv)
    if args.json and not args.dry_run:
        fail("--json is for --dry-run; of a launched sweep: scaling status DIR --json")
    if args.wait and args.on != "slurm":
        fail(f"--wait is for --on slurm; --on {args.on} follows the sweep to its end by itself")

    from scaling.engine.tracking import check_sinks
    from scaling.execution import Execution
    from sweeps.define import load_sweep
    from sweeps.launch.placement import Placement, read_placement

    placement = read_placement(args.placement) if args.placement else Placement()
    if args.workers is not None:
        if args.workers < 1:
            fail(f"--workers {args.workers}: expected at least 1")
        placement = dataclasses.replace(placement, workers=args.workers)
    with heartbeat("reading the definition"):
        name, sweep = load_sweep(args.name, args.dial)
    folder = args.out or Path("runs") / name
    execution = Execution(
        mesh=placement.mesh,
        checkpoint_seconds=args.checkpoint_seconds,
        eval_every=args.eval_every,
        track=args.track,
        swarm=args.swarm,
    )
    check_sinks(args.track)
    if args.dry_run:
        return dry_run(args, sweep, folder, placement.workers)
    return launch(args, name, sweep, folder, placement, execution)


def launch(args: argparse.Namespace, name: str, sweep, folder: Path, placement, execution) -> int:
    """Trains what is missing; the exit code."""
    from scaling.trust import hooks
    from sweeps.asking import ask
    from sweeps.folder import named_runs
    from sweeps.launch import local
    from sweeps.launch.engine import worker_command
    from sweeps.launch.prepare import prepare, write_launch
    from sweeps.plan import finished_runs, ledger

    if args.on == "local":
        local.placements(placement.workers, 1)
    elif args.on == "slurm":
        from sweeps.launch import slurm

        slurm.import_submitit()
    else:
        from sweeps.launch import ray

        ray.import_ray()
    began = time.monotonic()
    earlier = named_runs(folder)
    with heartbeat(f"planning {len(sweep.runs):,} runs"):
        prepare(name, sweep, folder)
        ask(folder)
        units = write_launch(sweep, folder, execution, not args.no_sharing)
        finished = finished_runs(folder, sweep.runs)
    if dropped := earlier - units.keys():
        say(f"note: {len(dropped)} runs of an earlier definition stay in {folder / 'runs'}, out of this sweep's table")
    to_spend = sum(unit.flops for run, unit in units.items() if run not in finished)
    spent = f"{to_spend:.4g} of {ledger(list(units.values()))['flops_wanted']:.4g} FLOPs to spend"
    before = f" ({len(finished)} finished)" if finished else ""
    say(f"{name}: {len(sweep.runs)} runs{before}, {spent}, in {folder}")
    command = worker_command(folder, hooks(sweep.runs))
    if args.on == "local":
        with Progress() as progress:
            state = local.run_pool(units, folder, command, placement.workers, progress.show, began)
    elif args.on == "slurm":
        state = slurm.launch(folder, placement, say, args.wait, command)
        if not args.wait:
            return 0
    else:
        state = ray.launch(folder, placement, say, command)
    ends = f"{state.finished} finished, {state.diverged} diverged, {len(state.failed)} failed"
    say(f"{name}: {ends} in {time.monotonic() - began:.0f} s")
    if state.failed:
        say("launch the sweep again to try the failed runs once more")
    return DONE if state.finished == len(sweep.runs) and not state.evaluations.failed else FAILED


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Says on standard error, every few seconds, that something goes on."""
    done = threading.Event()

    def beat() -> None:
        began = time.monotonic()
        while not done.wait(HEARTBEAT_SECONDS):
            print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def say(line: str) -> None:
    print(printable(line), flush=True)


def dry_run(args: argparse.Namespace, sweep, folder: Path, workers: int | None) -> int:
    """Prints the runs and their cost; what was never measured on this machine is measured first.

    For a cluster nothing is measured: its time is not this machine's.
    """
    from sweeps import cost
    from sweeps.launch import local
    from sweeps.launch.engine import MOST_WORKERS
    from sweeps.launch.prepare import check_sweep
    from sweeps.measure import measure_missing
    from sweeps.plan import finished_runs, plan_in

    with heartbeat(f"planning {len(sweep.runs):,} runs"):
        check_sweep(sweep, folder)
        finished = finished_runs(folder, sweep.runs)
        units, known, note = plan_in(folder, sweep.runs, not args.no_sharing), None, ""
    left = [config for config in sweep.runs if config.run_id not in finished]
    if args.on == "local":
        places = local.placements(workers, len(sweep.runs))
        workers = len(places)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is being measured is ended and cleared
        try:
            known = measure_missing(left, places, lambda line: print(line, file=sys.stderr, flush=True))
        except InputError as error:
            note = f"the time is not known: {error}"
    else:
        workers = workers or MOST_WORKERS
        note = f"the time on --on {args.on} is not known: it can be measured only there"
    with heartbeat("adding up the cost"):
        result = cost.dry_run_json(units, workers, finished, known, cost.validated_tokens(sweep.runs))
    print(json.dumps(result | {"note": note}) if args.json else cost.dry_run_text(result, note))
    return 0


def cmd_status(argv: list[str]) -> int:
    parser = command(
        "status",
        "scaling status runs/quickstart --watch",
        "How a sweep or a run stands: what is done, running and left, losses against the law's forecast, failures.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--watch", action="store_true", help="look again every 2 s, until nothing runs or waits")
    parser.add_argument("--json", action="store_true", help="one JSON object; with --watch a line at each change")
    args = parser.parse_args(argv)

    from sweeps.status import status_text, sweep_status, watch_here

    if args.watch:
        watch_here(args.folder, args.json)
        return 0
    status = sweep_status(args.folder)
    print(json.dumps(status, indent=1) if args.json else status_text(status))
    return 0


class Progress:
    """Sweep progress: a live bar on a terminal, a line a run elsewhere."""

    def __enter__(self) -> "Progress":
        self.bar = None
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.percentage:3.0f} % of FLOPs"), BarColumn(), TextColumn("{task.description}")
            )
            self.bar.start()
            self.task = self.bar.add_task("starting", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, state, line: str) -> None:
        left = self.time_left(state)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.share(state), description=left)
            if line:
                self.bar.console.print(printable(line), highlight=False, markup=False)
        elif line:
            say(f"{line}  {left}" if left else line)

    def share(self, state) -> float:
        return (state.done_flops + sum(state.partial_flops.values())) / (state.total_flops or 1.0)

    def time_left(self, state) -> str:
        """From this launch's own pace, FLOPs of runs under way counted in."""
        from sweeps.cost import duration

        share, began = self.share(state), state.began_flops / (state.total_flops or 1.0)
        if share - began < 0.005 or state.seconds < 5:
            return ""
        return f"about {duration(state.seconds * (1 - share) / (share - began))} left"
