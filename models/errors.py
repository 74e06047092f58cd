"""The one exception that means: what the user asked for cannot be done, and here is the remedy."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one line: the field, its value, what was expected. The command line exits with 2."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`, did you mean 'x'?` where another of `options` is near, else an empty string (as analysis.errors has it)."""
    lower = {str(o).lower(): str(o) for o in options if str(o) != name}
    close = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.5)
    return f", did you mean {lower[close[0]]!r}?" if close else ""
