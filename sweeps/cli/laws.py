"""The commands that read finished runs: fit, predict, allocate, backtest, compare, multiverse, curves, report, bench.

As in `cli`, the rooms are imported only when a command needs them.
"""

import argparse
import json
import time
from pathlib import Path

from sweeps.cli.parse import command, fail, number, positive, whole

LAW_HELP = "auto, or the name of a law (docs/analysis.md lists them)"


def cmd_fit(argv: list[str]) -> int:
    parser = command(
        "fit",
        "scaling fit runs.csv --n-column 'Model Size' --c-column 'Training FLOP' --where 'loss < 3.44'",
        "Fit a law to a folder of runs, or to any CSV or parquet with N, D and loss.",
    )
    add_source(parser)
    parser.add_argument("--law", default=None, help=LAW_HELP + " (default: auto)")
    add_fit_options(parser)
    parser.add_argument("--drop-outliers", action="store_true", help="leave out runs beyond 5 sigma of a first fit")
    parser.add_argument("--target", type=number, metavar="FLOPS", help="fit for a prediction at this compute")
    parser.add_argument("--profile", action="store_true", help="profile likelihood intervals too")
    parser.add_argument("--out", type=Path, help="write the fit here, for predict and allocate")
    add_output(parser)
    args = parser.parse_args(argv)

    from analysis.laws.forms import law_named

    runs, _, law = runs_of(args)
    options = fit_options(args)
    if args.drop_outliers:
        runs = without_outliers(runs, law, options)
    joint = bool(runs.n_column) if law == "auto" else {"N", "D"} <= set(law_named(law).inputs)
    if args.target is not None:
        one, told, text = fit_target(runs, law, args)
        joint = False
    elif joint:
        from analysis.report.findings import study
        from analysis.report.page import text_report

        result = study(runs, law, cluster=args.cluster, **options)
        one, told, text = result.fit, result.to_json(), text_report(result) + "\n\n" + result.fit.summary()
    else:
        one, told, text = fit_single(runs, law, args, options)
    if "inside" in told:
        text += f"\nheld out: {told['held_out']} runs, mean error {100 * told['mean_abs_error']:.2f} %, "
        text += f"{told['inside']} in their 90 % interval"
    if args.out:
        one.save(args.out)
    doubts = checks_of(one, runs)
    told["warnings"] = doubts
    text += "".join(f"\nwarning: {line}" for line in doubts)
    if args.profile:
        from analysis.uncertainty.profile import profile_all

        profiles = profile_all(one, runs, cluster=args.cluster)
        told["profiles"] = {name: [p.low, p.high] for name, p in profiles.items()}
        text += "\n\nProfile likelihood\n" + "\n".join("  " + p.summary() for p in profiles.values())
    if joint and args.figures:
        from analysis.report.plots import figure_compute, figure_predicted, figure_tokens

        makers = {"compute": figure_compute, "tokens": figure_tokens, "predicted": figure_predicted}
        save_figures(args.figures, {name: make(result) for name, make in makers.items()})
    return say(args, told, text)


def without_outliers(runs, law: str, options):
    """The runs without those that a first fit calls outliers; the note on the result says which rows went."""
    from dataclasses import replace

    import numpy as np

    from analysis.fitting.checks import outliers
    from analysis.fitting.fit import fit
    from analysis.forecast.compare import laws_for
    from analysis.forecast.select import choose_law

    law = choose_law(runs, laws_for(runs, None if not runs.n_column else ["chinchilla"]))[0] if law == "auto" else law
    found = outliers(fit(runs, law, **options), runs)
    keep = ~np.isin(np.arange(len(runs)), found.index)
    rows = ", ".join(map(str, sorted(found.index)))
    note = f"{len(found)} outliers dropped, beyond 5 sigma of a first fit of {law}: rows {rows}"
    return replace(runs.take(keep), notes=(*runs.notes, note)) if len(found) else runs


def fit_target(runs, law: str, args):
    """(fit, JSON, text) of a fit whose weights and law are chosen for a prediction at one compute."""
    from analysis.fitting.target import fit_for_target
    from analysis.laws.forms import law_named
    from analysis.uncertainty.bootstrap import bootstrap

    positive("--target", args.target)
    found = fit_for_target(runs, args.target, None if law == "auto" else {law: law_named(law)})
    one = bootstrap(found.fit, runs, cluster=args.cluster, run_weights=found.weights)
    told = {name: getattr(one, name) for name in ("law", "params", "intervals", "objective", "n_runs")}
    text = one.summary() + f"\nfitted for C = {args.target:.3g}: kappa {found.kappa:g} per squared decade below it\n\n"
    scores = found.scores.pivot_table(index="law", columns="kappa", values="score")
    text += "rolling-origin error by law and kappa, %\n" + (100 * scores).to_string(float_format="%.2f")
    return one, told | {"kappa": found.kappa, "scores": found.scores.to_dict("records")} | held_out(one, runs), text


def held_out(one, runs) -> dict:
    """Mean error of the held-out runs and how many lie in their interval; empty where none are held out."""
    from analysis.laws.forms import law_named
    from analysis.uncertainty.bootstrap import predict_interval

    held = runs.take(runs.holdout)
    if not len(held):
        return {}
    predicted, low, high = predict_interval(one, **{i: held.input(i) for i in law_named(one.law).inputs})
    inside = int(((low <= held.loss) & (held.loss <= high)).sum())
    return {"mean_abs_error": float(abs(predicted / held.loss - 1).mean()), "inside": inside, "held_out": len(held)}


def fit_single(runs, law: str, args, options):
    """(fit, JSON, text) of a law of other inputs than N and D."""
    from analysis.fitting.fit import fit
    from analysis.forecast.select import choose_law
    from analysis.laws.forms import LAWS, SINGLE
    from analysis.uncertainty.bootstrap import bootstrap

    note = ""
    if law == "auto":
        law, scores = choose_law(runs, {name: LAWS[name] for name in SINGLE})
        note = "; ".join(f"{n} {'-' if s.score is None else f'{100 * s.score:.2f} %'}" for n, s in scores.items())
    one = bootstrap(fit(runs, law, **options), runs, cluster=args.cluster)
    told = {
        "law": law,
        "params": one.params,
        "intervals": one.intervals,
        "objective": one.objective,
        "n_runs": one.n_runs,
    }
    text = one.summary() + (f"\nchosen by error in rolling validation: {note}" if note else "")
    told |= held_out(one, runs)
    return one, told, text


def cmd_predict(argv: list[str]) -> int:
    parser = command("predict", "scaling predict fit.json --n 1e9 --d 2e10", "The loss a fitted law predicts.")
    parser.add_argument("fit", type=Path, metavar="fit.json|PUBLISHED", help="a saved fit, or a published law's name")
    parser.add_argument("--n", type=number, help="parameters, counted as in the fit")
    parser.add_argument("--d", type=number, help="tokens")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=VALUE", help="another input: U=1e9")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)

    inputs = {name: number_of("--input", name, value) for name, value in pairs("--input", args.input).items()}
    if not inputs and args.n is None:
        fail("--n is needed: parameters, counted as in the fit")
    if not inputs and args.d is None:
        fail("--d is needed: tokens")
    for name, value in (("--n", args.n), ("--d", args.d)):
        if value is not None:
            positive(name, value)

    from analysis.laws.published import PUBLISHED

    if str(args.fit) in PUBLISHED and not args.fit.exists():
        found = PUBLISHED[str(args.fit)].predict(args.n, args.d, inputs.get("U"))
        answer = {"n": args.n, "d": args.d, "predicted": float(found.loss), "warning": found.warning}
        text = f"loss {found.loss:.4f} ({PUBLISHED[str(args.fit)].source})"
    else:
        from analysis.fitting.fit import load_fit
        from analysis.uncertainty.bootstrap import predict_interval

        fit = load_fit(args.fit)
        predicted, low, high = (float(x) for x in predict_interval(fit, args.n, args.d, **inputs))
        warning = fit.outside(args.n, args.d, **inputs)
        answer = {
            "n": args.n,
            "d": args.d,
            "predicted": predicted,
            "low": low,
            "high": high,
            "warning": warning,
        } | inputs
        text = f"loss {predicted:.4f} nats/token, 90 % interval [{low:.4f}, {high:.4f}] ({fit.law}, N = {fit.n_column})"
    text += f"\nwarning: {answer['warning']}" if answer["warning"] else ""
    return say(args, answer, text)


def cmd_allocate(argv: list[str]) -> int:
    parser = command(
        "allocate",
        "scaling allocate fit.json --flops 1e21",
        "Compute-optimal N and D for a budget, with C = 6 N D; by the law, and from runs by envelope and isoFLOP.",
    )
    parser.add_argument("fit", type=Path, metavar="fit.json")
    parser.add_argument("--flops", type=number, required=True, help="training FLOPs")
    parser.add_argument("--served", type=number, default=0.0, help="tokens to be served, 2N FLOPs each, in the budget")
    parser.add_argument("--unique", type=number, help="distinct tokens there are (for law data_constrained)")
    parser.add_argument("--n", type=number, help="compare with this N, D = C/6N: its excess loss")
    parser.add_argument("--runs", type=Path, metavar="DIR|FILE", help="runs: approaches 1 and 2 beside the law's")
    add_columns(parser)
    add_output(parser)
    args = parser.parse_args(argv)

    from analysis.errors import InputError
    from analysis.fitting.fit import load_fit
    from analysis.forecast.allocate import allocate, excess_loss

    positive("--flops", args.flops)
    fit = load_fit(args.fit)
    found = allocate(fit, args.flops, args.served, args.unique)
    told, text = found.to_json(), found.summary()
    if args.n is not None:
        positive("--n", args.n)
        told["excess"] = excess_loss(fit, args.n, args.flops / (6 * args.n), args.unique)
        text += (
            f"\nN = {args.n:.4g}, D = {args.flops / (6 * args.n):.4g}: excess loss {told['excess']['excess']:.4f}, "
            f"{100 * told['excess']['flops_wasted']:.1f} % of the compute wasted"
        )
    if args.runs:
        from analysis.forecast.isoflop import envelope, isoflop

        args.source, args.holdout, args.input, args.law = args.runs, None, [], None
        runs, _, _ = runs_of(args)
        told["approaches"] = {}
        for name, work in (
            ("envelope", envelope),
            ("isoflop parabola", isoflop),
            ("isoflop akima", lambda r: isoflop(r, method="akima")),
        ):
            try:
                approach = work(runs)
                told["approaches"][name] = approach.to_json()
                text += f"\n\n{approach.summary()}"
                at = approach.at(args.flops)
                text += f"\n  at C = {args.flops:.4g}: N* {at.N:.4g}, D* {at.D:.4g}" + (
                    f"\n  warning: {at.warning}" if at.warning else ""
                )
            except InputError as error:
                told["approaches"][name] = {"refused": str(error)}
                text += f"\n\n{name}: refused: {error}"
    return say(args, told, text)


def cmd_backtest(argv: list[str]) -> int:
    parser = command(
        "backtest",
        "scaling backtest runs/quickstart --law coupled",
        "Fit below many compute cuts, predict above them: error and coverage by how far the law is extrapolated.",
    )
    add_source(parser)
    parser.add_argument("--law", default=None, help=LAW_HELP + " (default: auto)")
    parser.add_argument("--factor", type=number, default=16.0, help="predict up to this many times dearer (default 16)")
    add_output(parser)
    args = parser.parse_args(argv)

    from analysis.errors import InputError
    from analysis.forecast.backtest import backtest, cuts_of
    from analysis.forecast.compare import by_factor, laws_for
    from analysis.forecast.select import choose_law
    from analysis.laws.forms import law_named

    if not args.factor > 1:
        fail(f"--factor {args.factor:g}: expected a number above 1")
    runs, _, name = runs_of(args)
    if name == "auto":
        name, _ = choose_law(runs, laws_for(runs))
    law = law_named(name)
    cuts, note = cuts_of(runs.fitted, law.size, law, factor=args.factor)
    if not cuts:
        raise InputError(f"law {name!r}: no cut in compute leaves enough runs below it; add cheaper runs")
    result = backtest(runs, law, cuts)
    table = by_factor(result, result.factor)
    told = {"law": name, "cuts": len(cuts), "note": note, "by_factor": table.to_dict("records")}
    for column in table.columns[2:]:
        table[column] = [f"{100 * v:.2f} %" for v in table[column]]
    text = f"{name}: {len(cuts)} cuts over {len(runs.fitted)} runs\n" + table.to_string(index=False)
    text += "\nfactor: compute over that of the dearest fitted run; coverage of 90 % intervals"
    return say(args, told, text + (f"\nnote: {note}" if note else ""))


def cmd_compare(argv: list[str]) -> int:
    parser = command(
        "compare",
        "scaling compare runs/quickstart",
        "Laws side by side: rolling-origin error, AIC and BIC, and the error on held-out runs.",
    )
    add_source(parser)
    parser.add_argument("--laws", help="names, separated by commas (default: all of N and D)")
    add_output(parser)
    args = parser.parse_args(argv)
    args.law = None

    from analysis.forecast.compare import compare, laws_for

    runs, _, _ = runs_of(args)
    chosen, table = compare(runs, laws_for(runs, args.laws.split(",") if args.laws else None))
    told = {"chosen": chosen, "laws": json.loads(table.to_json(orient="records"))}
    for column in ("validation", "holdout", "noise"):
        table[column] = ["-" if v is None or v != v else f"{100 * v:.2f} %" for v in table[column]]
    text = table.drop(columns="note").to_string(index=False, float_format="%.1f", na_rep="-")
    text += f"\nchosen by validation (the simpler within 10 %): {chosen}"
    return say(args, told, text + "".join(f"\nnote: {n}" for n in dict.fromkeys(table["note"].dropna()) if n))


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
    add_output(parser)
    args = parser.parse_args(argv)

    from analysis.forecast.multiverse import multiverse

    if (args.n is None) != (args.d is None):
        fail("--n and --d: give both, or neither")
    runs, _, _ = runs_of(args)
    result = multiverse(runs, args.law, None if args.n is None else (args.n, args.d))
    return say(args, result.to_json(), result.summary())


def cmd_curves(argv: list[str]) -> int:
    parser = command(
        "curves",
        "scaling curves FOLDER --fit cosine_24000,constant_24000,wsdcon_9",
        "Fit a law of the whole loss curve to some schedules, predict the final loss of the others.",
    )
    parser.add_argument(
        "source", type=Path, metavar="DIR", help="CSV or parquet curves (step, lr, loss), or run folders"
    )
    parser.add_argument("--fit", help="names of the curves to fit, separated by commas (default: all)")
    parser.add_argument("--law", default="auto", help="tissue, multi_power or auto (default: auto)")
    parser.add_argument("--warmup", type=whole, help="steps of linear warm-up before the first row (default: its step)")
    parser.add_argument("--out", type=Path, help="write the fit here")
    add_output(parser)
    args = parser.parse_args(argv)

    from analysis.curves.fit import curves_report, evaluate, figure_curves, fit_curves
    from analysis.curves.schedules import read_curve

    if not args.source.is_dir():
        fail(f"{args.source}: not a folder of curves")
    files = sorted(p for p in args.source.rglob("*") if p.suffix in (".csv", ".parquet"))
    curves = {}
    for path in files:
        name = path.parent.name if path.name == "curve.parquet" else path.stem
        curves[name] = read_curve(path, warmup=args.warmup, name=name)
    if not curves:
        fail(f"{args.source}: no curves (.csv, .parquet) in this folder")
    chosen = args.fit.split(",") if args.fit else list(curves)
    for name in chosen:
        if name not in curves:
            from models.errors import did_you_mean

            fail(f"--fit {name}: no such curve in {args.source}{did_you_mean(name, curves)}")
    fit = fit_curves([curves[name] for name in chosen], law=args.law)
    if args.out:
        fit.save(args.out)
    rest = [c for name, c in curves.items() if name not in chosen] or [curves[name] for name in chosen]
    table = evaluate(fit, rest)
    told = {"fit": json.loads(fit.to_json()), "curves": json.loads(table.to_json(orient="records"))}
    if args.figures:
        save_figures(args.figures, {"curves": figure_curves(fit, list(curves.values()))})
    return say(args, told, curves_report(fit, table))


def cmd_report(argv: list[str]) -> int:
    parser = command(
        "report",
        "scaling report runs/quickstart",
        "Fit, check against the held-out runs, write report.html and summary.json into the folder.",
    )
    add_source(parser)
    parser.add_argument("--law", default=None, help=LAW_HELP + " (default: the sweep's)")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        fail(f"{args.source}: not a folder; give the folder of a sweep (for a table of runs: scaling fit)")

    from analysis.report.findings import study
    from sweeps.summary import report

    started = time.monotonic()
    runs, facts, law = runs_of(args)
    print(report(study(runs, law=law), args.source, facts, started))
    return 0


def runs_of(args: argparse.Namespace):
    """(Runs, facts about the sweep, law) from a folder of runs or a file, and the options of `add_source`."""
    from analysis.runs import read_runs

    holdout, law, facts, source = args.holdout, args.law, {}, args.source
    if source.is_dir():
        from sweeps.summary import describe
        from sweeps.table import table

        facts = describe(source)
        holdout, law = holdout or facts.get("holdout"), law or facts.get("law")
        source = table(source)
    runs = read_runs(
        source,
        n_column=args.n_column,
        d_column=args.d_column,
        c_column=args.c_column,
        loss_column=args.loss_column,
        where=args.where,
        holdout=holdout,
        inputs=pairs("--input", args.input),
        n_unit=args.n_unit,
        d_unit=args.d_unit,
        loss_unit=args.loss_unit,
    )
    return runs, facts, law or "auto"


def fit_options(args) -> dict:
    """The options of `fit` that were given."""
    fixed = {name: number_of("--fix", name, value) for name, value in pairs("--fix", args.fix).items()}
    return {
        "objective": args.objective,
        "fixed": fixed,
        "tied": tuple(pairs("--tie", args.tie).items()),
        "delta": args.delta,
    }


def checks_of(one, runs) -> list[str]:
    """Lines about the runs and the fit that a reader must know: copies, outliers, what is not pinned down."""
    from analysis.fitting.checks import duplicates, outlier_note, unidentified

    lines = [duplicates(runs), outlier_note(one, runs), *unidentified(one, runs)]
    return [line for line in lines if line]


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR|FILE", help="a sweep's folder, or a CSV or parquet file")
    parser.add_argument("--holdout", metavar="EXPR", help="runs to predict, not to fit: 'flops > 1e12'")
    add_columns(parser)
    parser.add_argument(
        *("--input",),
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="column of a law's other input: x=samples, U=unique_tokens",
    )


def add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--where", metavar="EXPR", help="rows to use at all: 'loss < 3.44'")
    parser.add_argument("--n-column", help="column of N (default: n_compute)")
    parser.add_argument("--d-column", help="column of D, tokens (default: tokens)")
    parser.add_argument("--c-column", help="column of C, FLOPs; D = C/6N where there is no D")
    parser.add_argument("--loss-column", default="loss", help="(default: loss)")
    parser.add_argument("--n-unit", type=number, help="what N is counted in: 1e6 for millions")
    parser.add_argument("--d-unit", type=number, help="what D is counted in: 1e9 for billions")
    parser.add_argument("--loss-unit", choices=["nats", "bits"], help="unit of the loss; bits are turned into nats")


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective", default="huber", help="huber, lad, lsq or lsq_raw (default: huber)")
    parser.add_argument("--delta", type=number, help="of Huber (default: from repeated runs, else 1e-3)")
    parser.add_argument("--fix", action="append", default=[], metavar="PARAMETER=VALUE", help="hold a parameter")
    parser.add_argument("--tie", action="append", default=[], metavar="A=B", help="two parameters share one value")
    parser.add_argument("--cluster", metavar="COLUMN", help="runs that share their noise, such as a trunk")


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write the figures there, as PNG and SVG")


def say(args, told, text: str) -> int:
    print(json.dumps(told, indent=1, allow_nan=False) if args.json else text)
    return 0


def save_figures(folder: Path | None, figures: dict) -> None:
    """Each figure as NAME.png and NAME.svg."""
    if not folder:
        return
    from analysis.files import write_text
    from analysis.report.plots import to_svg

    for name, figure in figures.items():
        write_text(folder / f"{name}.svg", to_svg(figure))
        figure.savefig(folder / f"{name}.png", dpi=150)


def pairs(option: str, given: list[str]) -> dict[str, str]:
    """['a=b'] as {'a': 'b'}."""
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            fail(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


def number_of(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        fail(f"{option} {name}={text}: {text!r} is not a number")
