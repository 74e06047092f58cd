"""Questions and answers from a file: `jsonl:FILE[?template=FILE&tokenizer=CORPUS]`.

A line is {"prompt": ..., "answer": ...}, or {"prompt": ..., "chosen": ..., "rejected": ...} for the objectives on
pairs. What a model reads is the template, plain text with {prompt} and {answer} in it, up to the answer; what it writes
is the rest and the end of a document. A row is one line, padded. `tokenizer` names the corpus whose byte pairs these
are, that of the base which is finetuned; else they are trained on the lines.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError, did_you_mean
from scaling.data.cache import locked
from scaling.data.sources import options_of
from scaling.data.sources.text import open_bytes, reading
from scaling.data.task import START, Example, Rows, Task
from scaling.data.tokenizers import BPE, END_OF_DOCUMENT, Bytes, Tokenizer, clean, train_bpe

USAGE = "jsonl:FILE"
TEMPLATE = "Q: {prompt}\nA: {answer}\n"
KINDS = (("answer",), ("chosen", "rejected"))  # what a line has besides its prompt


class Line(NamedTuple):
    number: int
    prompt: str
    answers: tuple[str, ...]  #: the answer; or what was chosen, and what rejected


@dataclass(frozen=True, eq=False)
class Lines(Task):
    """A file that was read and checked, not yet in tokens."""

    of: str  #: the spec
    name: str  #: of the file
    lines: tuple[Line, ...]
    template: tuple[str, str, str]  #: before, between and after
    digest: str
    corpus: str  #: whose byte pairs they are read in; empty: their own

    @property
    def spec(self) -> str:
        return self.of

    @property
    def version(self) -> str:
        return f"jsonl-1-{self.digest}"

    def prepared(self, spec: str, tokenizer: str, valid_fraction: float, cache: Path) -> "Questions":
        if tokenizer == "symbols":
            raise InputError(f"data.tokenizer = 'symbols': {spec!r} is text; take bytes or bpe:VOCAB")
        parts = [self.version, tokenizer, float(valid_fraction)]
        train, valid = self.split(valid_fraction)
        if tokenizer == "bytes":
            coder: Tokenizer = Bytes()
        elif self.corpus:
            from scaling.data.store import open_store

            coder = open_store(self.corpus, tokenizer, cache, valid_fraction).tokenizer
            parts.append(coder.identity)  # its text may change, or lie elsewhere
        else:
            coder = self.byte_pairs(tokenizer, train, cache, json.dumps(parts))
        version = json.dumps(parts)
        encode = functools.partial(encoded, coder, self.template)
        return Questions(spec, self.name, version, coder, self.template, encode(train), encode(valid))

    def split(self, valid_fraction: float) -> tuple[list[Line], list[Line]]:
        """(train, valid): lines validate in the order of the sha256 of their prompts, lines of one prompt together."""
        wanted = max(1, round(valid_fraction * len(self.lines)))
        digest_of = {line: hashlib.sha256(line.prompt.encode()).digest() for line in self.lines}
        valid: set[bytes] = set()
        for held, line in enumerate(sorted(self.lines, key=digest_of.get)):
            if held >= wanted and digest_of[line] not in valid:
                break
            valid.add(digest_of[line])
        train = [line for line in self.lines if digest_of[line] not in valid]
        if not train:
            raise InputError(f"source: {self.of!r} has too few prompts to train on some and validate on others")
        return train, [line for line in self.lines if digest_of[line] in valid]

    def byte_pairs(self, tokenizer: str, train: list[Line], cache: Path, version: str) -> BPE:
        """Trained once on the lines that are trained on, and kept."""
        key = hashlib.sha256(version.encode()).hexdigest()[:20]
        path = cache / "stores" / f"jsonl-{key}.json"
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                before, between, after = self.template
                texts = [before + line.prompt + between + answer + after for line in train for answer in line.answers]
                partial = path.with_suffix(".partial")
                train_bpe(tokenizer, texts, partial)
                partial.rename(path)
        return BPE(path, int(tokenizer.removeprefix("bpe:")))


class Encoded(NamedTuple):
    """Lines as tokens one after another: START, P tokens of the prompt, and the answer, for each kind of answer."""

    number_n: np.ndarray
    tokens: tuple[np.ndarray, ...]
    begin_n: tuple[np.ndarray, ...]  #: where each line begins
    prompt_n: np.ndarray  #: P
    length_n: tuple[np.ndarray, ...]  #: tokens of each line, with START


@dataclass(frozen=True, eq=False)
class Questions(Task):
    """The lines of a file in the tokens of a tokenizer."""

    of: str
    name: str
    identity: str
    coder: Tokenizer
    template: tuple[str, str, str]
    train: Encoded
    valid: Encoded

    @property
    def spec(self) -> str:
        return self.of

    @property
    def version(self) -> str:
        return self.identity

    @property
    def tokenizer(self) -> Tokenizer:
        return self.coder

    @property
    def n_train(self) -> int:
        return len(self.train.number_n)

    @property
    def n_valid(self) -> int:
        return len(self.valid.number_n)

    def check(self, T: int) -> None:
        for part in (self.train, self.valid):
            longest_n = np.max(part.length_n, axis=0)
            if longest_n.max() > T + 1:
                i = int(longest_n.argmax())
                P = int(part.prompt_n[i])
                raise InputError(
                    f"data.seq_len = {T}: line {part.number_n[i]} of {self.name} takes {longest_n[i] - 1} tokens, its "
                    f"prompt {P} and its answer {longest_n[i] - 1 - P}; take a seq_len of at least that, or shorten it"
                )

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        part, place_U = getattr(self, split), np.arange(T + 1)
        kinds = [("tokens", "")] if len(part.tokens) == 1 else [("chosen", "chosen_"), ("rejected", "rejected_")]
        rows = {}
        for i, (name, of) in enumerate(kinds):
            length_n1 = part.length_n[i][indices_n, None]
            at_nU = np.minimum(part.begin_n[i][indices_n, None] + place_U, len(part.tokens[i]) - 1)
            tokens = np.where(place_U < length_n1, part.tokens[i][at_nU], END_OF_DOCUMENT)
            real = place_U[1:] < length_n1
            rows[f"{name}_BU"] = tokens.astype(np.int32)
            rows[f"{of}answer_BT"] = real & (place_U[1:] > part.prompt_n[indices_n, None])
            rows[f"{of}real_BT"] = real
        return rows

    def example(self, split: str, index: int) -> Example:
        part = getattr(self, split)
        begin, end = part.begin_n[0][index], part.begin_n[0][index] + part.length_n[0][index]
        answer = begin + 1 + part.prompt_n[index]
        facts = {"line": float(part.number_n[index])}
        return Example(part.tokens[0][begin:answer], part.tokens[0][answer:end], facts)

    def prompt(self, text: str) -> np.ndarray:
        """What a model reads of a question that someone asks, token ids with START before them."""
        before, between, _ = self.template
        return np.concatenate([[START], self.coder.encode(before + clean(text) + between).astype(np.int64)])

    @functools.cached_property
    def answers(self) -> dict[bytes, set[str]]:
        """The answers to each prompt, by its tokens."""
        known: dict[bytes, set[str]] = {}
        for split, n in (("train", self.n_train), ("valid", self.n_valid)):
            for index in range(n):
                question = self.example(split, index)
                known.setdefault(question.prompt.astype(np.int64).tobytes(), set()).add(self.text_of(question.answer))
        return known

    def text_of(self, answer: Any) -> str:
        ids = self.ids(answer)
        ends = np.flatnonzero(ids == END_OF_DOCUMENT)
        return self.coder.decode(ids[: ends[0]] if ends.size else ids).strip()

    def verify(self, prompt: Any, text: Any) -> float:
        """1 where it is the file's answer to that prompt, but for blanks around it and what follows its end."""
        if len(self.train.tokens) > 1:
            raise InputError(f"source: {self.of!r} has pairs, of which none is right or wrong")
        asked = self.ids(prompt)
        if not len(asked) or asked[0] != START:
            asked = np.concatenate([[START], asked])
        if asked.tobytes() not in self.answers:
            raise InputError(f"source: {self.of!r} has no such prompt, so no answer to it can be checked")
        return float(self.text_of(text) in self.answers[asked.tobytes()])


def encoded(coder: Tokenizer, template: tuple[str, str, str], lines: list[Line]) -> Encoded:
    before, between, after = template
    prompts = [np.asarray(ids, np.int64) for ids in coder.encode_many(before + line.prompt + between for line in lines)]
    tokens, begins, lengths = [], [], []
    for i in range(len(lines[0].answers)):
        parts = []
        for prompt, answer in zip(prompts, coder.encode_many(line.answers[i] + after for line in lines), strict=True):
            parts.append(np.concatenate([[START], prompt, answer, [END_OF_DOCUMENT]]).astype(np.int64))
        length_n = np.array([len(part) for part in parts])
        tokens.append(np.concatenate(parts))
        lengths.append(length_n)
        begins.append(np.cumsum(length_n) - length_n)
    prompt_n, number_n = np.array([len(p) for p in prompts]), np.array([line.number for line in lines])
    return Encoded(number_n, tuple(tokens), tuple(begins), prompt_n, tuple(lengths))


def task(spec: str, rest: str, cache: Path) -> Lines:
    name, options = options_of(spec, rest, ("template", "tokenizer"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"source: {spec!r}: {name!r} is no file; check the path")
    template = template_of(spec, options.get("template"))
    with reading(path), open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256(json.dumps([content, template]).encode()).hexdigest()
    return Lines(spec, path.name, read_lines(str(path)), template, digest, options.get("tokenizer", ""))


def template_of(spec: str, name: str | None) -> tuple[str, str, str]:
    """The text before the prompt, between prompt and answer, and after it."""
    text = TEMPLATE
    if name is not None:
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"source: {spec!r}: template {name!r} is no file; check the path")
        with reading(path):
            text = path.read_text("utf-8-sig")
    before, prompt, rest = text.partition("{prompt}")
    between, answer, after = rest.partition("{answer}")
    if not prompt or not answer or any("{prompt}" in part or "{answer}" in part for part in (between, after)):
        raise InputError(
            f"source: {spec!r}: a template has {{prompt}} once and then {{answer}} once, and text around them"
        )
    return clean(before), clean(between), clean(after)


@functools.lru_cache(maxsize=4)
def read_lines_of(name: str, changed: int, size: int) -> tuple[Line, ...]:
    """The lines of a file as it was when it was `changed` (nanoseconds) to a size."""
    path, lines = Path(name), []
    with reading(path), open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                lines.append(line_of(path.name, number, line))
    if not lines:
        raise InputError(f"source: {path.name} holds no lines of questions and answers")
    for line in lines:
        if len(line.answers) != len(lines[0].answers):
            raise InputError(
                f"source: {path.name}, line {line.number} has other fields than line {lines[0].number}; put pairs and "
                "single answers into two files"
            )
    return tuple(lines)


def read_lines(name: str) -> tuple[Line, ...]:
    status = Path(name).stat()
    return read_lines_of(name, status.st_mtime_ns, status.st_size)


def line_of(name: str, number: int, line: bytes) -> Line:
    where = f"source: {name}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object")
    fields = next((fields for fields in KINDS if set(fields) <= set(row)), None)
    if fields is None or "prompt" not in row:
        known = ("prompt", "answer", "chosen", "rejected")
        wrong = next((field for field in row if field not in known), "")
        raise InputError(
            f"{where} needs the fields prompt and answer, or prompt, chosen and rejected"
            f"{did_you_mean(wrong, known) if wrong else ''}"
        )
    for field in ("prompt", *fields):
        text = row[field]
        if not isinstance(text, str):
            raise InputError(f"{where}, field {field!r} holds {type(text).__name__}, not text")
        if clean(text) != text:
            raise InputError(
                f"{where}, field {field!r} holds a NUL or half a character, which no tokenizer holds; remove it"
            )
        if field != "prompt" and not text.strip():
            raise InputError(
                f"{where}, field {field!r} is empty, so nothing is to be learned from it; leave the line out"
            )
    return Line(number, row["prompt"], tuple(row[field] for field in fields))
