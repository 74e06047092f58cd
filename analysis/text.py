"""Text that a terminal shows: tables, and strings from elsewhere made harmless."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text on one line without control, format or surrogate characters: an escape code of a file stays a word."""
    return "".join(" " if c in "\n\t\r" else c if unicodedata.category(c)[0] != "C" else "�" for c in text)


def figure_text(text: str) -> str:
    """A name from a file as text of a figure, in which a dollar sign would begin a formula."""
    return printable(text).replace("$", r"\$")


def text_table(rows: Sequence[Sequence[str]], left: int = 2, indent: int = 0) -> str:
    """Rows of strings as aligned columns, the first row their heads, the first `left` columns to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(len(rows[0])):
        table.add_column(justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(file=io.StringIO(), width=100_000, color_system=None, markup=False, highlight=False, emoji=False)
    console.print(table)
    return "\n".join(" " * indent + line.rstrip() for line in console.file.getvalue().splitlines())
