"""What a conversation with a trained model is made of: a question in a template, the pieces of an answer as they are
written, and what the model thought might come next. Each question stands alone: a window holds few words.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.errors import InputError
from scaling.data.sources import is_task, open_source
from scaling.data.sources.jsonl import TEMPLATE
from scaling.data.tokenizers import END_OF_DOCUMENT, Bytes, Symbols, Tokenizer
from scaling.generate import CHUNK, Sampling, check_counts, check_seed, checked_prompt, stop_lengths, stop_rows, stream
from scaling.load import Trained
from scaling.shapes import bucket

STEPS = 4  # tokens of a call: fewer would arrive no sooner to the eye, and each call costs
LIKELY = 20  # most probable tokens that are shown
PLAIN = "{prompt}"


@dataclass(frozen=True)
class Question:
    """What is asked, and how the answer is to be written. Raises InputError for what cannot be drawn from."""

    prompt: str
    template: str = PLAIN  #: what the model continues, {prompt} in it
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.template.count(PLAIN) != 1:
            raise InputError(f"template = {self.template[:40]!r}: expected text with {PLAIN} in it once")
        check_counts(max_tokens=self.max_tokens)
        check_seed(self.seed)
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.greedy)

    @property
    def text(self) -> str:
        return self.template.replace(PLAIN, self.prompt)


class Piece(NamedTuple):
    """The least that can be shown: a token, or several that make a character together."""

    text: str
    ids: tuple[int, ...]
    logprob: float  #: by the model, of all of them, nats


class End(NamedTuple):
    """stop (a stop sequence, or the end of a document), length (as many tokens as were asked for), or window."""

    reason: str


def template_of(model: Trained) -> str:
    """What the model was trained to continue: the template of its questions up to the answer, or plain text."""
    return template_of_source(model.config.data.source, model.config.data.tokenizer)


@functools.lru_cache(maxsize=64)  # its file may be long, and is asked for with each question
def template_of_source(source: str, tokenizer: str) -> str:
    if not is_task(source) or tokenizer == "symbols":
        return PLAIN
    try:
        template = open_source(source).template  # before the prompt, between it and the answer, after
    except (InputError, AttributeError):  # its file is gone, or it has no template
        return TEMPLATE.partition("{answer}")[0]
    return f"{template[0]}{PLAIN}{template[1]}"


def prompt_of(model: Trained, question: Question) -> np.ndarray:
    """The tokens to continue. Raises InputError where the model cannot."""
    return checked_prompt(0, model.encode(question.text), model.config.model.vocab_size, model.window)


def write(
    model: Trained, prompt: np.ndarray, question: Question, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Piece | End]:
    """The answer in pieces as it is written, then why it ended; earlier where `stopped()` comes true."""
    stop_XW = stop_rows([[END_OF_DOCUMENT]], model.config.model.vocab_size)
    written = stream(
        model.config.model,
        model.params,
        [prompt],
        np.zeros((1, 2), np.int64),
        question.max_tokens,
        question.seed,
        question.sampling,
        stop_XW,
        model.window,
        steps=min(STEPS, CHUNK),
        least=bucket(model.window + CHUNK, 16),
    )
    ids: list[int] = []
    held: list[tuple[int, float]] = []
    for new in written:
        total, ended = int(new.written_B[0]), bool(new.stopped_B[0])
        fresh = range(total - len(ids))
        held += [(int(new.tokens_CB[i, 0]), float(new.logprobs_CB[i, 0])) for i in fresh]
        ids += [int(new.tokens_CB[i, 0]) for i in fresh]
        if ended:
            row = np.array([[ids]])
            del held[len(held) - int(stop_lengths(row, np.array([[total]]), np.array([[True]]), stop_XW)[0, 0]) :]
        pieces, held = split(model.tokenizer, held, last=ended)
        yield from pieces
        if ended:
            yield End("stop")
            return
        if stopped():
            return
    yield from split(model.tokenizer, held, last=True)[0]
    yield End("length" if len(ids) >= question.max_tokens else "window")


def split(
    tokenizer: Tokenizer, tokens: list[tuple[int, float]], last: bool
) -> tuple[list[Piece], list[tuple[int, float]]]:
    """(pieces, what is left): tokens that end within a character wait for the next, up to four of them."""
    pieces, at = [], 0
    for end in range(1, len(tokens) + 1):
        part = tokens[at:end]
        text = tokenizer.decode([token for token, _ in part])
        if text.endswith("�") and len(part) < 4 and not (last and end == len(tokens)):
            continue
        space = " " if isinstance(tokenizer, Symbols) else ""
        pieces.append(Piece(space + text, tuple(token for token, _ in part), sum(logprob for _, logprob in part)))
        at = end
    return pieces, tokens[at:]


def likely(model: Trained, ids: np.ndarray) -> list[dict[str, int | float | str]]:
    """The LIKELY most probable tokens after these, at temperature 1: id, name and probability, the best first."""
    ids = checked_prompt(0, np.asarray(ids), model.config.model.vocab_size, model.window)
    logits_V = model.logits(ids[None])[0, -1].astype(np.float64)
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    best = np.argsort(-p_V, kind="stable")[:LIKELY]
    return [{"id": int(i), "name": name(model.tokenizer, int(i)), "p": float(p_V[i])} for i in best]


def name(tokenizer: Tokenizer, token: int) -> str:
    """A token as a reader can tell it from others."""
    if isinstance(tokenizer, Symbols):
        return tokenizer.decode([token])
    if token == END_OF_DOCUMENT:
        return "end of text"
    text = tokenizer.decode([token])
    if "�" in text:
        return f"byte {token:02x}" if isinstance(tokenizer, Bytes) else f"token {token}"
    return repr(text) if text.strip() != text or not text.isprintable() else text
