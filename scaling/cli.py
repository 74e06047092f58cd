"""The command line. It imports the rooms only when a command needs them, so that --help answers at once."""

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from scaling import cli_analysis as analysis_commands
from scaling.cli_parse import EXIT_BAD_INPUT, Parser, command, fail, number, whole
from scaling.data.hints import did_you_mean

EXIT_PREEMPTED = 75

DESCRIPTION = "Train small language models over N and D, fit the scaling law, predict the large one."
EPILOG = """examples:
  scaling sweep quickstart --dry-run      what the quickstart would train, and its cost
  scaling sweep quickstart                train it; a second launch does only what is missing
  scaling report runs/quickstart          fit, check the held-out runs, write report.html
  scaling fit runs.csv --n-column params --d-column tokens --out fit.json
  scaling predict fit.json --n 1e9 --d 2e10"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="scaling",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", metavar="COMMAND", help=", ".join(f"{k}: {v[1]}" for k, v in COMMANDS.items()))
    if not argv or argv[0] in ("-h", "--help"):
        print(parser.format_usage() + "\n" + DESCRIPTION + "\n\ncommands:")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:12s} {summary}")
        print("\n" + EPILOG + "\n\nscaling COMMAND --help tells the options of each.")
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] not in COMMANDS:
        fail(f"unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}; see scaling --help")
    warnings.formatwarning = lambda message, category, *_: f"note: {message}\n"  # one line, no place in our source
    try:
        return COMMANDS[argv[0]][0](argv[1:]) or 0
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if (
            type(error).__name__ != "InputError"
        ):  # models and analysis each have their own, and neither imports the other
            raise
        fail(str(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(f"{error.filename or 'file'}: {error.strerror or error}")


def add_config(parser: Parser) -> None:
    """An option for every field of a RunConfig, and --n."""
    from scaling.run import RunConfig
    from sweeps.define import field_paths

    defaults = RunConfig()
    parser.add_argument("--n", type=number, help="n_compute of the model, in parameters; the shape follows from it")
    for path, kind in field_paths().items():
        head, _, tail = path.partition(".")
        default = getattr(getattr(defaults, head), tail) if tail else getattr(defaults, head)
        names = ["--" + path.replace("_", "-")] + (["--repeat"] if path == "data.repeat" else [])
        if kind is bool:
            parser.add_argument(*names, dest=path, action=argparse.BooleanOptionalAction, help=f"(default: {default})")
        else:
            convert = {int: whole, float: number}.get(kind, str)
            parser.add_argument(*names, dest=path, type=convert, metavar=kind.__name__, help=f"(default: {default})")


def config_of(args: dict):
    """The RunConfig of the options that `add_config` made."""
    from scaling.run import RunConfig
    from sweeps.define import configure, field_paths

    return configure(RunConfig(), {path: args[path] for path in ["n", *field_paths()] if args[path] is not None})


def cmd_plan_memory(argv: list[str]) -> int:
    from scaling.run import Execution, mesh_sizes

    parser = command(
        "plan-memory",
        "scaling plan-memory --n 7e9 --model.vocab-size 32768 --data.seq-len 2048 --batch-size 256 "
        "--mesh fsdp=256 --layers scanned --remat full",
        "Bytes per device of a run on a mesh. The program is compiled ahead of time on virtual CPU devices, so no "
        "accelerator is needed, and nothing is allocated.",
    )
    add_config(parser)
    add_implementation(parser)
    parser.add_argument("--device-memory", type=number, metavar="GIB", help="of one device: refuse what will not fit")
    parser.add_argument("--no-compile", action="store_true", help="only count what is needed at the least")
    parser.add_argument("--here", action="store_true", help="compile for the devices of this machine")
    parser.add_argument("--json", action="store_true")
    args = vars(parser.parse_args(argv))
    config, execution = config_of(args), Execution(**{name: args[name] for name in IMPLEMENTATION})
    if not args["here"]:
        devices = math.prod(mesh_sizes(execution.mesh).values())
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        os.environ["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
        os.environ["JAX_PLATFORMS"] = "cpu"
    from scaling.runtime import set_up_jax

    set_up_jax()
    from scaling.memory import plan, plan_text

    limit = None if args["device_memory"] is None else int(args["device_memory"] * 2**30)
    result = plan(config, execution, not args["no_compile"], limit)
    print(json.dumps(result) if args["json"] else plan_text(result))
    return 0


def cmd_train(argv: list[str]) -> int:
    from scaling.run import Execution, mesh_sizes

    parser = command(
        "train",
        "scaling train --n 1e5 --tokens 2e6 --optim.lr 0.01 --out runs/mine",
        "Train one run. The same command again continues it, or returns at once where it is finished.",
    )
    add_config(parser)
    add_execution(parser)
    add_implementation(parser)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several is reached")
    parser.add_argument("--processes", type=whole, help="how many processes (hosts) train together")
    parser.add_argument("--process", type=whole, help="the number of this one, from 0")
    parser.add_argument("--host-timeout", type=whole, default=60, help="seconds of silence after which a host is lost")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/RUN_ID)")
    args = vars(parser.parse_args(argv))

    config = config_of(args)
    folder = args["out"] or Path("runs") / config.run_id
    execution = Execution(
        checkpoint_seconds=args["checkpoint_seconds"],
        eval_every=args["eval_every"],
        track=args["track"],
        **{name: args[name] for name in IMPLEMENTATION},
    )
    from scaling import hosts

    group = hosts.Hosts(args["coordinator"], args["processes"], args["process"], args["host_timeout"])
    together = group.coordinator is not None or hosts.detected(os.environ)
    if together and hosts.SUPERVISED not in os.environ:
        name = str(group.process) if group.process is not None else os.environ.get("SLURM_PROCID", os.uname().nodename)
        return hosts.supervise([sys.executable, "-m", "scaling.cli", "train", *argv], name, folder)
    from scaling.runtime import set_up_jax

    set_up_jax(1 if together else math.prod(mesh_sizes(execution.mesh).values()))
    from scaling.train import Busy, Preempted, train

    if together:
        hosts.connect(group)
    n = config.counts.n_compute
    if config.schedule.warmup_tokens >= config.trained_tokens:
        print(f"note: schedule.warmup_tokens = {config.schedule.warmup_tokens:,} is all of the run; lower it")
    print(f"run {config.run_id}: N {n:,}, D {config.trained_tokens:,}, {config.flops:.3g} FLOPs, in {folder}")
    with StopOnSignal() as stop:
        try:
            result = train(config, folder, execution, stop.requested, print, print_progress)
        except Preempted as stopped:
            print(stopped)
            return EXIT_PREEMPTED
        except Busy as busy:
            fail(str(busy))
    if result["status"] != "finished":
        print(f"diverged at step {result['diverged_at_step']}; lower optim.lr and train into another folder")
        return 1
    print(f"loss {result['loss']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte on the validation split")
    return 0


def cmd_sweep(argv: list[str]) -> int:
    parser = command(
        "sweep",
        "scaling sweep quickstart --dry-run",
        "Train a named sweep (sweeps/library) or one defined in FILE.py. Launched again, it does what is missing.",
    )
    parser.add_argument("name", metavar="NAME|FILE.py")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost; train nothing")
    parser.add_argument("--out", type=Path, help="the sweep's folder (default: runs/NAME)")
    parser.add_argument("--workers", type=whole, help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--no-sharing", action="store_true", help="train every run from its beginning (same results)")
    add_execution(parser)
    args = parser.parse_args(argv)

    from scaling.run import Execution
    from sweeps.define import load_sweep
    from sweeps.launch import local

    name, sweep = load_sweep(args.name)
    folder = args.out or Path("runs") / name
    if args.dry_run:
        from sweeps.cost import dry_run
        from sweeps.measure import measure_missing

        local.check(sweep)
        finished = {c.run_id for c in sweep.runs if (folder / "runs" / c.run_id / "result.json").exists()}
        left = [config for config in sweep.runs if config.run_id not in finished]
        places = local.placements(args.workers, len(sweep.runs))
        known = measure_missing(left, places, lambda line: print(line, file=sys.stderr, flush=True))
        print(dry_run(sweep.runs, len(places), finished, known, not args.no_sharing))
        return 0
    local.placements(args.workers, 1)
    execution = Execution(checkpoint_seconds=args.checkpoint_seconds, eval_every=args.eval_every, track=args.track)
    began = time.monotonic()
    local.prepare(name, sweep, folder)
    print(f"{name}: {len(sweep.runs)} runs, {sum(c.flops for c in sweep.runs):.4g} FLOPs, in {folder}", flush=True)
    with Progress() as progress:
        state = local.launch(sweep, folder, args.workers, execution, progress.show, began, not args.no_sharing)
    ends = f"{state.finished} finished, {state.diverged} diverged, {len(state.failed)} failed"
    print(f"{name}: {ends} in {state.seconds:.0f} s")
    if state.failed:
        print("launch the sweep again to try the failed runs once more")
    return 1 if state.failed else 0


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


def cmd_tune(argv: list[str]) -> int:
    parser = command(
        "tune",
        "scaling tune runs/quickstart_tuning --out rule.json",
        "Fit a rule for learning rate and batch through the optima of a sweep over optim.lr (and batch_size).",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rule, for sweeps.hyperparameters.load_rule")
    args = parser.parse_args(argv)

    from sweeps.table import table
    from sweeps.tuning import save, tune

    tuned = tune(table(args.folder), args.folder.name)
    print(tuned.text)
    if args.out:
        save(tuned, args.out)
        print(f"rule: {args.out}")
    return 0


def cmd_health(argv: list[str]) -> int:
    parser = command(
        "health",
        "scaling health runs/quickstart",
        "Was each size of a sweep well tuned? Learning-rate grids, collapse of loss curves, and a verdict per size.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--coordinates", action="store_true", help="train ten steps of each size: the coordinate check")
    args = parser.parse_args(argv)

    from sweeps.health import coordinates, coordinates_text, health, health_text

    print(health_text(health(args.folder)))
    if args.coordinates:
        from scaling.runtime import set_up_jax

        set_up_jax()
        coordinates(args.folder)
    if said := coordinates_text(args.folder):
        print(said)
    return 0


def add_execution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint-seconds", type=number, default=120.0, help="least time between two checkpoints")
    parser.add_argument("--eval-every", type=whole, default=0, help="tokens between validations; 0: only at the end")
    parser.add_argument("--track", default="", help="tensorboard, wandb, or both with a comma")


IMPLEMENTATION = {  # option: (type, help); none of them changes a result beyond rounding
    "mesh": (
        str,
        "sizes of data, fsdp, tensor, sequence, such as fsdp=4,tensor=2 (default: one device; a CPU has one a core)",
    ),
    "accumulate": (whole, "parts of a batch that are run one after another"),
    "attention": (str, "auto, plain, blocked, cudnn or splash"),
    "layers": (str, "auto, unrolled or scanned"),
    "remat": (str, "none, dots or full: what the backward pass computes again to save memory"),
    "loss_chunks": (whole, "parts that the logits are made in; 0: by their size"),
}


def add_implementation(parser: argparse.ArgumentParser) -> None:
    from scaling.run import Execution

    defaults = Execution()
    for name, (kind, text) in IMPLEMENTATION.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=getattr(defaults, name), help=text)


class StopOnSignal:
    """Within it, SIGTERM and Ctrl-C are noted, so that a run saves its state before it leaves."""

    def __enter__(self) -> "StopOnSignal":
        self.seen = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for code, handler in self.before.items():
            signal.signal(code, handler)

    def note(self, *_: object) -> None:
        if self.seen:
            raise KeyboardInterrupt  # asked twice: leave now, with what the last checkpoint holds
        self.seen = True

    def requested(self) -> bool:
        return self.seen


def print_progress(state: dict) -> None:
    left = f"{state['seconds_left']:.0f} s left"
    rate = f"{state['tokens_per_second']:,.0f} tokens/s"
    print(f"step {state['step']} of {state['steps']}  loss {state['loss']:.4f}  {rate}  {left}", flush=True)


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
                self.bar.console.print(line, highlight=False, markup=False)
        elif line:
            print(f"{line}  {left}" if left else line, flush=True)

    def share(self, state) -> float:
        return (state.done_flops + sum(state.partial_flops.values())) / state.total_flops

    def time_left(self, state) -> str:
        """From this launch's own pace, FLOPs of runs under way counted in."""
        from sweeps.cost import duration

        share, began = self.share(state), state.began_flops / state.total_flops
        if share - began < 0.005 or state.seconds < 5:
            return ""
        return f"about {duration(state.seconds * (1 - share) / (share - began))} left"


COMMANDS = {
    "train": (cmd_train, "train one run"),
    "sweep": (cmd_sweep, "train a sweep over N and D"),
    "status": (cmd_status, "how a sweep stands"),
    "plan-memory": (cmd_plan_memory, "bytes per device of a run on a mesh"),
    "tune": (cmd_tune, "fit a learning-rate and batch rule to a tuning sweep"),
    "health": (cmd_health, "was each size of a sweep well tuned"),
    "fit": (analysis_commands.cmd_fit, "fit a scaling law to runs or to a table"),
    "predict": (analysis_commands.cmd_predict, "the loss at N and D, with an interval"),
    "allocate": (analysis_commands.cmd_allocate, "compute-optimal N and D for a budget"),
    "backtest": (analysis_commands.cmd_backtest, "error and coverage against how far a law is extrapolated"),
    "compare": (analysis_commands.cmd_compare, "laws side by side, by how well they predict"),
    "multiverse": (analysis_commands.cmd_multiverse, "refit under every convention; how far do the answers move"),
    "curves": (analysis_commands.cmd_curves, "laws of the whole loss curve, for schedules not run"),
    "bench": (analysis_commands.cmd_bench, "measure speed on this machine"),
    "report": (analysis_commands.cmd_report, "fit, check the hold-out, write report.html"),
}

if __name__ == "__main__":
    sys.exit(main())
