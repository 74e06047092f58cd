"""The one exception that means: what the user asked for cannot be done, and here is the remedy."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one line: the field, its value, what was expected. The command line exits with 2."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`, did you mean 'x'?` where one of `options` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
