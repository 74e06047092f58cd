"""The token store: a corpus as two files of token ids, memory-mapped, built once and then only read.

A store is a folder `stores/<key>/` of `train.bin`, `valid.bin`, `meta.json`, and `tokenizer.json` for a trained
tokenizer. The key hashes everything the tokens depend on. The folder is built beside its place and renamed into it, so
it is either whole or not there.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.errors import InputError
from scaling.data.cache import cache_root, locked
from scaling.data.sources import Source, open_source
from scaling.data.task import Task, TaskStore
from scaling.data.tokenizers import BPE, END_OF_DOCUMENT, Bytes, Tokenizer, token_dtype, train_bpe, vocab_size

FORMAT = 1  # raise it when the same source, tokenizer and fraction would give other tokens


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of a corpus and how to cut them into windows.

    Window i of T tokens is tokens i*T .. i*T+T, both included: T inputs, and the same shifted by one as T targets.
    The last target of a window is the first input of the next, so every token but the first is a target once.
    `train_bytes` and `valid_bytes` count UTF-8 bytes of text, without the ends of documents.
    """

    key: str
    source: str
    train: np.memmap
    valid: np.memmap
    tokenizer: Tokenizer
    train_bytes: int
    valid_bytes: int

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        """By the key, which is a digest of the content."""
        return isinstance(other, TokenStore) and other.key == self.key

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def n_train_windows(self, seq_len: int) -> int:
        return self._n_windows("training", self.train, seq_len)

    def n_valid_windows(self, seq_len: int) -> int:
        return self._n_windows("validation", self.valid, seq_len)

    def train_windows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Training windows by index, int32 [len(indices), seq_len + 1]. IndexError for one that does not exist."""
        indices = np.asarray(indices, np.int64)
        n = self.n_train_windows(seq_len)
        if indices.size and not (indices.min() >= 0 and indices.max() < n):
            raise IndexError(f"window indices {indices.min()} to {indices.max()} of {n} training windows")
        return self.train[indices[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int32)

    def valid_windows(self, seq_len: int) -> np.ndarray:
        """The whole validation split, int32 [n_valid_windows, seq_len + 1], without a last part that is too short."""
        n = self.n_valid_windows(seq_len)
        return self.valid[np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int32)

    def bits_per_byte(self, loss: float) -> float:
        """Validation cross-entropy in nats per token as bits per UTF-8 byte of text, the same for every tokenizer."""
        return loss * len(self.valid) / self.valid_bytes / math.log(2)

    def _n_windows(self, split: str, tokens_T: np.ndarray, seq_len: int) -> int:
        if seq_len < 1:
            raise InputError(f"seq_len: {seq_len} is not positive; take 1 or more")
        if seq_len >= len(tokens_T):
            raise InputError(
                f"seq_len: {seq_len} is longer than the {split} split of {self.source!r} ({len(tokens_T)} tokens); "
                "take a shorter one or a larger corpus"
            )
        return (len(tokens_T) - 1) // seq_len


def open_store(
    source: str, tokenizer: str, cache_dir: Path | None = None, valid_fraction: float = 0.02
) -> TokenStore | TaskStore:
    """The token store of a source (see open_source) and a tokenizer (see vocab_size), built if it is not there; of a
    task, which needs none, what stands for it.

    Any number of processes may ask at once: one builds, the others wait. A damaged store is built again. Raises
    InputError, leaving nothing behind, where source, tokenizer or fraction cannot be used.
    """
    if tokenizer != "symbols":
        vocab_size(tokenizer)
    if not 0 < valid_fraction < 0.5:
        raise InputError(f"valid_fraction: {valid_fraction} is out of range; take more than 0 and less than 0.5")
    opened = open_source(source, cache_dir)
    if isinstance(opened, Task):
        return TaskStore(source, opened.prepared(source, tokenizer, valid_fraction, cache_root(cache_dir)))
    if tokenizer == "symbols":
        raise InputError(f"tokenizer: 'symbols' are those of a task, and {source!r} is text; take bytes or bpe:VOCAB")
    identity = [FORMAT, opened.version, tokenizer, float(valid_fraction)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    folder = cache_root(cache_dir) / "stores" / key
    with contextlib.suppress(FileNotFoundError, _DamagedError):
        return _load(folder, source)
    with locked(folder.with_name(f".{key}.lock")):
        try:
            return _load(folder, source)
        except FileNotFoundError:
            pass
        except _DamagedError as damage:
            print(f"scaling: the token store {folder} is damaged ({damage}); building it again", file=sys.stderr)
            shutil.rmtree(folder)
        try:
            _build(folder, opened, tokenizer, valid_fraction)
        except OSError as error:
            raise InputError(
                f"cache_dir: the token store {folder} cannot be written ({error.strerror or error}); "
                "free some space or set SCALING_CACHE to another folder"
            ) from error
        return _load(folder, source)


def open_tokenizer(
    source: str, tokenizer: str, key: str, cache_dir: Path | None = None, valid_fraction: float = 0.02
) -> Tokenizer:
    """The tokenizer of the store with this key; the corpus is not touched where the store is there, or not needed.

    Raises InputError where the source gives another store by now, so that a trained tokenizer would be another one.
    """
    if tokenizer == "bytes":
        return Bytes()
    if re.fullmatch(r"[0-9a-f]{20}", key):
        with contextlib.suppress(FileNotFoundError, _DamagedError):
            return _load(cache_root(cache_dir) / "stores" / key, source).tokenizer
    store = open_store(source, tokenizer, cache_dir, valid_fraction)
    if store.key != key:
        raise InputError(
            f"source: {source!r} is store {store.key} by now, and the run was trained on {key!r}: its tokenizer "
            f"{tokenizer!r} is lost; put the old text back"
        )
    return store.tokenizer


class _DamagedError(Exception):
    """A store folder that is not what its meta.json says."""


def _load(folder: Path, source: str) -> TokenStore:
    """Raises FileNotFoundError where there is no folder, _DamagedError where it is not whole."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT or meta["key"] != folder.name:
            raise _DamagedError("meta.json belongs to another store")
        for name, size in meta["files"].items():
            on_disk = (folder / name).stat().st_size
            if on_disk != size:
                raise _DamagedError(f"{name} has {on_disk} bytes, not {size}")
        split = {
            name: np.memmap(folder / f"{name}.bin", meta["dtype"], "r", shape=(meta[name]["tokens"],))
            for name in ("train", "valid")
        }
        size = vocab_size(meta["tokenizer"])
        tokenizer = Bytes() if meta["tokenizer"] == "bytes" else BPE(folder / "tokenizer.json", size)
        return TokenStore(
            key=folder.name,
            source=source,
            tokenizer=tokenizer,
            train_bytes=meta["train"]["bytes"],
            valid_bytes=meta["valid"]["bytes"],
            **split,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error


def _build(folder: Path, source: Source, tokenizer: str, valid_fraction: float) -> None:
    """Writes the store beside its place and renames it into it. The caller holds the lock of this key."""
    for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        split = _plan_split(source, valid_fraction)
        if tokenizer == "bytes":
            coder = Bytes()
        else:
            texts = (text for name, text in _pieces(source, split) if name == "train")
            coder = train_bpe(tokenizer, texts, partial / "tokenizer.json")
        meta = {
            "format": FORMAT,
            "key": folder.name,
            "source": source.spec,
            "version": source.version,
            "tokenizer": tokenizer,
            "vocab_size": coder.vocab_size,
            "dtype": token_dtype(coder.vocab_size).name,
            "valid_fraction": valid_fraction,
            **_write_tokens(partial, source, split, coder),
        }
        meta["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        os.chmod(partial, 0o755)
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        try:
            os.rename(partial, folder)
        except OSError:  # where the file system knows no locks, another builder may have been faster
            if not folder.is_dir():
                raise
        _fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which documents validate, by the digest of their text; `cut`: a digest and the byte where validation starts."""

    valid: frozenset[bytes]
    cut: tuple[bytes, int] | None
    documents: int


def _plan_split(source: Source, valid_fraction: float) -> _Split:
    """Documents go to validation in the order of sha256 of their text until they hold the wanted share of the bytes.

    Copies of a text share its digest, so they stay together. A document that would take validation past twice the
    wanted share gives only its end, which is how a corpus of one document, or of a few books, is split.
    """
    copies, sizes = Counter(), {}
    for text in source.documents():
        data = text.encode()
        digest = hashlib.sha256(data).digest()
        copies[digest] += 1
        sizes[digest] = len(data)
    total = sum(sizes[digest] * n for digest, n in copies.items())
    wanted, held, valid, cut = valid_fraction * total, 0, set(), None
    for digest in sorted(sizes):
        if held + sizes[digest] * copies[digest] > 2 * wanted:
            cut = (digest, sizes[digest] - max(1, math.ceil(wanted - held)))
            break
        valid.add(digest)
        held += sizes[digest] * copies[digest]
        if held >= wanted:
            break
    return _Split(frozenset(valid), cut, copies.total())


def _pieces(source: Source, split: _Split) -> Iterator[tuple[str, str]]:
    """("train" or "valid", text) of every document in the order of the source, one of them cut in two where planned."""
    seen, cut_once = 0, False
    for text in source.documents():
        seen += 1
        data = text.encode()
        digest = hashlib.sha256(data).digest()
        if split.cut and digest == split.cut[0]:
            at = split.cut[1]
            while at > 0 and data[at] & 0xC0 == 0x80:  # inside a character
                at -= 1
            yield "train", data[:at].decode()
            if not cut_once:
                cut_once = True
                yield "valid", data[at:].decode()
        else:
            yield ("valid" if digest in split.valid else "train"), text
    if seen != split.documents:
        raise InputError(f"source: {source.spec!r} changed while it was read; try again when nothing writes to it")


def _write_tokens(folder: Path, source: Source, split: _Split, coder: Tokenizer) -> dict[str, dict[str, int]]:
    """Writes train.bin and valid.bin; the counts of each: tokens, bytes of text, documents."""
    counts = {name: {"tokens": 0, "bytes": 0, "documents": 0} for name in ("train", "valid")}
    end = np.array([END_OF_DOCUMENT], token_dtype(coder.vocab_size))
    names: deque[str] = deque()  # of the texts that the coder holds in its batch

    def texts() -> Iterator[str]:
        for name, text in _pieces(source, split):
            if text:
                names.append(name)
                counts[name]["documents"] += 1
                counts[name]["bytes"] += len(text.encode())
                yield text

    with open(folder / "train.bin", "wb") as train, open(folder / "valid.bin", "wb") as valid:
        for ids in coder.encode_many(texts()):
            name = names.popleft()
            counts[name]["tokens"] += len(ids) + 1
            (train if name == "train" else valid).write(ids.tobytes() + end.tobytes())
    for name, count in counts.items():
        if count["bytes"] == 0:
            raise InputError(f"source: {source.spec!r} is too short to split ({name} would be empty); give more text")
    return counts


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
