"""The one exception for input that is wrong, and how a misspelt name is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the field, its value, and the remedy."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`, did you mean 'x'?` where another of `options` is near, else an empty string (as models.errors has it)."""
    lower = {str(o).lower(): str(o) for o in options if str(o) != name}
    close = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.5)
    return f", did you mean {lower[close[0]]!r}?" if close else ""


def nearest_or_all(name: str, options: Iterable[str]) -> str:
    """`did_you_mean`, or where nothing is near the first twelve of the options."""
    options = [str(o) for o in options]
    listed = f" (there are: {', '.join(options[:12])}{', ...' if len(options) > 12 else ''})" if options else ""
    return did_you_mean(name, options) or listed
