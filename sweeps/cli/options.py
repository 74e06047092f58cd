"""What the commands that read finished runs share: their options, the runs these name, and how a result is printed."""

import argparse
import json
import math
import sys
from pathlib import Path

from sweeps.cli.parse import fail, number

LARGE = 20 * 2**20  # bytes of a file from which on reading it takes seconds
LAW_HELP = "auto, or the name of a law (docs/analysis.md lists them)"


COLUMNS = {  #: option: its settings; how a table is read
    "where": {"metavar": "EXPR", "help": "rows to use at all: 'loss < 3.44'"},
    "n_column": {"help": "column of N (default: n_compute)"},
    "d_column": {"help": "column of D, tokens (default: tokens)"},
    "c_column": {"help": "column of C, FLOPs; D = C/6N where there is no D"},
    "loss_column": {"default": "loss", "help": "(default: loss)"},
    "n_unit": {"type": number, "help": "what N is counted in: 1e6 for millions"},
    "d_unit": {"type": number, "help": "what D is counted in: 1e9 for billions"},
    "loss_unit": {"choices": ["nats", "bits"], "help": "unit of the loss; bits are turned into nats"},
}


def add_source(parser: argparse.ArgumentParser) -> None:
    text = "sweeps' folders, or CSV or parquet files; several are pooled"
    parser.add_argument("source", type=Path, nargs="+", metavar="DIR|FILE", help=text)
    parser.add_argument("--holdout", metavar="EXPR", help="runs to predict, not to fit: 'flops > 1e12'")
    add_columns(parser)
    text = "column of a law's other input: x=samples, U=unique_tokens"
    parser.add_argument("--input", action="append", default=[], metavar="NAME=COLUMN", help=text)


def add_columns(parser: argparse.ArgumentParser) -> None:
    for name, settings in COLUMNS.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_figures(parser: argparse.ArgumentParser) -> None:
    """For the commands that make figures; the others do not know the option, and so refuse it."""
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write the figures there, as PNG and SVG")


def runs_of(args: argparse.Namespace):
    """(Runs, facts about each sweep, law) of the folders and files that were named, pooled, by the options given."""
    from analysis.laws.forms import LAWS
    from analysis.runs import read_runs

    frame, sweeps = frame_of(args.source)
    given = {"holdout": args.holdout, "law": args.law}
    for key in given:
        if given[key] is None:
            given[key] = common(key, sweeps)
    columns = {name: getattr(args, name) for name in COLUMNS}
    law = given["law"] or "auto"
    columns["signed"] = law in LAWS and LAWS[law].metric.link == "identity"
    runs = read_runs(frame, holdout=given["holdout"], inputs=pairs("--input", args.input), **columns)
    return runs, sweeps, law


def notes_text(runs) -> str:
    """What reading the runs found, for the commands whose result does not hold it."""
    return "".join(f"\nnote: {note}" for note in runs.notes)


def frame_of(sources: list[Path]):
    """(one table of all runs, with the source of each in `sweep` where there are several; facts about each sweep)."""
    from analysis.tables import pool, read_table

    folders, frames, sweeps = [source for source in sources if source.is_dir()], {}, []
    if folders:
        from sweeps.summary import describe
        from sweeps.table import table

        sweeps = [describe(folder) for folder in folders]
        frames[folders[0].name] = table(*folders)
    for source in sources:
        if source not in folders:
            if source.exists() and source.stat().st_size > LARGE:
                print(f"reading {source} ({source.stat().st_size / 2**20:,.0f} MiB)", file=sys.stderr, flush=True)
            frames[str(source)] = read_table(source)
    return pool(frames) if len(sources) > 1 else next(iter(frames.values())), sweeps


def common(key: str, sweeps: list[dict]) -> str | None:
    """What every sweep says of its hold-out or law, or None where none says anything."""
    values = {str(sweep[key]) if sweep.get(key) is not None else None for sweep in sweeps}
    if len(values) > 1:
        each = "; ".join(f"{sweep['name']}: {sweep.get(key)}" for sweep in sweeps)
        fail(f"the folders have different values of {key} ({each}); say which with --{key}")
    return values.pop() if values else None


def print_result(args, record, text: str) -> int:
    """The JSON or the text, what came from a file made harmless for a terminal."""
    if args.json:
        print(json.dumps(finite(record), indent=1, allow_nan=False))
    else:
        print_lines(text)
    return 0


def print_lines(text: str) -> None:
    from analysis.text import printable

    print("\n".join(printable(line) for line in text.split("\n")))


def finite(value):
    """A result as JSON has it: what is not a finite number is null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figures(folder: Path, figures: dict) -> None:
    """Each figure as NAME.png and NAME.svg."""
    from analysis.files import inside, write_bytes, write_text
    from analysis.report.plots import to_png, to_svg

    for name, figure in figures.items():
        write_text(inside(folder, f"{name}.svg"), to_svg(figure))
        write_bytes(inside(folder, f"{name}.png"), to_png(figure))


def pairs(option: str, given: list[str]) -> dict[str, str]:
    """['a=b'] as {'a': 'b'}."""
    values = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            fail(f"{option} {text}: expected NAME=VALUE")
        values[name] = value
    return values


def number_of(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        fail(f"{option} {name}={text}: {text!r} is not a number")
