"""The commands that ask how far a law can be trusted: backtest, compare, multiverse."""

from sweeps.cli.options import (
    LAW_HELP,
    add_figures,
    add_json,
    add_source,
    notes_text,
    print_result,
    runs_of,
    save_figures,
)
from sweeps.cli.parse import command, fail, number, positive


def cmd_backtest(argv: list[str]) -> int:
    parser = command(
        "backtest",
        "scaling backtest runs/quickstart --law coupled",
        "Fit below many compute cuts, predict above them: error and coverage by how far the law is extrapolated.",
    )
    add_source(parser)
    parser.add_argument("--law", default=None, help=LAW_HELP + " (default: auto)")
    parser.add_argument(
        "--factor", type=number, default=16.0, help="predict up to this many times the compute of a cut (default 16)"
    )
    add_json(parser)
    add_figures(parser)
    args = parser.parse_args(argv)

    from analysis.errors import InputError
    from analysis.fitting.problem import pose
    from analysis.forecast.backtest import backtest, cuts_of
    from analysis.forecast.compare import by_factor, laws_for
    from analysis.forecast.select import choose_law
    from analysis.laws.forms import law_named
    from analysis.text import text_table

    if not args.factor > 1:
        fail(f"--factor {args.factor:g}: expected a number above 1")
    runs, _, name = runs_of(args)
    if name == "auto":
        name, _ = choose_law(runs, laws_for(runs))
    law = law_named(name)
    problem = pose(runs, law).sample()
    cuts, note = cuts_of(problem, factor=args.factor)
    if not cuts:
        raise InputError(f"law {name!r}: no cut in compute leaves enough runs below it; add cheaper runs")
    result = backtest(problem, cuts)
    table = by_factor(result, result.factor)
    record = {"law": name, "cuts": len(cuts), "note": note, "by_factor": table.to_dict("records")}
    record["delta"] = {"value": problem.delta, "reason": problem.delta_reason}
    rows = [["factor", "predictions", "mean error", "worst error", "coverage, noise only", "coverage"]]
    rows += [[factor, str(count), *map(percent, shares)] for factor, count, *shares in table.itertuples(index=False)]
    text = f"{name}: {len(cuts)} cuts over {len(problem)} runs\n{text_table(rows, left=1)}"
    text += "\nfactor: compute over that of the most expensive fitted run; coverage of 90 % intervals"
    text += f"\ndelta {problem.delta:.3g}: {problem.delta_reason}"
    if args.figures:
        from analysis.report.plots import figure_backtest

        save_figures(args.figures, {"backtest": figure_backtest(result)})
    text += (f"\nnote: {note}" if note else "") + notes_text(runs)
    return print_result(args, record | {"notes": list(runs.notes)}, text)


def cmd_compare(argv: list[str]) -> int:
    parser = command(
        "compare",
        "scaling compare runs/quickstart",
        "Laws side by side: rolling-origin error, differences of AICc and BIC, and the error on held-out runs.",
    )
    add_source(parser)
    parser.add_argument("--laws", help="names, separated by commas (default: all of N and D)")
    add_json(parser)
    add_figures(parser)
    args = parser.parse_args(argv)
    args.law = None

    from analysis.forecast.compare import compare, laws_for
    from analysis.text import text_table

    runs, _, _ = runs_of(args)
    chosen, table = compare(runs, laws_for(runs, args.laws.split(",") if args.laws else None))
    record = {"chosen": chosen, "laws": table.to_dict("records")}
    shares = ("validation", "holdout", "noise")
    columns = [column for column in table.columns if column not in ("delta", "delta_reason", "note")]
    rows = [columns]
    for values in table[columns].to_dict("records"):
        rows.append([percent(v) if k in shares else shown(v) for k, v in values.items()])
    text = f"{text_table(rows, left=1)}\nchosen by validation (the simpler within 10 %): {chosen}"
    fitted = table.dropna(subset="delta")
    for delta, reason in dict.fromkeys(zip(fitted["delta"], fitted["delta_reason"], strict=True)):
        text += f"\ndelta {delta:.3g}: {reason}"
    if args.figures:
        from analysis.report.plots import figure_compare

        save_figures(args.figures, {"compare": figure_compare(table, chosen)})
    text += "".join(f"\nnote: {note}" for note in dict.fromkeys(table["note"].dropna()) if note) + notes_text(runs)
    return print_result(args, record | {"notes": list(runs.notes)}, text)


def cmd_multiverse(argv: list[str]) -> int:
    parser = command(
        "multiverse",
        "scaling multiverse runs/quickstart --law chinchilla",
        "Refit under every N convention, FLOP formula, objective, smoothing and subset: how far do the answers move?",
    )
    add_source(parser)
    parser.add_argument("--law", default="chinchilla", help="(default: chinchilla)")
    parser.add_argument("--n", type=number, help="N of the target prediction")
    parser.add_argument("--d", type=number, help="D of the target prediction")
    add_json(parser)
    args = parser.parse_args(argv)

    from analysis.forecast.multiverse import multiverse

    if (args.n is None) != (args.d is None):
        fail("--n and --d: give both, or neither")
    if args.n is not None:
        positive("--n", args.n)
        positive("--d", args.d)
    runs, _, _ = runs_of(args)
    result = multiverse(runs, args.law, None if args.n is None else (args.n, args.d))
    record = result.to_json() | {"notes": list(runs.notes)}
    return print_result(args, record, result.summary() + notes_text(runs))


def percent(share: float | None) -> str:
    return "-" if share is None or share != share else f"{100 * share:.2f} %"


def shown(value) -> str:
    """A cell of a table: a missing number as a dash, a difference of criteria to one digit."""
    if value is None or value != value:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
