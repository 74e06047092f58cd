"""Tokenizers by name: `bytes`, `bpe:VOCAB` trained on the training split of the corpus, and the `symbols` of a task.

Id 0 ends a document and stands for nothing else: NUL, its text, is removed from every document by `clean`.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from models.errors import InputError, did_you_mean

END_OF_DOCUMENT = 0
SMALLEST_BPE = 257  # the end of a document and the 256 byte values
LARGEST_BPE = 2**24


class Tokenizer(Protocol):
    """Text to ids and back. `decode(encode(text)) == clean(text)` for any text."""

    vocab_size: int

    @property
    def identity(self) -> str: ...  # equal where equal ids mean the same

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def encode_many(self, texts: Iterable[str]) -> Iterator[np.ndarray]: ...


def vocab_size(spec: str) -> int:
    """The vocabulary that a tokenizer's name stands for, found without reading any text.

    Raises InputError where the name is unknown or the vocabulary is too small to hold every byte.
    """
    if spec == "bytes":
        return 256
    match = re.fullmatch(r"bpe:(\d{1,9})", spec)
    if match is None:
        raise InputError(f"tokenizer: unknown {spec!r}{_guess(spec)} (known: 'bytes', 'bpe:VOCAB' such as 'bpe:1024')")
    size = int(match[1])
    if not SMALLEST_BPE <= size <= LARGEST_BPE:
        raise InputError(
            f"tokenizer: {spec!r} has a vocabulary of {size}; "
            f"take {SMALLEST_BPE} (every byte and the end of a document) to {LARGEST_BPE}"
        )
    return size


def _guess(spec: str) -> str:
    size = spec.partition(":")[2]
    return did_you_mean(spec, ["bytes", f"bpe:{size if size.isdecimal() else 1024}"])


def clean(text: str) -> str:
    """The text without NUL, which is kept for the end of a document; a lone surrogate becomes a question mark."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def token_dtype(size: int) -> np.dtype:
    """The smallest unsigned type that holds ids below `size`."""
    return np.min_scalar_type(size - 1)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token per UTF-8 byte."""

    vocab_size: int = 256
    identity = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(clean(text).encode("utf-8"), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return np.asarray(ids, np.uint8).tobytes().decode("utf-8", "replace")

    def encode_many(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, texts)


@dataclasses.dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding from a `tokenizer.json`, which is read when it is first used."""

    path: Path
    vocab_size: int

    @functools.cached_property
    def identity(self) -> str:
        return f"bpe-{hashlib.sha256(self.path.read_bytes()).hexdigest()}"

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self.path))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(clean(text)).ids, token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_many(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        dtype = token_dtype(self.vocab_size)
        for batch in _batches(map(clean, texts), 2**22):
            for encoding in self._tokenizer.encode_batch_fast(batch):
                yield np.asarray(encoding.ids, dtype)


@dataclasses.dataclass(frozen=True)
class Symbols:
    """The symbols of a task by their names, which text has blanks between."""

    names: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.names)

    @property
    def identity(self) -> str:
        return f"symbols {' '.join(self.names)}"

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def encode(self, text: str) -> np.ndarray:
        """Raises InputError for a name that is no symbol."""
        for name in text.split():
            if name not in self._ids:
                guess = did_you_mean(name, self.names)
                raise InputError(f"{name!r} is none of the {len(self.names)} symbols{guess}; put blanks between them")
        return np.array([self._ids[name] for name in text.split()], token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.names[int(i)] for i in ids)

    def encode_many(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, texts)


def train_bpe(spec: str, texts: Iterable[str], path: Path) -> BPE:
    """Trains `bpe:VOCAB` on the texts and writes it to `path`. The same texts in the same order give the same file.

    Raises InputError where the texts are too few for that many tokens.
    """
    import tokenizers

    size = vocab_size(spec)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["\0"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != size:
        raise InputError(
            f"tokenizer: {spec!r} asks for more tokens than the training text yields; take 'bpe:{reached}' or smaller"
        )
    tokenizer.save(str(path))
    return BPE(path, size)


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    batch, held = [], 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
