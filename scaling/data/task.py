"""A task: a source of rows with answers, a verifier and exact facts, instead of text (docs/data.md).

Everything it gives is a pure function of (split, index): no state, nothing stored, the same on every machine.
"""

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from models.errors import InputError, did_you_mean
from scaling.data.draws import stream
from scaling.data.tokenizers import Symbols, Tokenizer
from scaling.fields import fields_of, from_plain, to_plain

UNLIMITED = 2**48  # rows of a task that never ends
VALID_ROWS = 2_048  # that a run validates on where neither task nor configuration says how many
MOST_VALID_ROWS = 2**20
START = 0  # the token before the first of a row; also ends a document, as in a corpus

Rows = dict[str, np.ndarray]


class Example(NamedTuple):
    """One question: `prompt` and `answer` are token ids, the prompt with START before it."""

    prompt: np.ndarray
    answer: np.ndarray
    facts: dict[str, float]  #: about this one, such as how many answers are right


class Task:
    """What a file of scaling/data/sources/ gives by `task(spec, rest, cache)`.

    `rows` are what a model is trained and validated on; tokens_BU is int32 [n, T + 1], answer_BT and real_BT are bool
    [n, T] and say of its targets, tokens_BU[:, 1:], which answer and, where rows are padded, which are no padding. A
    task of pairs has chosen_BU, chosen_answer_BT, rejected_BU, rejected_answer_BT and so on instead.
    """

    symbols: tuple[str, ...] = ()  #: a name for each token; empty where the task is text
    n_train: int | None = None  #: rows; None: as many as are asked for
    n_valid: int = MOST_VALID_ROWS
    #: the tokens that may stand at each position of an answer, where all answers may be listed; else None
    choices: tuple[np.ndarray, ...] | None = None

    @property
    def spec(self) -> str:
        """What it is called in a message."""
        return type(self).__name__

    @property
    def version(self) -> str:
        """Changes whenever the rows do, and holds no path of this machine."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        return Symbols(self.symbols)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def prepared(self, spec: str, tokenizer: str, valid_fraction: float, cache: Path) -> "Task":
        """The task in the tokens of a tokenizer. Raises InputError where it has symbols of its own."""
        if tokenizer != "symbols":
            raise InputError(
                f"data.tokenizer = {tokenizer!r}: {spec!r} has {len(self.symbols)} symbols of its own; set "
                f"data.tokenizer to symbols and model.vocab_size to {len(self.symbols)}"
            )
        return self

    def check(self, T: int) -> None:
        """Raises InputError where a row of T predicted tokens cannot hold what the task asks."""

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        """Rows of a split, train or valid, by their numbers."""
        raise NotImplementedError

    def oracle(self, split: str, indices_n: np.ndarray, T: int) -> np.ndarray | None:
        """loss_nT, nats, of each target of `rows` to who knows the task: -log of its true probability given what stands
        before it; NaN where that is not known. None: nowhere.
        """
        return None

    def exact(self) -> dict[str, float]:
        """Exact facts about the task by name: entropies in nats, success rates of guessing."""
        return {}

    def n_rows(self, split: str, T: int) -> int | None:
        """Rows of T predicted tokens; None: the training split does not end."""
        return self.n_train if split == "train" else self.n_valid

    def example(self, split: str, index: int) -> Example:
        raise NotImplementedError

    def right(self, example: Example, answers_SA: np.ndarray) -> np.ndarray:
        """Which of S answers are right, bool [S]."""
        return np.array([self.verify(example.prompt, answer) == 1 for answer in answers_SA], bool)

    def verify(self, prompt: Any, text: Any) -> float:
        """How right an answer is, 1 where it is, 0 where not; prompt and answer as token ids or as text."""
        raise NotImplementedError

    def ids(self, text: Any) -> np.ndarray:
        """Token ids of ids or of text."""
        return np.asarray(self.tokenizer.encode(text) if isinstance(text, str) else text, np.int64)


class Items(NamedTuple):
    """n questions of one length: P tokens of prompt, without START, and A of answer."""

    prompt_nP: np.ndarray
    shown_nA: np.ndarray  #: as it stands in a row, perhaps with noise
    answer_nA: np.ndarray  #: as it is right
    facts: dict[str, np.ndarray]  #: cheap ones, of each
    oracle_nA: np.ndarray | None = None  #: -log of the true probability of each token shown, nats


@dataclass(frozen=True)
class World(Task):
    """A task whose rows are START and then as many questions of one length as fit, each with its answer.

    The fields of the dataclass are its options: `facts:a=0.5,eps=0.1`. One that is added later is marked ADDED, so that
    the version stays while it has its default.
    """

    revision: ClassVar[int] = 1  #: raised when the same options would give other rows

    @property
    def kind(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def spec(self) -> str:
        fields = {name: (getattr(self, name), f.default) for name, (f, _) in fields_of(type(self)).items()}
        changed = [f"{name}={value}" for name, (value, default) in fields.items() if value != default]
        return f"{self.kind}:{','.join(changed)}"

    @property
    def version(self) -> str:
        return f"{self.kind}-{self.revision}-{json.dumps(to_plain(self), sort_keys=True)}"

    @property
    def item_length(self) -> int:
        """Tokens of a question and its answer."""
        raise NotImplementedError

    def items(self, split: str, index_n: np.ndarray) -> Items:
        raise NotImplementedError

    def stream(self, split: str, *parts: str | int) -> int:
        """Of the draws of a split. The same for worlds that differ in other options than the seed: paired."""
        return stream(self.kind, self.seed, split, *parts)

    def check(self, T: int) -> None:
        if self.item_length > T:
            raise InputError(
                f"data.seq_len = {T}: a question of {self.kind} and its answer take {self.item_length} tokens; take "
                "a multiple of that"
            )

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        self.check(T)
        items = self.items(split, item_numbers(indices_n, T // self.item_length))
        return packed(items, len(indices_n), T)

    def oracle(self, split: str, indices_n: np.ndarray, T: int) -> np.ndarray | None:
        items = self.items(split, item_numbers(indices_n, T // self.item_length))
        return None if items.oracle_nA is None else packed_oracle(items, len(indices_n), T)

    def example(self, split: str, index: int) -> Example:
        items = self.items(split, np.array([index], np.int64))
        prompt = np.concatenate([[START], items.prompt_nP[0]])
        return Example(prompt, items.answer_nA[0], {name: float(x[0]) for name, x in items.facts.items()})


def item_numbers(indices_n: np.ndarray, m: int) -> np.ndarray:
    """The numbers of the m items of each row, row after row; uint64 [n * m]."""
    return (np.asarray(indices_n).astype(np.uint64)[:, None] * np.uint64(m) + np.arange(m, dtype=np.uint64)).ravel()


def packed(items: Items, n: int, T: int) -> Rows:
    """n rows of as many items each."""
    tokens = np.concatenate([items.prompt_nP, items.shown_nA], axis=1)
    return pack(tokens.reshape(n, -1, tokens.shape[1]), items.prompt_nP.shape[1], T)


def packed_oracle(items: Items, n: int, T: int) -> np.ndarray:
    """What the targets of n rows cost who knows, [n, T]: NaN but where they answer."""
    unknown = np.full(items.prompt_nP.shape, np.nan)
    oracle_nT = np.concatenate([unknown, items.oracle_nA], axis=1).reshape(n, -1)
    return np.pad(oracle_nT, ((0, 0), (0, T - oracle_nT.shape[1])), constant_values=np.nan)


def pack(items_nmL: np.ndarray, P: int, T: int) -> Rows:
    """Rows of m items each, of which the first P tokens ask and the others answer, padded to T + 1 tokens."""
    n, m, L = items_nmL.shape
    tokens_BU = np.full((n, T + 1), START, np.int32)
    tokens_BU[:, 1 : 1 + m * L] = items_nmL.reshape(n, m * L)
    answer_T = np.zeros(T, bool)
    answer_T[: m * L].reshape(m, L)[:, P:] = True
    rows = {"tokens_BU": tokens_BU, "answer_BT": np.broadcast_to(answer_T, (n, T))}
    if m * L < T:
        rows["real_BT"] = np.broadcast_to(np.arange(T) < m * L, (n, T))
    return rows


def world(kind: type, spec: str, rest: str) -> Any:
    """The world that options such as `a=0.5,eps=0.1` describe. Raises InputError for a misspelt or wrong one."""
    known, values = fields_of(kind), {}
    for part in filter(None, rest.split(",")):
        name, sign, text = part.partition("=")
        if not sign and name in known:
            raise InputError(f"source: {spec!r}: {name} has no value; write {name}={known[name][0].default}")
        if name not in known:
            guess = did_you_mean(name, known)
            raise InputError(f"source: {spec!r} has an unknown option {part!r}{guess} (known: {', '.join(known)})")
        if name in values:
            raise InputError(f"source: {spec!r} gives {name} twice")
        values[name] = option(known[name][1], text, f"source: {spec!r}: {name}")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"source: {spec!r}: {error}") from None


def option(kind: Any, text: str, path: str) -> Any:
    if kind is str:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if kind is bool and value in (0, 1):
        value = bool(value)
    return from_plain(kind, value, path)


def expect(name: str, value: Any, within: bool, expected: str) -> None:
    """Raises InputError for an option that is out of range."""
    if not within:
        raise InputError(f"{name} = {value!r}: expected {expected}")


@dataclass(frozen=True, eq=False)
class TaskStore:
    """A task as the engine sees it, beside `scaling.data.store.TokenStore`: window i of T tokens is row i."""

    source: str
    task: Task
    key: str = field(init=False)

    def __post_init__(self) -> None:
        identity = ["task", 1, self.task.version]
        object.__setattr__(self, "key", hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20])

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskStore) and other.key == self.key

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.task.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    def n_train_windows(self, seq_len: int) -> int:
        self.task.check(seq_len)
        n = self.task.n_rows("train", seq_len)
        return UNLIMITED if n is None else n

    def n_valid_windows(self, seq_len: int) -> int:
        self.task.check(seq_len)
        return self.task.n_rows("valid", seq_len)

    def endless(self, seq_len: int) -> bool:
        """Whether its rows do not end: then validation takes the first ones, as many as are asked for."""
        return self.task.n_rows("train", seq_len) is None

    def rows(self, split: str, indices_n: np.ndarray, seq_len: int) -> Rows:
        return self.task.rows(split, np.asarray(indices_n, np.int64), seq_len)

    def bits_per_byte(self, loss: float) -> None:
        """Its tokens stand for no bytes."""
        return None
