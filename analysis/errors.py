"""The one exception for input that is wrong, and how a misspelt name is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the field, its value, and the remedy."""


def close_match(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'tokens'?)' where a known name is near, else the known names, else nothing."""
    known = [str(k) for k in known]
    lower = {k.lower(): k for k in reversed(known)}
    near = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.6)
    if near:
        return f" (did you mean {lower[near[0]]!r}?)"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (there are: {shown})"
