"""Commands that show runs: table, diff."""

import json
from pathlib import Path

from sweeps.cli.parse import command


def cmd_table(argv: list[str]) -> int:
    parser = command(
        "table",
        "scaling table runs/quickstart --csv quickstart.csv",
        "The begun runs of one or more folders, pooled. On the terminal columns in which they differ; in the CSV all.",
    )
    parser.add_argument("folders", type=Path, metavar="DIR", nargs="+", help="a sweep, a folder of runs, or a run")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every column there (docs/conventions.md)")
    parser.add_argument("--json", action="store_true", help="print every column as JSON, a list of runs")
    args = parser.parse_args(argv)

    from sweeps.differences import table_text
    from sweeps.table import table

    frame = table(*args.folders)
    if args.csv:
        frame.to_csv(args.csv, index=False)
    print(frame.to_json(orient="records") if args.json else table_text(frame))
    return 0


def cmd_diff(argv: list[str]) -> int:
    parser = command(
        "diff",
        "scaling diff runs/first runs/second",
        "Two runs or two sweeps: in which fields, results, commits and versions they differ.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run or of a sweep")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)

    from sweeps.differences import difference, difference_text

    result = difference(args.a, args.b)
    print(json.dumps(result, default=str) if args.json else difference_text(result, str(args.a), str(args.b)))
    return 0
