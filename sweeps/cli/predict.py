"""The commands that use a saved fit: predict, allocate."""

from pathlib import Path

from sweeps.cli.options import COLUMNS, add_columns, add_json, notes_text, number_of, pairs, print_result, runs_of
from sweeps.cli.parse import command, fail, number, positive


def cmd_predict(argv: list[str]) -> int:
    from analysis.laws.published import PUBLISHED

    parser = command("predict", "scaling predict fit.json --n 1e9 --d 2e10", "The loss that a law predicts.")
    names = f"a saved fit, or a published law: {', '.join(PUBLISHED)}"
    parser.add_argument("fit", type=Path, metavar="fit.json|PUBLISHED", help=names)
    parser.add_argument("--n", type=number, help="parameters, counted as in the fit")
    parser.add_argument("--d", type=number, help="tokens")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=VALUE", help="another input: U=1e9")
    add_json(parser)
    args = parser.parse_args(argv)

    inputs = {name: number_of("--input", name, value) for name, value in pairs("--input", args.input).items()}
    law = PUBLISHED.get(str(args.fit)) if not args.fit.exists() else None
    for option, value, meaning in (("--n", args.n, "parameters, counted as in the fit"), ("--d", args.d, "tokens")):
        if value is None and (law or not inputs):
            fail(f"{option} is needed: {meaning}")
        if value is not None:
            positive(option, value)
    predicted, source = predict_published(law, args, inputs) if law else predict_fitted(args, inputs)
    answer = {"n": args.n, "d": args.d, "predicted": predicted.value, "low": predicted.low, "high": predicted.high}
    answer |= {"unit": predicted.unit, "warning": "; ".join(predicted.notes) or None} | inputs
    return print_result(args, answer, source + "".join(f"\nwarning: {note}" for note in predicted.notes))


def predict_published(law, args, inputs: dict[str, float]):
    """(Prediction, text)."""
    if unknown := set(inputs) - ({"U"} if law.law == "data_constrained" else set()):
        fail(f"--input {min(unknown)}: {law.name} is not a law of it (muennighoff takes U, distinct tokens)")
    predicted = law.predict(args.n, args.d, inputs.get("U"))
    return predicted, f"loss {predicted.value:.4f} {law.unit} ({law.source})"


def predict_fitted(args, inputs: dict[str, float]):
    """(Prediction, text)."""
    from analysis.fitting.saved import load_fit
    from analysis.uncertainty.predict import predict

    fit = load_fit(args.fit)
    predicted = predict(fit, args.n, args.d, **inputs)
    columns = ", ".join(f"{name} = {column}" for name, column in fit.columns.items())
    return predicted, f"{fit.metric.name} {predicted} ({', '.join(filter(None, (fit.law, columns)))})"


def cmd_allocate(argv: list[str]) -> int:
    parser = command(
        "allocate",
        "scaling allocate fit.json --flops 1e21",
        "Compute-optimal N and D for a budget, with C = 6 N D; by the law, and from runs by envelope and isoFLOP.",
    )
    parser.add_argument("fit", type=Path, metavar="fit.json")
    parser.add_argument("--flops", type=number, required=True, help="training FLOPs, counted as 6 N D")
    parser.add_argument("--served", type=number, default=0.0, help="tokens to be served, 2N FLOPs each, in the budget")
    parser.add_argument("--unique", type=number, help="distinct tokens there are (for law data_constrained)")
    parser.add_argument("--n", type=number, help="compare with this N, D = C/6N: its excess loss")
    parser.add_argument("--runs", type=Path, metavar="DIR|FILE", help="runs: approaches 1 and 2 beside the law's")
    add_columns(parser)
    add_json(parser)
    args = parser.parse_args(argv)

    from analysis.fitting.saved import load_fit
    from analysis.forecast.allocate import allocate, excess_loss

    positive("--flops", args.flops)
    unused = [name for name, settings in COLUMNS.items() if getattr(args, name) != settings.get("default")]
    if unused and not args.runs:
        fail(f"--{unused[0].replace('_', '-')} says how to read --runs, and there is no --runs")
    fit = load_fit(args.fit)
    best = allocate(fit, args.flops, args.served, args.unique)
    record, text = best.to_json(), best.summary()
    if args.n is not None:
        positive("--n", args.n)
        excess = record["excess"] = excess_loss(fit, args.n, args.flops / (6 * args.n), args.unique)
        text += (
            f"\nN = {args.n:.4g}, D = {args.flops / (6 * args.n):.4g}: excess loss {excess['excess']:.4f}, "
            f"{100 * excess['flops_wasted']:.1f} % of the compute wasted"
        )
    if args.runs:
        record["approaches"], more = approaches(args)
        text += more
    return print_result(args, record, text)


def approaches(args) -> tuple[dict, str]:
    """(JSON, text) of approaches 1 and 2 on the runs, which slice by the C of the table, not by 6ND."""
    from analysis.errors import InputError
    from analysis.forecast.isoflop import envelope, isoflop

    args.source, args.holdout, args.input, args.law = [args.runs], None, [], None
    runs, _, _ = runs_of(args)
    makers = {
        "envelope": envelope,
        "isoflop parabola": isoflop,
        "isoflop akima": lambda runs: isoflop(runs, method="akima"),
    }
    record = {"flops": runs.c_column}
    text = f"\n\nby the runs, without a law; here C is {runs.c_column}{ratio_to_6nd(runs)}{notes_text(runs)}"
    for name, maker in makers.items():
        try:
            approach = maker(runs)
            at = approach.at(args.flops)
        except InputError as error:
            record[name] = {"refused": str(error)}
            text += f"\n\n{name}: refused: {error}"
            continue
        record[name] = approach.to_json() | {"at": vars(at)}
        text += f"\n\n{approach.summary()}\n  at C = {args.flops:.4g} ({runs.c_column}): N* {at.N:.4g}, D* {at.D:.4g}"
        text += f"\n  warning: {at.warning}" if at.warning else ""
    return record, text


def ratio_to_6nd(runs) -> str:
    """How the runs' own C compares with 6ND, the law's."""
    import numpy as np

    ratio = runs.flops / (6 * runs.n * runs.d)
    if np.abs(ratio - 1).max() < 0.001:
        return " (6ND, as in the law's allocation above)"
    return f", {np.median(ratio):.3g} times 6ND in the median run; the law's allocation above has C = 6ND"
