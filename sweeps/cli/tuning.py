"""The commands that judge how runs were tuned: tune, health."""

import argparse
from pathlib import Path

from analysis.errors import InputError
from sweeps.cli.options import print_lines
from sweeps.cli.parse import command, fail

COLUMNS = {  #: option: what column it names
    "n_column": "N (default: n_compute, or a usual name)",
    "d_column": "D, tokens",
    "lr_column": "the peak learning rate",
    "batch_column": "the batch, in windows, or in tokens where there is no seq_len",
    "loss_column": "the loss (default: loss)",
}


def cmd_tune(argv: list[str]) -> int:
    parser = command(
        "tune",
        "scaling tune runs/quickstart_tuning --out rule.json",
        "Fit a rule for learning rate and batch through the optima of a sweep over optim.lr (and batch_size).",
    )
    add_source(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rule, for sweeps.hyperparameters.load_rule")
    parser.add_argument("--parametrization", metavar="NAME", help="only its runs; by default each is tuned by itself")
    args = parser.parse_args(argv)

    from analysis.tuning.rule import by_parametrization, save, tune

    by_name = by_parametrization(runs_to_judge(args))
    if args.parametrization:
        if args.parametrization not in by_name:
            fail(f"--parametrization {args.parametrization}: expected one of {', '.join(by_name)}")
        by_name = {args.parametrization: by_name[args.parametrization]}
    if args.out and len(by_name) > 1:
        fail(f"--out {args.out}: {len(by_name)} rules, one a parametrisation; choose with --parametrization")
    errors = []
    for name, runs in by_name.items():
        try:
            tuned = tune(runs, args.source.name)
            print_lines(f"{name}:\n{tuned.text}\n" if len(by_name) > 1 else tuned.text)
        except InputError as error:
            errors.append(error)
            if len(errors) == len(by_name):
                raise
            print_lines(f"{name}:\nnote: {error}\n")
    if args.out:
        save(tuned, args.out)
        print(f"rule: {args.out}")
    return 0


def cmd_health(argv: list[str]) -> int:
    parser = command(
        "health",
        "scaling health runs/quickstart",
        "Was each size of a sweep well tuned? Learning-rate grids, collapse of loss curves, and a verdict per size. "
        "A table has no curves: its sizes are compared by their last losses.",
    )
    add_source(parser)
    parser.add_argument("--coordinates", action="store_true", help="train ten steps of each size: the coordinate check")
    parser.add_argument(
        "--allow-hook",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="an optimiser that a run of the folder names, which --coordinates may import and call",
    )
    args = parser.parse_args(argv)

    from analysis.tuning import health as checks

    if not args.source.is_dir():
        if args.coordinates or args.allow_hook:
            fail(f"--coordinates trains the models of a sweep's folder; {args.source} is a table")
        print_lines(checks.health_text(checks.health(runs_to_judge(args))))
        return 0
    if args.allow_hook and not args.coordinates:
        fail("--allow-hook is for --coordinates; without it nothing is imported or called")
    from sweeps.health import coordinates, coordinates_text, health

    refuse_columns(args)
    print_lines(checks.health_text(health(args.source)))
    if args.coordinates:
        from scaling.engine.runtime import set_up_jax

        set_up_jax()
        coordinates(args.source, args.allow_hook)
    if text := coordinates_text(args.source):
        print_lines(text)
    return 0


def add_source(parser: argparse.ArgumentParser) -> None:
    text = "the folder of a sweep, or a CSV or parquet file of runs"
    parser.add_argument("source", type=Path, metavar="DIR|FILE", help=text)
    for name, what in COLUMNS.items():
        parser.add_argument("--" + name.replace("_", "-"), help=f"of a table: the column of {what}")


def runs_to_judge(args: argparse.Namespace):
    from analysis.tables import read_table
    from analysis.tuning.table import tuning_table

    if args.source.is_dir():
        from sweeps.table import table

        refuse_columns(args)
        return tuning_table(table(args.source))
    given = {name: getattr(args, name) for name in COLUMNS if getattr(args, name)}
    return tuning_table(read_table(args.source), **given)


def refuse_columns(args: argparse.Namespace) -> None:
    for name in COLUMNS:
        if getattr(args, name):
            fail(f"--{name.replace('_', '-')}: the folder of a sweep has columns of its own; for a table only")
