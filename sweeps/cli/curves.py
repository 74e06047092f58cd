"""The command that fits laws of whole loss curves: curves."""

from pathlib import Path

from models.errors import did_you_mean
from sweeps.cli.options import add_figures, add_json, print_result, save_figures
from sweeps.cli.parse import command, fail, whole


def cmd_curves(argv: list[str]) -> int:
    parser = command(
        "curves",
        "scaling curves FOLDER --fit cosine_24000,constant_24000,wsdcon_9",
        "Fit a law of the whole loss curve to some schedules, predict the final loss of the others. "
        "The runs of a sweep are fitted by size: a law holds for one model.",
    )
    text = "CSV or parquet curves (step, lr, loss) of one model, or the folder of a sweep"
    parser.add_argument("source", type=Path, metavar="DIR", help=text)
    parser.add_argument("--fit", help="names of the curves to fit, separated by commas (default: all)")
    parser.add_argument("--law", default="auto", help="tissue, multi_power or auto (default: auto)")
    parser.add_argument("--warmup", type=whole, help="steps of linear warm-up before the first row (default: its step)")
    parser.add_argument("--out", type=Path, help="write the fit here")
    add_json(parser)
    add_figures(parser)
    args = parser.parse_args(argv)

    from analysis.curves.fit import fit_curves
    from analysis.curves.report import curves_report, evaluate, figure_curves
    from analysis.errors import InputError

    models = models_of(args.source, args.warmup)
    chosen = args.fit.split(",") if args.fit else [name for curves in models.values() for name in curves]
    known = {name for curves in models.values() for name in curves}
    for name in chosen:
        if name not in known:
            fail(f"--fit {name}: no such curve in {args.source}{did_you_mean(name, known)}")
    models = {model: curves for model, curves in models.items() if any(name in curves for name in chosen)}
    if args.out and len(models) > 1:
        fail(f"--out {args.out}: {len(models)} models, each with a law of its own; choose the curves of one with --fit")
    records, texts, figures = [], [], {}
    for model, curves in models.items():
        try:
            fit = fit_curves([curve for name, curve in curves.items() if name in chosen], law=args.law)
        except InputError as error:
            if len(models) == 1:
                raise
            records.append({"model": model, "refused": str(error)})
            texts.append(f"{model}\nnot fitted: {error}")
            continue
        rest = [curve for name, curve in curves.items() if name not in chosen] or list(curves.values())
        table = evaluate(fit, rest)
        records.append({"model": model, "fit": fit.to_json(), "curves": table.to_dict("records")})
        texts.append("\n".join(filter(None, (model, curves_report(fit, table)))))
        figures["curves" + f"-{len(records)}" * (len(models) > 1)] = figure_curves(fit, list(curves.values()))
    if all("refused" in record for record in records):
        fail(f"{args.source}: {len(models)} models, and no law can be fitted to any: {records[0]['refused']}")
    if args.out:
        fit.save(args.out)
    if args.figures:
        save_figures(args.figures, figures)
    return print_result(args, records[0] if len(records) == 1 else {"models": records}, "\n\n".join(texts))


def models_of(source: Path, warmup: int | None) -> dict[str, dict]:
    """The curves by name of each model of a folder: a law holds for one model, one batch and one set of data."""
    from analysis.curves.curve import read_curve

    if not source.is_dir():
        fail(f"{source}: not a folder of curves")
    if (source / "sweep.json").exists() or any(source.rglob("config.json")):
        return models_of_sweep(source, warmup)
    files = sorted(path for path in source.rglob("*") if path.suffix in (".csv", ".parquet"))
    if not files:
        fail(f"{source}: no curves (.csv, .parquet) in this folder")
    return {"": {path.stem: read_curve(path, warmup=warmup, name=path.stem) for path in files}}


def models_of_sweep(source: Path, warmup: int | None) -> dict[str, dict]:
    from analysis.curves.curve import read_curve
    from sweeps.table import run_folders, table

    frame = table(source)
    finished = frame[frame["status"] == "finished"]
    if finished.empty:
        fail(f"{source}: no finished runs, so no curves; train the sweep first")
    folders = {path.name: path for path in run_folders(source)}
    kinds = ["n_compute", "batch_size", *(k for k in ("parametrization", "source") if finished[k].nunique() > 1)]
    models: dict[str, dict] = {}
    for kind, runs in finished.groupby(kinds):
        name = ", ".join(f"{column} = {value}" for column, value in zip(kinds, kind, strict=True))
        models[name] = {run: read_curve(folders[run] / "curve.parquet", warmup, name=run) for run in runs["run"]}
    return models
