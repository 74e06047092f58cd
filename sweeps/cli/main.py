"""The command line. It imports the rooms only when a command needs them, so that --help answers at once."""

import argparse
import json
import math
import os
import signal
import sys
import warnings
from pathlib import Path

from analysis.errors import InputError as AnalysisInputError
from analysis.text import printable
from models.errors import InputError, did_you_mean
from scaling.exit_codes import BAD_INPUT, DONE, FAILED, PREEMPTED
from sweeps.cli import (
    bench,
    chat,
    curves,
    evaluate,
    fit,
    predict,
    report,
    runs,
    sample,
    sources,
    study,
    tuning,
    validate,
)
from sweeps.cli import sweep as sweep_commands
from sweeps.cli.parse import Parser, add_execution, as_text, command, fail, metavar, number, positive, reader, whole

BAD_INPUT_ERRORS = (InputError, AnalysisInputError)  # neither room imports the other

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
        print("\n" + EPILOG + "\n\nscaling COMMAND --help lists the options of each.")
        return DONE if argv else BAD_INPUT
    if argv[0] not in COMMANDS:
        fail(f"unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}; see scaling --help")
    # One line, without the place in our source.
    warnings.formatwarning = lambda message, category, *_: f"note: {printable(str(message))}\n"
    try:
        return COMMANDS[argv[0]][0](argv[1:]) or DONE
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except KeyboardInterrupt:
        return 130
    except BAD_INPUT_ERRORS as error:
        fail(str(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(f"{error.filename or 'file'}: {error.strerror or error}")


def add_config(parser: Parser) -> None:
    """An option for every field of a RunConfig, and --n."""
    from scaling.config import RunConfig
    from scaling.fields import leaves, value_at

    absent = argparse.SUPPRESS
    about = "n_compute of the model, in parameters; the shape follows from it"
    parser.add_argument("--n", type=number, default=absent, help=about)
    for path, kind in leaves(RunConfig).items():
        default = as_text(value_at(RunConfig(), path))
        names = ["--" + path.replace("_", "-")] + (["--repeat"] if path == "data.repeat" else [])
        options = {"dest": path, "default": absent, "help": f"(default: {default})"}
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(*names, type=reader(kind), metavar=metavar(kind), **options)


def config_of(args: dict, base=None):
    """The RunConfig of the options that `add_config` made, over `base`, a RunConfig."""
    from scaling.config import RunConfig
    from scaling.fields import leaves
    from sweeps.define import configure

    return configure(base or RunConfig(), {path: args[path] for path in ["n", *leaves(RunConfig)] if path in args})


def cmd_plan_memory(argv: list[str]) -> int:
    from scaling.execution import Execution, mesh_sizes

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
    if args["device_memory"] is not None:
        positive("--device-memory", args["device_memory"])
    if not args["here"] and not args["no_compile"]:
        devices = math.prod(mesh_sizes(execution.mesh).values())
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        os.environ["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
        os.environ["JAX_PLATFORMS"] = "cpu"
    from scaling.engine.runtime import set_up_jax

    set_up_jax()
    from scaling.engine.memory import plan, plan_text

    limit = None if args["device_memory"] is None else int(args["device_memory"] * 2**30)
    result = plan(config, execution, not args["no_compile"], limit)
    print(json.dumps(result) if args["json"] else plan_text(result))
    return DONE


def cmd_train(argv: list[str]) -> int:
    from scaling.chain import parent_of
    from scaling.execution import Execution, mesh_sizes

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

    base, home = None, Path("runs")
    if args.get("parent"):
        base, home = child_base(args["parent"], args["out"])
        args["parent"] = base.parent
    config = config_of(args, base)
    folder = args["out"] or home / config.run_id
    execution = Execution(
        checkpoint_seconds=args["checkpoint_seconds"],
        eval_every=args["eval_every"],
        track=args["track"],
        **{name: args[name] for name in IMPLEMENTATION},
    )
    from scaling.engine import hosts

    group = hosts.Hosts(args["coordinator"], args["processes"], args["process"], args["host_timeout"])
    together = group.coordinator is not None or hosts.detected(os.environ)
    if together and hosts.SUPERVISED not in os.environ:
        name = str(group.process) if group.process is not None else os.environ.get("SLURM_PROCID", os.uname().nodename)
        return hosts.supervise([sys.executable, "-m", "sweeps.cli", "train", *argv], name, folder)
    if not together:  # several hosts may see a parent's end at different times: they wait for it
        parent_of(config, folder)
    from scaling.engine.runtime import set_up_jax

    set_up_jax(1 if together else math.prod(mesh_sizes(execution.mesh).values()))
    from scaling.engine.loop import Busy, Preempted, train

    if together:
        hosts.connect(group)
    n = config.counts.n_compute
    if config.schedule.warmup_tokens >= config.trained_tokens:
        print(f"note: schedule.warmup_tokens = {config.schedule.warmup_tokens:,} is all of the run; lower it")
    print(f"run {config.run_id}: N {n:,}, D {config.trained_tokens:,}, {config.flops:.3g} FLOPs, in {folder}")
    with StopOnSignal() as stop:
        try:
            report = lambda line: print(printable(line))  # noqa: E731
            result = train(config, folder, execution, stop.requested, report, print_progress)
        except Preempted as stopped:
            print(stopped)
            return PREEMPTED
        except Busy as busy:
            fail(str(busy))
    if not result.finished:
        print(f"diverged at step {result.diverged_at_step}; lower optim.lr and train into another folder")
        return FAILED
    per_byte = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits/byte"
    print(f"loss {result.loss:.4f} nats/token{per_byte} on the validation split")
    return DONE


def child_base(name: str, out: Path | None):
    """(the RunConfig that a child's options stand over, with its parent's model, tokenizer and id; the folder it lies
    in) for a parent that is named by its folder or its id.

    Raises InputError where the folder that is named is not the one the child would take: it must lie beside the child.
    """
    from scaling.chain import folder_beside
    from scaling.config import RunConfig
    from scaling.fields import replaced
    from scaling.folder import read_config
    from scaling.trust import RUN_ID

    named, by_id = Path(name), RUN_ID.fullmatch(name) and not Path(name).exists()
    if by_id:
        home = Path("runs") if out is None else out.parent
        named = folder_beside(home / "child", name)
        if not (named / "config.json").exists():
            raise InputError(f"--parent {name!r}: no such run in {home}; train it there first")
    elif not (named / "config.json").exists():
        raise InputError(f"--parent {name!r}: expected a run's folder, or the id of one in runs")
    else:
        home = named.absolute().parent if out is None else out.parent
    parent = read_config(named)
    taken = folder_beside(home / "child", parent.run_id)
    if home.resolve() != named.absolute().parent.resolve():
        raise InputError(
            f"--parent {name!r}: must lie beside the run, in {home}; copy it there, or train into --out "
            f"{named.absolute().parent / 'NAME'}"
        )
    if taken.resolve() != named.resolve():
        raise InputError(f"--parent {name!r}: {taken} is that run too and comes first; name it, or move it away")
    given = {"model": parent.model, "data.tokenizer": parent.data.tokenizer, "parent": parent.run_id}
    return replaced(RunConfig(), given), home


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
    from scaling.execution import Execution

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
    loss = "-" if state["loss"] is None else f"{state['loss']:.4f}"
    print(f"step {state['step']} of {state['steps']}  loss {loss}  {rate}  {left}", flush=True)


COMMANDS = {
    "train": (cmd_train, "train one run"),
    "sweep": (sweep_commands.cmd_sweep, "train a sweep over N and D"),
    "study": (study.cmd_study, "train, ask and judge a study, its claims written down first"),
    "status": (sweep_commands.cmd_status, "how a sweep stands"),
    "table": (runs.cmd_table, "the runs of folders as one table, or as CSV"),
    "diff": (runs.cmd_diff, "in what two runs or two sweeps differ"),
    "evaluate": (evaluate.cmd_evaluate, "ask trained runs: loss, answers, pass@k, KL"),
    "chat": (chat.cmd_chat, "talk to trained models, on a page or in the terminal"),
    "sample": (sample.cmd_sample, "let a trained model continue prompts"),
    "plan-memory": (cmd_plan_memory, "bytes per device of a run on a mesh"),
    "tune": (tuning.cmd_tune, "fit a learning-rate and batch rule to a tuning sweep"),
    "health": (tuning.cmd_health, "was each size of a sweep well tuned"),
    "fit": (fit.cmd_fit, "fit a scaling law to runs or to a table"),
    "predict": (predict.cmd_predict, "the loss at N and D, with an interval"),
    "allocate": (predict.cmd_allocate, "compute-optimal N and D for a budget"),
    "backtest": (validate.cmd_backtest, "error and coverage against how far a law is extrapolated"),
    "compare": (validate.cmd_compare, "laws side by side, by how well they predict"),
    "multiverse": (validate.cmd_multiverse, "refit under every convention; how far do the answers move"),
    "curves": (curves.cmd_curves, "laws of the whole loss curve, for schedules not run"),
    "bench": (bench.cmd_bench, "measure speed on this machine"),
    "sources": (sources.cmd_sources, "what runs can be trained on, and the exact facts of a task"),
    "report": (report.cmd_report, "fit, check the hold-out, write report.html"),
}
