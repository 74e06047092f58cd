"""The parts of a page: one self-contained HTML file, in which no text from a file is markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

from analysis.report.plots import to_svg
from analysis.text import printable


def page_of(title: str, body: Iterable[str]) -> str:
    """The whole file, from its title and the markup of its parts."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def html_table(heads, rows) -> str:
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def html_list(lines) -> str:
    items = "".join(f"<li class=note>{escaped(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else "<p>No check found anything.</p>"


def html_figure(figure, caption: str) -> str:
    """A matplotlib figure within the page, its caption as the text that stands for it."""
    picture = base64.b64encode(to_svg(figure).encode()).decode()
    return f'<figure><img alt="{escaped(caption)}" src="data:image/svg+xml;base64,{picture}"></figure>'


def escaped(text) -> str:
    """Anything as text of a page: no markup of a run's name or a title is one here."""
    return html.escape(printable(str(text)))


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
