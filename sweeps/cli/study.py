"""The command that conducts studies, or lists them: study."""

import json
import sys
from pathlib import Path

from analysis.text import printable, text_table
from scaling.exit_codes import DONE, FAILED
from sweeps.cli.options import print_lines
from sweeps.cli.parse import command, fail, whole

STUDIES = Path("runs") / "studies"


def cmd_study(argv: list[str]) -> int:
    parser = command(
        "study",
        "scaling study entropy",
        "Train, ask and judge a study of sweeps/studies, or one of FILE.py: its claims are written down first. "
        "Launched again, it does what is missing. Without a name: which there are, their cost and last result.",
    )
    parser.add_argument("name", metavar="NAME|FILE.py", nargs="?")
    parser.add_argument("--dial", metavar="X|tiny", help="compute, as a multiple; tiny: a form of seconds, for tests")
    parser.add_argument("--out", type=Path, help="the study's folder (default: runs/studies/NAME, or NAME-DIAL)")
    parser.add_argument("--workers", type=whole, help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--json", action="store_true", help="name, seconds, flops and claims as JSON")
    args = parser.parse_args(argv)
    if args.name is None:
        given = {"--dial": args.dial, "--out": args.out, "--workers": args.workers}
        if lone := [option for option, value in given.items() if value is not None]:
            fail(f"{lone[0]} is of one study; name it (scaling study lists them)")
        return list_studies(args.json)

    from sweeps.cli.sweep import Progress, say
    from sweeps.launch import local
    from sweeps.studies._conduct import conduct, outcome_text
    from sweeps.studies._study import load_study

    local.placements(args.workers, 1)
    name, study = load_study(args.name, args.dial)
    dial = "1" if args.dial is None else args.dial if args.dial == "tiny" else f"{float(args.dial):g}"
    folder = args.out or STUDIES / (name if dial == "1" else f"{name}-{dial}")
    if args.json:
        show = lambda _, line: line and print(printable(line), file=sys.stderr, flush=True)  # noqa: E731
        outcome = conduct(name, study, folder, args.workers, show)
        print(json.dumps(outcome.to_dict(), indent=1, allow_nan=False))
    else:
        say(f"{name}: {len(study.runs)} runs, {len(study.claims)} claims, in {folder}")
        with Progress() as progress:
            outcome = conduct(name, study, folder, args.workers, progress.show)
        print_lines(outcome_text(outcome, len(study.runs), folder / "study.html"))
    return DONE if outcome.whole else FAILED


def list_studies(as_json: bool) -> int:
    """Every study of sweeps/studies: question, cost, and what its claims came to when it was last conducted here."""
    import importlib

    from sweeps.studies._conduct import last_verdicts
    from sweeps.studies._study import PACKAGE, studies

    records = []
    for name in studies():
        module = importlib.import_module(f"{PACKAGE}.{name}")
        last = last_verdicts(STUDIES / name)
        records.append({"name": name, "question": module.QUESTION, "cost": module.COST, "last": last})
    if as_json:
        print(json.dumps(records, indent=1))
        return DONE
    rows = []
    for record in records:
        last = record["last"] and ", ".join(f"{count} {verdict}" for verdict, count in sorted(record["last"].items()))
        rows.append((record["name"], record["question"], record["cost"], last or "not conducted here"))
    print(text_table([("study", "question", "cost", "last result"), *rows], left=4) if rows else "no studies")
    return DONE
