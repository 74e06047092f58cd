"""Several sources in one, each row from one of them by its share: `mix:0.95*facts:form=qa|0.05*facts`.

For replay: finetuning with a little of what the base was trained on. Shares are of rows. Parts must have one set of
tokens; the rows of a corpus of text are its windows. A mixture does not end: of a part that does, rows are drawn with
replacement.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.data.draws import bits, choose, stream, thresholds
from scaling.data.sources import open_source
from scaling.data.store import TokenStore, open_store
from scaling.data.task import Example, Rows, Task
from scaling.data.tokenizers import Tokenizer

USAGE = "mix:SHARE*SOURCE|SHARE*SOURCE"


@dataclass(frozen=True, eq=False)
class Corpus(Task):
    """The windows of a corpus as the rows of a task; every token answers, and nothing can be asked."""

    store: TokenStore

    @property
    def version(self) -> str:
        return self.store.key

    @property
    def spec(self) -> str:
        return self.store.source

    @property
    def tokenizer(self) -> Tokenizer:
        return self.store.tokenizer

    def check(self, T: int) -> None:
        self.store.n_train_windows(T)
        self.store.n_valid_windows(T)

    def n_rows(self, split: str, T: int) -> int:
        return self.store.n_train_windows(T) if split == "train" else self.store.n_valid_windows(T)

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        tokens = getattr(self.store, split)[indices_n[:, None] * T + np.arange(T + 1)].astype(np.int32)
        return {"tokens_BU": tokens, "answer_BT": np.ones((len(indices_n), T), bool)}

    def example(self, split: str, index: int) -> Example:
        raise InputError(f"source: {self.spec!r} is text, which asks nothing; name a task")


@dataclass(frozen=True, eq=False)
class Mixture(Task):
    of: str  #: the spec
    shares: tuple[float, ...]
    parts: tuple[Any, ...]  #: tasks, and until it is prepared sources of text

    @property
    def spec(self) -> str:
        return self.of

    @property
    def version(self) -> str:
        return "mix-1-" + json.dumps(
            [[share, part.version] for share, part in zip(self.shares, self.parts, strict=True)]
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts[0].tokenizer

    @property
    def symbols(self) -> tuple[str, ...]:
        return getattr(self.parts[0], "symbols", ())

    def prepared(self, spec: str, tokenizer: str, valid_fraction: float, cache: Path) -> "Mixture":
        def ready(part: Any) -> Task:
            if isinstance(part, Task):
                return part.prepared(part.spec, tokenizer, valid_fraction, cache)
            return Corpus(open_store(part.spec, tokenizer, cache, valid_fraction))

        parts = tuple(map(ready, self.parts))
        for part in parts[1:]:
            if part.tokenizer.identity != parts[0].tokenizer.identity:
                raise InputError(
                    f"source: {spec!r}: {part.spec!r} has other tokens than {parts[0].spec!r} (vocabularies of "
                    f"{part.vocab_size} and {parts[0].vocab_size}); mix sources of one set of symbols or of bytes"
                )
        return Mixture(spec, self.shares, parts)

    def check(self, T: int) -> None:
        for part in self.parts:
            part.check(T)
        if pairs_among(self, T) not in (0, len(self.parts)):
            raise InputError(f"source: {self.of!r} mixes pairs with single rows; train on one kind at a time")

    @functools.cached_property
    def thresholds_P(self) -> np.ndarray:
        return thresholds(np.rint(np.array(self.shares) / sum(self.shares) * 2**40).astype(np.int64))

    def part_of(self, split: str, indices_n: np.ndarray) -> np.ndarray:
        """The number of the part that each row is of."""
        return choose(self.thresholds_P, bits(stream("mix", split), indices_n, 1)[:, 0])

    def index_in(self, part: Task, split: str, indices_n: np.ndarray, T: int) -> np.ndarray:
        """The numbers of rows within a part."""
        if part.n_rows("train", T) is None:
            return indices_n
        drawn = bits(stream("mix", split, "row"), indices_n, 1)[:, 0]
        return (drawn % np.uint64(part.n_rows(split, T))).astype(np.int64)

    def merged(self, split: str, indices_n: np.ndarray, T: int, of: Any) -> Rows:
        """What `of` gives of each part's rows, in the order of the mixture; an array that a part lacks is True."""
        which_n, rows = self.part_of(split, indices_n), {}
        examples = [of(part, np.zeros(1, np.int64)) for part in self.parts]
        for name, x in functools.reduce(dict.__or__, examples).items():
            rows[name] = np.ones((len(indices_n), *x.shape[1:]), x.dtype)
        for i, part in enumerate(self.parts):
            at = np.flatnonzero(which_n == i)
            if at.size:
                for name, x in of(part, self.index_in(part, split, indices_n[at], T)).items():
                    rows[name][at] = x
        return rows

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        return self.merged(split, indices_n, T, lambda part, index_n: part.rows(split, index_n, T))

    def oracle(self, split: str, indices_n: np.ndarray, T: int) -> np.ndarray:
        """NaN in rows of parts of which it is not known."""

        def of(part: Task, index_n: np.ndarray) -> Rows:
            known = part.oracle(split, index_n, T)
            return {"nats": np.full((len(index_n), T), np.nan) if known is None else known}

        return self.merged(split, indices_n, T, of)["nats"]

    def example(self, split: str, index: int) -> Example:
        part = self.parts[int(self.part_of(split, np.array([index]))[0])]
        if part.n_train is None and not isinstance(part, Corpus):
            return part.example(split, index)
        return part.example(split, index % (part.n_valid if split == "valid" else part.n_train))

    def exact(self) -> dict[str, float]:
        """Of each part, with its number before the name: `1.value_token`; and its share of the rows."""
        facts = {}
        for i, (share, part) in enumerate(zip(self.shares, self.parts, strict=True), start=1):
            facts[f"{i}.share"] = share / sum(self.shares)
            facts |= {f"{i}.{name}": value for name, value in part.exact().items()}
        return facts

    def verify(self, prompt: Any, text: Any) -> float:
        raise InputError(f"source: {self.of!r} is a mixture, which cannot tell whose question it is; name one part")


@functools.lru_cache(maxsize=16)
def pairs_among(mixture: Mixture, T: int) -> int:
    """How many of the parts give pairs. Kept, as every batch asks whether rows of T tokens go."""
    return sum("chosen_BU" in part.rows("train", np.zeros(1, int), T) for part in mixture.parts)


def task(spec: str, rest: str, cache: Path) -> Mixture:
    shares, parts = [], []
    for text in rest.split("|"):
        share, star, source = text.strip().partition("*")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not star or not 0 < value < 2**20:
            raise InputError(f"source: {spec!r}: {text!r} is no part: expected SHARE*SOURCE, such as 0.05*facts:a=1")
        shares.append(value)
        parts.append(open_source(source, cache))
    return Mixture(spec, tuple(shares), tuple(parts))
