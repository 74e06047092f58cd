"""The command that asks trained models: evaluate."""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from analysis.text import printable, text_table
from models.errors import InputError, did_you_mean
from scaling.exit_codes import DONE, FAILED
from sweeps.cli.parse import as_text, command, fail, metavar, reader, whole
from sweeps.cli.sweep import Progress, say

SHOWN = 40  # rows of a table on the terminal, unless --json or --csv


def cmd_evaluate(argv: list[str]) -> int:
    parser = command(
        "evaluate",
        "scaling evaluate runs/quickstart loss --option n=256",
        "Ask a finished run, or all finished runs of a sweep, by an evaluation (scaling/evaluation); what is answered "
        "already is read. Without NAME: what has been measured so far. Without DIR: which evaluations there are.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", nargs="?", help="a run, or a sweep")
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the evaluation")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the evaluation")
    parser.add_argument("--seed", type=whole, default=0, help="of what it samples (default: 0)")
    parser.add_argument("--run", action="append", default=[], metavar="ID", help="of a sweep: only this run")
    parser.add_argument("--workers", type=whole, help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--on", choices=["local", "slurm", "ray"], default="local", help="where the workers run")
    parser.add_argument("--placement", type=Path, metavar="FILE.toml", help="what each worker gets, and where")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the long table there")
    parser.add_argument("--json", action="store_true", help="print the long table as JSON, a list of measurements")
    args = parser.parse_args(argv)
    if args.folder is None:
        print(list_text())
        return DONE
    failed = False
    wanted = None
    if args.name is not None:
        from scaling.evaluate import EvaluationConfig, evaluate

        wanted = EvaluationConfig(args.name, options_of(args.name, args.option), args.seed)
        if (args.folder / "config.json").exists():
            from scaling.engine.runtime import set_up_jax

            set_up_jax()
            evaluate(args.folder, wanted)
        else:
            failed = evaluate_sweep(args, wanted)
    elif args.option or args.run:
        fail("--option, --run: of an evaluation; name one")
    return show(args, wanted) or (FAILED if failed else DONE)


def list_text() -> str:
    """The evaluations, and their options with their defaults."""
    from scaling import evaluation

    rows = []
    for name in evaluation.names():
        kind = evaluation.class_of(name)
        options = ", ".join(f"{f.name}={as_text(f.default)}" for f in dataclasses.fields(kind))
        rows.append([name, kind.SUMMARY, options])
    return text_table([["name", "what it measures", "options"], *rows], left=3)


def options_of(name: str, given: list[str]) -> str:
    """The JSON object of --option KEY=VALUE, each of the type of its field."""
    from scaling import evaluation
    from scaling.fields import fields_of

    fields, values = fields_of(evaluation.class_of(name)), {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key not in fields:
            known = ", ".join(fields)
            fail(f"--option {text!r}: {name} takes {known or 'none'}, as KEY=VALUE{did_you_mean(key, fields)}")
        try:
            values[key] = reader(fields[key][1])(value)
        except argparse.ArgumentTypeError as error:
            fail(f"--option {text!r}: {error}, expected {metavar(fields[key][1])}")
    return json.dumps(values) if values else ""


def evaluate_sweep(args: argparse.Namespace, wanted) -> bool:
    """Has the finished runs of a sweep asked by workers; whether one failed. Trains nothing."""
    from scaling.trust import check_sweep_links
    from sweeps.asking import Asked, ask, unask
    from sweeps.folder import is_sweep, read_description
    from sweeps.launch import local, ray, slurm
    from sweeps.launch.asking import Asking
    from sweeps.launch.engine import worker_command
    from sweeps.launch.placement import Placement, read_placement

    folder = args.folder
    if not is_sweep(folder):
        raise InputError(f"{folder}: neither a run (config.json) nor a sweep (sweep.json)")
    check_sweep_links(folder)
    description = read_description(folder)
    for run in args.run:
        if run not in description.runs:
            fail(f"--run {run}: not in {folder}{did_you_mean(run, description.runs)}")
    if args.workers is not None and args.workers < 1:
        fail(f"--workers {args.workers}: expected at least 1")
    placement = read_placement(args.placement) if args.placement else Placement()
    if args.workers is not None:
        placement = dataclasses.replace(placement, workers=args.workers)
    began = time.monotonic()
    finished = [run for run in args.run or description.runs if Asking(folder).is_finished(run)]
    if not finished:
        which = " or ".join(args.run) if args.run else f"{len(description.runs)} runs"
        fail(f"{folder}: of {which} none has finished, so there is no model to ask; scaling status says how they stand")
    ask(folder, [Asked(wanted, tuple(args.run))])
    work = worker_command(folder, training=False)
    quiet = args.json
    if args.on == "local":
        with Progress() as progress:
            show = (lambda state, line: None) if quiet else progress.show
            evaluations = local.run_pool({}, folder, work, placement.workers, show, began).evaluations
    else:
        engine = slurm if args.on == "slurm" else ray
        launched = engine.launch(folder, placement, say, command=work, **({"wait": True} if engine is slurm else {}))
        evaluations = launched.evaluations
    failed = {run: reason for (run, key), reason in evaluations.failed.items() if key == wanted.key}
    if len(set(failed.values())) == 1 and len(failed) == evaluations.asked[wanted.key]:
        unask(folder, wanted)
        fail(next(iter(failed.values())))  # of all runs for one reason: the question is at fault
    for run, reason in failed.items():
        say(f"run {run}: {reason}")
    return bool(failed)


def show(args: argparse.Namespace, wanted) -> int:
    from sweeps.asking import measurements

    frame = measurements(args.folder)
    if wanted is not None:
        asked = (frame["evaluation"] == wanted.name) & (frame["options"] == wanted.options)
        frame = frame[asked & (frame["evaluation_seed"] == wanted.seed)]
    if args.run:
        frame = frame[frame["run"].isin(args.run)]
    frame = frame.dropna(axis=1, how="all") if args.json else frame
    if args.csv:
        frame.to_csv(args.csv, index=False)
    if args.json:
        print(frame.to_json(orient="records"))
        return DONE
    if not len(frame):
        say("nothing has been measured here; scaling evaluate lists the evaluations")
        return DONE
    print(measurements_text(frame))
    return DONE


def measurements_text(frame) -> str:
    """The measurements, and of the runs' columns N, D and those in which they differ; long ones show their ends."""
    names = list(frame.columns)
    axes = names[names.index("n") + 1 : names.index("flops_evaluation")]
    shown = frame.dropna(axis=1, how="all")
    asked = [c for c in ("options", "evaluation_seed") if shown[c].nunique() > 1]
    columns = ["run", "n_compute", "tokens", "evaluation", *asked, "metric", *axes, "value", "stderr", "n"]
    columns = [c for c in columns if c in shown]
    rows = [[cell(values[c]) for c in columns] for _, values in shown.iterrows()]
    if len(rows) > SHOWN:
        rows = [*rows[: SHOWN // 2], ["..."] + [""] * (len(columns) - 1), *rows[-SHOWN // 2 :]]
    return text_table([columns, *rows], left=1)


def cell(value) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4g}"
    return printable(f"{value:,}" if isinstance(value, int) else str(value))
