"""What a study found, as a table in the terminal and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.files import write_text
from analysis.laws.forms import LAWS
from analysis.report.findings import Study, n_sensitivity
from analysis.report.plots import figure_compute, figure_predicted, figure_tokens, to_svg

_MOST_RUNS = 500

# The checklist of (Mis)Fitting, arXiv 2502.18969: section, item, and the keys of `facts` that answer it.
_CHECKLIST = (
    ("Law", "form", ()),
    ("Law", "variables", ()),
    ("Training", "models", ("models", "model", "architecture")),
    ("Training", "data", ("data", "dataset", "corpus")),
    ("Training", "tokenizer", ("tokenizer", "vocabulary")),
    ("Training", "hyperparameters and how they were chosen", ("hyperparameters", "tuning")),
    ("Training", "schedule", ("schedule",)),
    ("Training", "code", ("code", "version", "command")),
    ("Extraction", "what N counts", ("n",)),
    ("Extraction", "FLOP formula", ("flops", "flop formula")),
    ("Extraction", "checkpoints", ("checkpoints",)),
    ("Extraction", "smoothing", ("smoothing",)),
    ("Fitting", "loss and optimiser", ()),
    ("Fitting", "starts and bounds", ()),
    ("Fitting", "weighting", ("weighting",)),
    ("Fitting", "validation", ()),
    ("Fitting", "intervals", ()),
)


def text_report(study: Study) -> str:
    """The terminal's tables: the held-out runs, every law's error, the chosen law's parameters, and Chinchilla's."""
    parts = []
    if len(study.held_out()):
        rows = [
            (
                f"{r['n']:.4g}",
                f"{r['d']:.4g}",
                f"{r['flops']:.3g}",
                f"{r['predicted']:.4f} [{r['low']:.4f}, {r['high']:.4f}]",
                f"{r['measured']:.4f}",
                f"{100 * r['error']:+.2f} %",
            )
            for r in study.held_out().to_dict("records")
        ]
        parts.append(
            f"Held-out runs, predicted by the {study.law} law from {study.fit.n_runs} cheaper or smaller runs\n"
            + _table(("N", "D", "FLOPs", "predicted [90 % interval]", "measured", "error"), rows)
        )
    else:
        parts.append("No runs held out: give --holdout, such as --holdout 'flops > 1e12', to check the prediction")
    heads = ("law", "held-out error", "in 90 % interval", "validation error")
    parts.append("Laws\n" + _table(heads, [row[:-1] for row in _law_rows(study)]))
    parts.append(f"Parameters, {study.law}: {LAWS[study.law].text}\n" + _params_table(study, study.law))
    if study.law != "chinchilla" and "chinchilla" in study.fits:
        parts.append(f"Parameters, chinchilla: {LAWS['chinchilla'].text}\n" + _params_table(study, "chinchilla"))
    parts.append("\n".join((f"N is {study.fit.n_column}", *(f"note: {note}" for note in _notes(study)))))
    return "\n\n".join(parts)


def write_report(study: Study, path, title: str, facts: Mapping | None = None) -> Path:
    """Writes the page, figures included, so that the file can be sent alone.

    facts: what the runs' maker knows and the table does not, by checklist item ("data", "tokenizer", "hyperparameters",
    "code", ...); items of other names are listed too.
    """
    esc = html.escape
    figures = "".join(
        f'<figure><img alt="{esc(alt)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(to_svg(make(study)).encode()).decode()}"></figure>'
        for make, alt in (
            (figure_predicted, "predicted against measured loss"),
            (figure_compute, "loss against compute with the compute-optimal frontier"),
            (figure_tokens, "loss against tokens for each N"),
        )
    )
    error = study.mean_abs_error()
    lead = f"The {study.law} law, {LAWS[study.law].text}, fitted to {study.fit.n_runs} runs"
    if error is not None:
        count = len(study.held_out())
        lead += (
            f", predicts the {count} held-out runs with a mean absolute error of {100 * error:.2f} %; "
            f"{round(study.coverage() * count)} of {count} lie inside their 90 % interval"
        )
    body = [
        f"<h1>{esc(title)}</h1><p class=lead>{esc(lead)}.</p>",
        *(f"<p class=note>{esc(note)}</p>" for note in _notes(study)),
    ]
    if error is not None:
        rows = [
            (
                f"{r['n']:.4g}",
                f"{r['d']:.4g}",
                f"{r['flops']:.3g}",
                f"{r['predicted']:.4f}",
                f"[{r['low']:.4f}, {r['high']:.4f}]",
                f"{r['measured']:.4f}",
                f"{100 * r['error']:+.2f} %",
            )
            for r in study.held_out().to_dict("records")
        ]
        heads = ("N", "D", "FLOPs", "predicted", "90 % interval", "measured", "error")
        body.append("<h2>Held-out runs</h2>" + _html_table(heads, rows))
    body.append(figures)
    body.append(
        "<h2>Laws</h2>"
        + _html_table(("law", "held-out error", "in 90 % interval", "validation error", "note"), _law_rows(study))
        + "<p>Validation: fit the cheaper runs, predict those up to 4 times dearer, at many cuts inside the fitted "
        "part. The law is chosen by it alone; a simpler law within 10 % of the best wins.</p>"
    )
    for law in dict.fromkeys((study.law, "chinchilla")):
        if law in study.fits:
            body.append(
                f"<h2>Parameters, {esc(law)}</h2><p><code>L = {esc(LAWS[law].text)}</code></p>"
                + _html_table(("parameter", "estimate", "90 % interval"), _param_rows(study, law))
                + f"<details><summary>Summary</summary><pre>{esc(study.fits[law].summary())}</pre></details>"
            )
    sensitivity = n_sensitivity(study)
    if len(sensitivity):
        rows = [
            (
                r["n_column"],
                r["law"],
                f"{r['a']:.3f}",
                f"[{r['low']:.3f}, {r['high']:.3f}]",
                _percent(None if pd.isna(r["mean_abs_error"]) else r["mean_abs_error"]),
            )
            for r in sensitivity.to_dict("records")
        ]
        body.append(
            "<h2>What N counts</h2><p>The exponent a of the compute-optimal size, N* ~ C<sup>a</sup>, C = 6ND.</p>"
            + _html_table(("N", "law", "a", "90 % interval", "held-out error"), rows)
        )
    body.append("<h2>Checklist</h2>" + _html_table(("", "item", "answer"), _checklist(study, facts or {})))
    body.append("<h2>Runs</h2>" + _runs_table(study))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    return write_text(path, page)


def _percent(share) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _notes(study: Study) -> list[str]:
    notes = list(study.fit.notes)
    if not study.fit.diagnostics["converged"]:
        notes.append(f"the {study.law} fit did not converge: treat its parameters with care")
    if at_bound := study.fit.diagnostics["at_bound"]:
        notes.append(
            f"{study.law}: {', '.join(at_bound)} at the edge of the allowed range: these runs do not pin it down"
        )
    if all(score.score is None for score in study.scores.values()):
        notes.append("too few runs for validation inside the fitted part: the law is not tested, its misfit unknown")
    return notes


def _law_rows(study: Study):
    rows = []
    for name, score in study.scores.items():
        fitted = name in study.fits
        inside, held = study.coverage(name) if fitted else None, len(study.held_out(name))
        rows.append(
            (
                name + (" (chosen)" if name == study.law else ""),
                _percent(study.mean_abs_error(name)) if fitted else "-",
                "-" if inside is None else f"{round(inside * held)} of {held}",
                _percent(score.score) + (f" ({score.cuts} cuts)" if score.cuts else ""),
                score.note,
            )
        )
    return rows


def _param_rows(study: Study, law: str):
    one = study.fits[law]
    return [
        (name, f"{value:.5g}", f"[{one.intervals[name][0]:.4g}, {one.intervals[name][1]:.4g}]")
        for name, value in one.params.items()
    ]


def _params_table(study: Study, law: str) -> str:
    return _table(("parameter", "estimate", "90 % interval"), _param_rows(study, law))


def _table(heads, rows) -> str:
    """Columns as wide as their widest entry, the first to the left, the rest to the right."""
    lines = [tuple(map(str, heads)), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = []
    for first, *rest in lines:
        shown.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))
    shown.insert(1, "-" * max(len(line.rstrip()) for line in shown))
    return "\n".join("  " + line.rstrip() for line in shown)


def _html_table(heads, rows) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _checklist(study: Study, facts: Mapping):
    given = {str(k).strip().lower(): str(v) for k, v in facts.items()}
    fit, runs = study.fit, study.runs
    cuts = max(score.cuts for score in study.scores.values())
    known = {
        "form": f"L = {LAWS[fit.law].text} ({LAWS[fit.law].source}); "
        + ("chosen by validation" if study.requested == "auto" else "asked for by name"),
        "variables": f"N = {runs.n_column}, D = {runs.d_column}, C = {runs.c_column}, loss = {runs.loss_column}",
        "models": f"{len(set(runs.n))} sizes, N {runs.n.min():.3g} to {runs.n.max():.3g}; {len(runs)} runs, "
        f"D {runs.d.min():.3g} to {runs.d.max():.3g}",
        "what N counts": f"column {runs.n_column}",
        "FLOP formula": f"{runs.c_column}; extrapolation and allocation use C = 6ND",
        "checkpoints": "one row per run, taken as its final loss",
        "smoothing": "none in the fit",
        "loss and optimiser": f"sum of Huber, delta {fit.delta:g}, on log loss; damped Newton on centred variables "
        "with analytic derivatives, delta lowered in steps",
        "starts and bounds": f"{fit.diagnostics['starts']} starts, {fit.diagnostics['starts_agree']} agree on the "
        "optimum; E >= 0, asymptotic exponents 0.01 to 3",
        "weighting": "all fitted runs weigh the same",
        "validation": f"{int(runs.holdout.sum())} runs held out; {cuts} rolling cuts over compute inside the rest",
        "intervals": f"{0 if fit.draws is None else len(fit.draws)} bootstrap refits; predictions add run-to-run noise "
        f"({100 * fit.noise['sigma']:.2f} %) and misfit ({100 * fit.discrepancy['k']:.2f} % per squared decade)",
    }
    rows = []
    for section, item, keys in _CHECKLIST:
        answers = [given.pop(key) for key in (item.lower(), *keys) if key in given]
        if item in known:
            answers.insert(0, known[item])
        rows.append((section, item, "; ".join(answers) or "not stated"))
    return rows + [("Other", item, answer) for item, answer in given.items()]


def _runs_table(study: Study) -> str:
    runs = study.runs
    table = pd.DataFrame(
        {
            "N": [f"{v:.4g}" for v in runs.n],
            "D": [f"{v:.4g}" for v in runs.d],
            "FLOPs": [f"{v:.3g}" for v in runs.flops],
            "loss": [f"{v:.4f}" for v in runs.loss],
            "predicted": [f"{v:.4f}" for v in study.fit.predict(runs.n, runs.d)],
            "held out": ["yes" if held else "" for held in runs.holdout],
        }
    )
    for column in ("bits_per_byte", "d_model", "n_layers", "lr", "batch_size", "seq_len", "seed", "run"):
        if column in runs.frame.columns:
            values = runs.frame[column].tolist()
            table[column] = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    cut = len(table) > _MOST_RUNS
    more = f"<p>The first {_MOST_RUNS} of {len(table)} runs.</p>" if cut else ""
    return more + _html_table(table.columns, table.head(_MOST_RUNS).to_numpy())


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:56rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.4rem}h2{font-size:1.15rem;margin-top:2rem}
.lead{font-size:1.05rem}.note{color:#8a4b00}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #e4e4e4;vertical-align:top}
th{border-bottom:1.5px solid #888}
figure{margin:1.2rem 0}img{max-width:100%;height:auto}
pre,code{font-size:.85rem}pre{overflow-x:auto;background:#f7f7f7;padding:.8rem}
"""
