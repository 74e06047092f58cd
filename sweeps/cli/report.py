"""The command that writes the report of a sweep, or of any table of runs: report."""

import time
from pathlib import Path

from sweeps.cli.options import LAW_HELP, add_source, print_lines, runs_of
from sweeps.cli.parse import command, fail


def cmd_report(argv: list[str]) -> int:
    parser = command(
        "report",
        "scaling report runs/quickstart",
        "Fit, check against the held-out runs, write report.html, summary.json and figures/.",
    )
    add_source(parser)
    parser.add_argument("--law", default=None, help=LAW_HELP + " (default: the sweep's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: into the sweep's folder)")
    args = parser.parse_args(argv)
    for source in args.source:
        if not source.exists():
            fail(f"{source}: no such file or folder")
    if args.out is None and (len(args.source) > 1 or args.source[0].is_file()):
        fail("--out DIR is needed where the runs are not those of one sweep's folder")

    from analysis.report.findings import analyse
    from sweeps.summary import report

    started = time.monotonic()
    runs, sweeps, law = runs_of(args)
    findings = analyse(runs, law=law)
    print_lines(report(findings, args.source, args.out or args.source[0], sweeps, started))
    return 0
