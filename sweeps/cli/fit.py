"""The command that fits a law: fit."""

import argparse
from pathlib import Path

from sweeps.cli.options import (
    LAW_HELP,
    add_figures,
    add_json,
    add_source,
    number_of,
    pairs,
    print_result,
    runs_of,
    save_figures,
)
from sweeps.cli.parse import command, number, positive


def cmd_fit(argv: list[str]) -> int:
    parser = command(
        "fit",
        "scaling fit runs.csv --n-column 'Model Size' --c-column 'Training FLOP' --where 'loss < 3.44'",
        "Fit a law to folders of runs, or to any CSV or parquet with N, D and loss; several are pooled.",
    )
    add_source(parser)
    parser.add_argument("--law", default=None, help=LAW_HELP + " (default: auto)")
    add_fit_options(parser)
    parser.add_argument("--drop-outliers", action="store_true", help="leave out runs beyond 5 sigma of a first fit")
    parser.add_argument("--target", type=number, metavar="FLOPS", help="fit for a prediction at this compute")
    parser.add_argument("--profile", action="store_true", help="profile likelihood intervals too")
    parser.add_argument("--out", type=Path, help="write the fit here, for predict and allocate")
    add_json(parser)
    add_figures(parser)
    args = parser.parse_args(argv)

    from analysis.laws.forms import law_named
    from analysis.report.findings import doubts_of

    runs, _, law = runs_of(args)
    if args.drop_outliers:
        runs = without_outliers(runs, law, fit_options(args))
    joint = bool(runs.n_column) if law == "auto" else law_named(law).allocates
    kind = fit_target if args.target is not None else fit_joint if joint else fit_single
    fitted, record, text = kind(runs, law, args)
    if args.out:
        fitted.save(args.out)
    if kind is not fit_joint:  # whose findings hold them
        record["warnings"] = doubts_of(fitted, runs)
        text += "".join(f"\nwarning: {line}" for line in record["warnings"])
    if args.profile:
        from analysis.uncertainty.profile import profile_all

        profiles = profile_all(fitted, runs)
        record["profiles"] = {name: [p.low, p.high] for name, p in profiles.items()}
        text += "\n\nProfile likelihood\n" + "\n".join("  " + p.summary() for p in profiles.values())
    if args.figures:
        from analysis.report.plots import figures_of

        save_figures(args.figures, figures_of(runs, fitted))
    return print_result(args, record, text)


def fit_joint(runs, law: str, args):
    """(fit, JSON, text) of a law of the loss by N and D: every law fitted, one chosen, the held-out runs predicted."""
    from analysis.report.findings import analyse
    from analysis.report.page import text_report

    findings = analyse(runs, law, cluster=args.cluster, **fit_options(args))
    return findings.fit, findings.to_json(), text_report(findings) + "\n\n" + findings.fit.summary()


def fit_single(runs, law: str, args):
    """(fit, JSON, text) of a law of other inputs than N and D, or of another metric than the loss."""
    from analysis.fitting.fit import fit
    from analysis.forecast.select import choose_law
    from analysis.laws.forms import LAWS, SINGLE
    from analysis.uncertainty.bootstrap import bootstrap

    choice = ""
    if law == "auto":
        law, scores = choose_law(runs, {name: LAWS[name] for name in SINGLE}, **fit_options(args))
        errors = (f"{n} {'-' if s.score is None else f'{100 * s.score:.2f} %'}" for n, s in scores.items())
        choice = f"\nchosen by error in rolling validation: {'; '.join(errors)}"
    fitted = bootstrap(fit(runs, law, **fit_options(args), cluster=args.cluster), runs)
    held, line = held_out(fitted, runs)
    return fitted, fit_record(fitted) | held, fitted.summary() + choice + line


def fit_target(runs, law: str, args):
    """(fit, JSON, text) of a fit whose weights and law are chosen for a prediction at one compute."""
    from analysis.fitting.target import fit_for_target
    from analysis.laws.forms import law_named
    from analysis.text import text_table
    from analysis.uncertainty.bootstrap import bootstrap

    positive("--target", args.target)
    laws = None if law == "auto" else {law: law_named(law)}
    aimed = fit_for_target(runs, args.target, laws, **fit_options(args), cluster=args.cluster)
    fitted = bootstrap(aimed.fit, runs)
    held, line = held_out(fitted, runs)
    scores = 100 * aimed.scores.pivot_table(index="law", columns="kappa", values="score")
    rows = [["law", *(f"kappa {kappa:g}" for kappa in scores.columns)]]
    rows += [[law, *("-" if v != v else f"{v:.2f}" for v in errors)] for law, *errors in scores.itertuples()]
    text = f"{fitted.summary()}\n\nrolling-origin error by law and kappa, %\n{text_table(rows, left=1)}{line}"
    record = fit_record(fitted) | {"kappa": aimed.kappa, "scores": aimed.scores.to_dict("records")}
    return fitted, record | held, text


def fit_record(fitted) -> dict:
    return {name: getattr(fitted, name) for name in ("law", "params", "intervals", "objective", "n_runs")}


def held_out(fitted, runs) -> tuple[dict, str]:
    """Mean error of the held-out runs and how many lie in their interval, as JSON and as a line."""
    from analysis.uncertainty.predict import predict_runs

    held = runs.take(runs.holdout)
    if not len(held):
        return {}, ""
    predicted = predict_runs(fitted, held)
    inside, error = int(predicted.inside(held.loss).sum()), float(abs(predicted.value / held.loss - 1).mean())
    line = f"\nheld out: {len(held)} runs, mean error {100 * error:.2f} %, {inside} in their 90 % interval"
    return {"mean_abs_error": error, "inside": inside, "held_out": len(held)}, line


def without_outliers(runs, law: str, options):
    """The runs without those that a first fit calls outliers; the note on the result says which rows went."""
    from dataclasses import replace

    import numpy as np

    from analysis.fitting.checks import outliers
    from analysis.fitting.fit import fit
    from analysis.forecast.compare import laws_for
    from analysis.forecast.select import choose_law

    if law == "auto":
        law, _ = choose_law(runs, laws_for(runs, ["chinchilla"] if runs.n_column else None), **options)
    outlying = outliers(fit(runs, law, **options), runs)
    if not len(outlying):
        return runs
    keep = ~np.isin(np.arange(len(runs)), outlying.index)
    rows = ", ".join(map(str, sorted(outlying.index)))
    note = f"{len(outlying)} outliers dropped, beyond 5 sigma of a first fit of {law}: rows {rows}"
    return replace(runs.take(keep), notes=(*runs.notes, note))


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective", default="huber", help="huber, lad, lsq or lsq_raw (default: huber)")
    parser.add_argument("--delta", type=number, help="of Huber (default: from repeated runs, else 1e-3)")
    parser.add_argument("--fix", action="append", default=[], metavar="PARAMETER=VALUE", help="hold a parameter")
    parser.add_argument("--tie", action="append", default=[], metavar="A=B", help="two parameters share one value")
    parser.add_argument(
        "--cluster", metavar="COLUMN", help="runs that share their noise (default: trunk where there is one), or none"
    )


def fit_options(args) -> dict:
    """The options of `analysis.fitting.fit.fit` that were given."""
    fixed = {name: number_of("--fix", name, value) for name, value in pairs("--fix", args.fix).items()}
    return {
        "objective": args.objective,
        "fixed": fixed,
        "tied": tuple(pairs("--tie", args.tie).items()),
        "delta": args.delta,
    }
