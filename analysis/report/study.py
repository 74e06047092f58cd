"""The page of a study: question, claims as they were written before the runs, verdicts, figures, table and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.files import write_text
from analysis.report.markup import escaped, html_figure, html_list, html_table, page_of

# What a claim states, in the order in which a reader wants it.
_STATED = ("text", "metric", "axis", "law", "controls", "holdout", "refuted_by", "sha256")


def write_study(
    path,
    title: str,
    question: str,
    claims: Sequence[Mapping],
    verdicts: Sequence[Mapping],
    table: Sequence[Sequence[str]] = (),
    figures: Mapping | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes one self-contained page.

    claims: name, text, metric, axis, law, controls, holdout, refuted_by and sha256 of each. verdicts: name, verdict,
    predicted, low, high, measured, note of each. table: heads and rows, as printed. figures: caption -> matplotlib
    figure. notes: what a reader should know, the cost among it.
    """
    heads = ("claim", "verdict", "predicted", "interval", "measured", "note")
    count = Counter(verdict["verdict"] for verdict in verdicts)
    came = ", ".join(f"{number} {verdict}" for verdict, number in sorted(count.items()))
    body = (
        f"<h1>{escaped(title)}</h1><p class=lead>{escaped(question)}</p><p>Claims: {escaped(came)}.</p>",
        "<h2>Verdicts</h2>" + html_table(heads, map(_row, verdicts)),
        "".join(
            html_figure(figure, caption) + f"<p>{escaped(caption)}</p>" for caption, figure in (figures or {}).items()
        ),
        "<h2>Table</h2>" + html_table(table[0], table[1:]) if table else "",
        "<h2>Claims, as written before the first run</h2>" + "".join(map(_claim, claims)),
        "<h2>Notes and cost</h2>" + html_list(notes),
    )
    return write_text(path, page_of(title, body))


def _row(verdict: Mapping) -> tuple[str, ...]:
    low, high = verdict["low"], verdict["high"]
    interval = "-" if low is None and high is None else f"[{_number(low)}, {_number(high)}]"
    numbers = _number(verdict["predicted"]), interval, _number(verdict["measured"])
    return verdict["name"], verdict["verdict"], *numbers, verdict["note"]


def _number(value) -> str:
    return "-" if value is None else f"{value:.4g}"


def _claim(claim: Mapping) -> str:
    rows = [(name, "; ".join(claim[name]) if name == "controls" else claim[name]) for name in _STATED]
    return f"<h3>{escaped(claim['name'])}</h3>" + html_table(("", ""), rows)
