"""What the analysis of a sweep found, as a table in the terminal and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from analysis.files import write_text
from analysis.fitting.problem import MANY
from analysis.laws.forms import LAWS
from analysis.report.findings import Findings, n_sensitivity
from analysis.report.markup import escaped, html_figure, html_list, html_table, page_of
from analysis.report.plots import figures_of
from analysis.text import text_table

_MOST_RUNS = 500
_MOST_HELD = 50  # in a terminal

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


def text_report(findings: Findings) -> str:
    """The terminal's tables: the held-out runs, every law's error, the chosen law's parameters, and Chinchilla's."""
    parts = ["\n".join(f"warning: {doubt}" for doubt in findings.doubts)] if findings.doubts else []
    if held := _held_rows(findings):
        rows = [(*row[:3], f"{row[3]} {row[4]}", *row[5:]) for row in held[:_MOST_HELD]]
        left = len(findings.held_out()) - len(rows)
        more = f"\n  and {left} more" if left else ""
        parts.append(
            f"Held-out runs, predicted by the {findings.law} law from {findings.fit.n_runs} cheaper or smaller runs\n"
            + _table(("N", "D", "FLOPs", "predicted [90 % interval]", "measured", "error"), rows)
            + more
        )
    else:
        parts.append("No runs held out: give --holdout, such as --holdout 'flops > 1e12', to check the prediction")
    heads = ("law", "held-out error", "in 90 % interval", "validation error")
    parts.append("Laws\n" + _table(heads, [row[:-1] for row in _law_rows(findings)]))
    parts.append(f"Parameters, {findings.law}: {LAWS[findings.law].text}\n" + _params_table(findings, findings.law))
    if findings.law != "chinchilla" and "chinchilla" in findings.fits:
        parts.append(f"Parameters, chinchilla: {LAWS['chinchilla'].text}\n" + _params_table(findings, "chinchilla"))
    parts.append("\n".join((f"N is {findings.fit.n_column}", *(f"note: {note}" for note in _notes(findings)))))
    return "\n\n".join(parts)


def write_report(
    findings: Findings, path, title: str, facts: Mapping | None = None, checks: Sequence[str] = (), figures=None
) -> Path:
    """Writes the page, figures included, so that the file can be sent alone.

    facts: what the runs' maker knows and the table does not, by checklist item ("data", "tokenizer", "hyperparameters",
    "code", ...); items of other names are listed too. checks: what else a reader should know before believing it.
    figures: those of `figures_of`, where they are drawn already.
    """
    held = _held_rows(findings)
    heads = ("N", "D", "FLOPs", "predicted", "90 % interval", "measured", "error")
    body = (
        f"<h1>{escaped(title)}</h1><p class=lead>{escaped(_lead(findings))}.</p>",
        "<h2>Before you believe it</h2>" + html_list((*findings.doubts, *_notes(findings), *checks)),
        "<h2>Held-out runs</h2>" + html_table(heads, held) if held else "",
        _figures_section(figures_of(findings.runs, findings.fit) if figures is None else figures),
        _laws_section(findings),
        _sensitivity_section(findings),
        "<h2>Checklist</h2>" + html_table(("", "item", "answer"), _checklist(findings, facts or {})),
        "<h2>Runs</h2>" + _runs_table(findings),
    )
    return write_text(path, page_of(title, body))


def _held_rows(findings: Findings) -> list[tuple[str, ...]]:
    """N, D, FLOPs, predicted, interval, measured, error of each held-out run, as text."""
    return [
        (
            f"{r['n']:.4g}",
            f"{r['d']:.4g}",
            f"{r['flops']:.3g}",
            f"{r['predicted']:.4f}",
            f"[{r['low']:.4f}, {r['high']:.4f}]",
            f"{r['measured']:.4f}",
            f"{100 * r['error']:+.2f} %",
        )
        for r in findings.held_out().head(_MOST_RUNS).to_dict("records")
    ]


def _lead(findings: Findings) -> str:
    error, count = findings.mean_abs_error(), len(findings.held_out())
    lead = f"The {findings.law} law, {LAWS[findings.law].text}, fitted to {findings.fit.n_runs} runs"
    if error is None:
        return lead
    return (
        f"{lead}, predicts the {count} held-out runs with a mean absolute error of {100 * error:.2f} %; "
        f"{round(findings.coverage() * count)} of {count} lie inside their 90 % interval"
    )


def _figures_section(figures: Mapping) -> str:
    captions = {
        "predicted": "predicted against measured loss",
        "compute": "loss against compute with the compute-optimal frontier",
        "tokens": "loss against tokens for each N",
    }
    return "".join(html_figure(figures[name], caption) for name, caption in captions.items())


def _laws_section(findings: Findings) -> str:
    parts = [
        "<h2>Laws</h2>",
        html_table(("law", "held-out error", "in 90 % interval", "validation error", "note"), _law_rows(findings)),
        "<p>Validation: fit the cheaper runs, predict those of up to 4 times the compute, at many cuts inside the "
        "fitted part. The law is chosen by it alone; a simpler law within 10 % of the best wins.</p>",
    ]
    for law in dict.fromkeys((findings.law, "chinchilla")):
        if law in findings.fits:
            summary = "\n".join(map(escaped, findings.fits[law].summary().split("\n")))
            parts += [
                f"<h2>Parameters, {escaped(law)}</h2><p><code>L = {escaped(LAWS[law].text)}</code></p>",
                html_table(("parameter", "estimate", "90 % interval"), _param_rows(findings, law)),
                f"<details><summary>Summary</summary><pre>{summary}</pre></details>",
            ]
    return "".join(parts)


def _sensitivity_section(findings: Findings) -> str:
    rows = [
        (
            r["n_column"],
            r["law"],
            f"{r['a']:.3f}",
            f"[{r['low']:.3f}, {r['high']:.3f}]",
            _percent(None if pd.isna(r["mean_abs_error"]) else r["mean_abs_error"]),
        )
        for r in n_sensitivity(findings).to_dict("records")
    ]
    if not rows:
        return ""
    return (
        "<h2>What N counts</h2><p>The exponent a of the compute-optimal size, N* ~ C<sup>a</sup>, C = 6ND.</p>"
        + html_table(("N", "law", "a", "90 % interval", "held-out error"), rows)
    )


def _percent(share) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _notes(findings: Findings) -> list[str]:
    notes = list(findings.fit.notes)
    if not findings.fit.diagnostics["converged"]:
        notes.append(f"the {findings.law} fit did not converge: treat its parameters with care")
    if at_bound := findings.fit.diagnostics["at_bound"]:
        notes.append(
            f"{findings.law}: {', '.join(at_bound)} at the edge of the allowed range: these runs do not pin it down"
        )
    if all(score.score is None for score in findings.scores.values()):
        notes.append("too few runs for validation inside the fitted part: the law is not tested, its misfit unknown")
    return notes


def _law_rows(findings: Findings):
    rows = []
    for name, score in findings.scores.items():
        fitted = name in findings.fits
        inside, held = findings.coverage(name) if fitted else None, len(findings.held_out(name))
        rows.append(
            (
                name + (" (chosen)" if name == findings.law else ""),
                _percent(findings.mean_abs_error(name)) if fitted else "-",
                "-" if inside is None else f"{round(inside * held)} of {held}",
                _percent(score.score) + (f" ({score.cuts} cuts)" if score.cuts else ""),
                score.note,
            )
        )
    return rows


def _param_rows(findings: Findings, law: str):
    fit = findings.fits[law]
    return [
        (name, f"{value:.5g}", f"[{fit.intervals[name][0]:.4g}, {fit.intervals[name][1]:.4g}]")
        for name, value in fit.params.items()
    ]


def _params_table(findings: Findings, law: str) -> str:
    return _table(("parameter", "estimate", "90 % interval"), _param_rows(findings, law))


def _table(heads, rows) -> str:
    return text_table([heads, *rows], left=1, indent=2)


def _checklist(findings: Findings, facts: Mapping):
    given = {str(k).strip().lower(): str(v) for k, v in facts.items()}
    fit, runs = findings.fit, findings.runs
    cuts = max(score.cuts for score in findings.scores.values())
    known = {
        "form": f"L = {LAWS[fit.law].text} ({LAWS[fit.law].source}); "
        + ("chosen by validation" if findings.requested == "auto" else "asked for by name"),
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
        f"optimum; at the edge of the allowed range: {', '.join(fit.diagnostics['at_bound']) or 'nothing'}",
        "weighting": "all fitted runs weigh the same",
        "validation": f"{int(runs.holdout.sum())} runs held out; {cuts} rolling cuts over compute inside the rest",
        "intervals": f"{0 if fit.draws is None else len(fit.draws)} "
        + ("bootstrap refits" if fit.n_runs <= MANY else "normal draws from the sandwich covariance of the optimum")
        + (f", clustered by {findings.fit.cluster}" if findings.fit.cluster != "none" else "")
        + f"; predictions add run-to-run noise "
        f"({100 * fit.noise['sigma']:.2f} %) and misfit ({100 * fit.discrepancy['k']:.2f} % per squared decade)",
    }
    rows = []
    for section, item, keys in _CHECKLIST:
        answers = [given.pop(key) for key in (item.lower(), *keys) if key in given]
        if item in known:
            answers.insert(0, known[item])
        rows.append((section, item, "; ".join(answers) or "not stated"))
    return rows + [("Other", item, answer) for item, answer in given.items()]


def _runs_table(findings: Findings) -> str:
    runs = findings.runs.take(slice(_MOST_RUNS))
    table = pd.DataFrame(
        {
            "N": [f"{v:.4g}" for v in runs.n],
            "D": [f"{v:.4g}" for v in runs.d],
            "FLOPs": [f"{v:.3g}" for v in runs.flops],
            "loss": [f"{v:.4f}" for v in runs.loss],
            "predicted": [f"{v:.4f}" for v in findings.fit.predict(runs.n, runs.d)],
            "held out": ["yes" if held else "" for held in runs.holdout],
        }
    )
    for column in ("bits_per_byte", "d_model", "n_layers", "lr", "batch_size", "seq_len", "seed", "run"):
        if column in runs.frame.columns:
            values = runs.frame[column].tolist()
            table[column] = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    cut = len(findings.runs) > len(runs)
    more = f"<p>The first {len(runs)} of {len(findings.runs)} runs.</p>" if cut else ""
    return more + html_table(table.columns, table.to_numpy())
