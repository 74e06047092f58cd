"""Text from a trained model: sampling by a seed, and greedy decoding, of many prompts side by side.

The steps run compiled, CHUNK of them a call. Each sequence draws with a key of its own, of (seed, prompt, sample), and
the number of the token, so that the same seed gives the same tokens whatever else is in the batch: as far as the logits
agree, for the float32 sums of two batches of other sizes may differ in the last bit.

Letters: N prompts, n samples of each, B sequences, V vocabulary, P longest prompt, C steps of a call, X stop sequences
of up to W tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import decode
from models.config import ModelConfig
from models.errors import InputError
from models.implementation import Implementation
from models.transformer import Cache
from scaling.draw import Knobs, choose
from scaling.engine.runtime import cores
from scaling.shapes import bucket

CHUNK = 32  # steps of a call
BATCH = 256  # sequences side by side
LANE = 32  # of them at a time on a core: the caches of more no longer lie near it
GROWS = 32  # from so many sequences on, a cache gets its slots as they are wanted: reading it takes most of the time
HOW = Implementation(attention="blocked")
COLDEST, HOTTEST = 1e-6, 1e6  # temperatures: logits divided by one far outside are no float32 numbers, or all equal
ANY, NONE = -1, -2  # in a row of stop sequences: whatever stands there; what no token is

Params = Any


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises InputError, naming the field, for what cannot be drawn from.

    First the temperature, then the k most probable, then of those the fewest that hold a share p (1904.09751).
    """

    temperature: float = 1.0  #: logits are divided by it
    top_k: int = 0  #: draw from the k most probable, and those that equal the last of them; 0: from all
    top_p: float = 1.0  #: draw from the fewest that have this probability together, and those that equal the last
    greedy: bool = False  #: take the most probable; the others stay at their defaults

    def __post_init__(self) -> None:
        if not COLDEST <= self.temperature <= HOTTEST:
            raise InputError(
                f"temperature = {self.temperature!r}: expected a number from {COLDEST:g} to {HOTTEST:g}; for the most "
                "probable token at each step choose greedy"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k = {self.top_k!r}: expected a whole number of at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p!r}: expected a number above 0 and at most 1")
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise InputError("greedy: takes the most probable token; leave temperature, top_k and top_p out")

    @property
    def mode(self) -> str:
        """Which program chooses: greedy, whole, or cut, which looks for where to cut."""
        return "greedy" if self.greedy else "whole" if self.top_k == 0 and self.top_p == 1 else "cut"

    def knobs(self, vocab_size: int) -> Knobs:
        return Knobs(np.float32(self.temperature), np.int32(self.top_k or vocab_size), np.float32(self.top_p))


@dataclass(frozen=True, eq=False)
class Samples:
    """What was written after N prompts, n times each. Arrays of tokens are [N, n, T], zero after a sequence's end."""

    tokens: np.ndarray  #: int32
    logprobs: np.ndarray  #: of each token by the model itself (temperature 1, nothing cut off), nats
    drawn_logprobs: np.ndarray  #: of each token by what it was drawn from; greedy: 0
    lengths: np.ndarray  #: [N, n]: tokens written, the stop sequence with them
    kept: np.ndarray  #: [N, n]: those before the stop sequence
    stopped: np.ndarray  #: [N, n], bool: it came to a stop sequence, not to `max_tokens` or the end of the window
    texts: list[list[str]] = field(default_factory=list)  #: of the tokens kept, where a tokenizer was there

    def ids(self, prompt: int = 0, sample: int = 0) -> np.ndarray:
        """The tokens kept."""
        return self.tokens[prompt, sample, : self.kept[prompt, sample]]

    def first(self, n: int) -> "Samples":
        """The first n of each prompt."""
        arrays = ("tokens", "logprobs", "drawn_logprobs", "lengths", "kept", "stopped")
        return Samples(*(getattr(self, name)[:, :n] for name in arrays), [texts[:n] for texts in self.texts])


def sample(
    model: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    n: int = 1,
    max_tokens: int = 64,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    stop: Sequence[Sequence[int]] = (),
    window: int | None = None,
    batch: int = BATCH,
) -> Samples:
    """n continuations of each prompt (token ids, at least one) up to a stop sequence, `max_tokens`, or the end of the
    window: a model that was trained on inputs of `window` tokens is given no longer ones. None: there is no window.

    Raises InputError where a prompt is empty, longer than the window, or holds what is no token of the vocabulary.
    """
    prompts = [checked_prompt(i, prompt, model.vocab_size, window) for i, prompt in enumerate(prompts)]
    check_counts(n=n, max_tokens=max_tokens, batch=batch)
    check_seed(seed)
    N, T = len(prompts), max_tokens
    tokens, logprobs, drawn = (np.zeros((N, n, T), kind) for kind in (np.int32, np.float32, np.float32))
    lengths, stopped = np.zeros((N, n), int), np.zeros((N, n), bool)
    stop_XW = stop_rows(stop, model.vocab_size)
    by_length = sorted(range(N), key=lambda i: len(prompts[i]))  # little padding
    pairs = np.array([(i, j) for i in by_length for j in range(n)], np.int64).reshape(-1, 2)
    together, lanes = side_by_side(len(pairs), batch)

    def write(part: np.ndarray) -> None:
        at = (part[:, 0], part[:, 1])
        for new in stream(model, params, prompts, part, max_tokens, seed, sampling, stop_XW, window):
            rows = (*at, slice(new.first, new.first + len(new.tokens_CB)))
            tokens[rows], logprobs[rows], drawn[rows] = new.tokens_CB.T, new.logprobs_CB.T, new.drawn_CB.T
            lengths[at], stopped[at] = new.written_B, new.stopped_B

    with ThreadPoolExecutor(lanes) as threads:
        list(threads.map(write, (pairs[start : start + together] for start in range(0, len(pairs), together))))
    return Samples(tokens, logprobs, drawn, lengths, lengths - stop_lengths(tokens, lengths, stopped, stop_XW), stopped)


def side_by_side(sequences: int, batch: int) -> tuple[int, int]:
    """(sequences of a batch, batches at a time). On a CPU a core takes a batch of its own, as in a step's small
    products several cores mostly wait for each other.
    """
    if sequences < GROWS:
        return min(sequences, batch) or 1, 1
    if jax.default_backend() != "cpu":
        return min(batch, bucket(sequences)), 1
    lanes = len(cores())
    return min(batch, LANE, bucket(-(-sequences // lanes))), lanes


class Written(NamedTuple):
    """What a call of the compiled steps wrote, [C, B], zero after a sequence's end; and how its sequences stand."""

    first: int  #: tokens written before it
    tokens_CB: np.ndarray
    logprobs_CB: np.ndarray
    drawn_CB: np.ndarray
    written_B: np.ndarray
    stopped_B: np.ndarray


def stream(
    model: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    pairs_B2: np.ndarray,
    max_tokens: int,
    seed: int,
    sampling: Sampling,
    stop_XW: np.ndarray,
    window: int | None,
    steps: int = CHUNK,
    least: int = 0,
) -> Iterator[Written]:
    """The tokens of the sequences (prompt, sample), side by side, up to `steps` <= CHUNK at a time.

    `least`: slots of the cache, for one program to serve all lengths up to it.
    """
    B = len(pairs_B2)
    rows = bucket(B)
    pairs_B2 = np.pad(pairs_B2, ((0, rows - B), (0, 0)), mode="edge")
    which, index_B = np.unique(pairs_B2[:, 0], return_inverse=True)
    tokens_BP, length_B = right_padded([prompts[i] for i in which])
    P = tokens_BP.shape[1]
    room_B = np.full(rows, max_tokens) if window is None else np.minimum(max_tokens, window + 1 - length_B[index_B])
    room_B[B:] = 0
    most = int(room_B.max())
    slots = max(least, slots_for(rows, P, 0, most))
    logits_BV, cache = begin(model, slots, params, tokens_BP, length_B)
    if len(tokens_BP) > 1 or rows > 1:
        logits_BV, cache = fork(logits_BV, cache, index_B.astype(np.int32))
    tail_BW = np.full((rows, stop_XW.shape[1]), NONE, np.int32)
    state = State(cache, logits_BV, tail_BW, np.zeros(rows, np.int32), np.zeros(rows, bool))
    fixed = Fixed(keys(np.uint32(seed), pairs_B2.astype(np.uint32)), room_B.astype(np.int32), stop_XW)
    knobs = sampling.knobs(model.vocab_size)
    first = 0
    while first < most:
        count = min(steps, most - first)
        if slots_for(rows, P, first, most) > slots:
            slots = slots_for(rows, P, first, most)
            state = state._replace(cache=grow(slots, state.cache))
        state, new = advance(model, sampling.mode, params, state, fixed, knobs, np.int32(first), np.int32(count))
        tokens_CB, logprobs_CB, drawn_CB, written_B, stopped_B = jax.device_get(
            (*new, state.written_B, state.stopped_B)
        )
        columns = (x_CB[:count, :B] for x_CB in (tokens_CB, logprobs_CB, drawn_CB))
        yield Written(first, *columns, written_B[:B], stopped_B[:B])
        first += count
        if (stopped_B | (written_B >= room_B)).all():
            break


def slots_for(rows: int, P: int, written: int, most: int) -> int:
    """Slots of a cache that is to take the tokens of the next call, or of all calls where reading it costs little."""
    return bucket(P + (min(written + CHUNK, most) if rows >= GROWS else most), 16)


def right_padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BP, length_B), B and P of sizes that repeat; a row that no prompt is in has one token."""
    B, P = bucket(len(prompts)), bucket(max(map(len, prompts)), 16)
    tokens_BP, length_B = np.zeros((B, P), np.int32), np.ones(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt)], length_B[row] = prompt, len(prompt)
    return tokens_BP, length_B


class State(NamedTuple):
    """Sequences on their way."""

    cache: Cache
    logits_BV: jax.Array  #: of the next token
    tail_BW: jax.Array  #: the last W tokens written
    written_B: jax.Array
    stopped_B: jax.Array


class Fixed(NamedTuple):
    key_B: jax.Array
    room_B: jax.Array  #: tokens that a sequence may have
    stop_XW: jax.Array  #: see `stop_rows`


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(model: ModelConfig, slots: int, params: Params, tokens_BP: jax.Array, length_B: jax.Array) -> Any:
    return decode.prefill(model, params, tokens_BP, length_B, slots, how=HOW)


@jax.jit
def fork(logits_BV: jax.Array, cache: Cache, index_X: jax.Array) -> tuple[jax.Array, Cache]:
    return logits_BV[index_X], decode.take(cache, index_X)


@functools.partial(jax.jit, static_argnums=0)
def grow(slots: int, cache: Cache) -> Cache:
    return decode.grow(cache, slots)


@jax.jit
def keys(seed: jax.Array, pairs_B2: jax.Array) -> jax.Array:
    """A key for each (prompt, sample)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(pairs_B2)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance(
    model: ModelConfig,
    mode: str,
    params: Params,
    state: State,
    fixed: Fixed,
    knobs: Knobs,
    first: jax.Array,
    count: jax.Array,
) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
    """Up to `count` <= CHUNK steps: the state after them, and tokens, log-probabilities by the model and of the draw,
    each [C, B].
    """
    B = len(state.written_B)

    def uniform(key: jax.Array, t: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, t))

    step_C = first + jnp.arange(CHUNK)
    u_CB = jax.vmap(lambda t: jax.vmap(lambda key: uniform(key, t))(fixed.key_B))(step_C)

    def on(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < count) & ~jnp.all(state.stopped_B | (state.written_B >= fixed.room_B))

    def body(carry: tuple) -> tuple:
        i, state, out = carry
        over_B = state.stopped_B | (state.written_B >= fixed.room_B)
        token_B, *logprobs = choose(mode, state.logits_BV, u_CB[i], knobs)
        token_B = jnp.where(over_B, 0, token_B).astype(jnp.int32)
        logprobs = [jnp.where(over_B, 0.0, x_B) for x_B in logprobs]
        new = zip(out, (token_B, *logprobs), strict=True)
        out = tuple(jax.lax.dynamic_update_index_in_dim(x_CB, x_B, i, 0) for x_CB, x_B in new)
        tail_BW = jnp.concatenate([state.tail_BW[:, 1:], token_B[:, None]], axis=1)
        tail_BW = jnp.where(over_B[:, None], state.tail_BW, tail_BW)
        stopped_B = state.stopped_B | (~over_B & at_stop(tail_BW, fixed.stop_XW))
        logits_BV, cache = decode.step(model, params, token_B, state.cache, how=HOW)
        written_B = state.written_B + ~over_B
        return i + 1, State(cache, logits_BV, tail_BW, written_B, stopped_B), out

    out = (jnp.zeros((CHUNK, B), jnp.int32), jnp.zeros((CHUNK, B)), jnp.zeros((CHUNK, B)))
    _, state, out = jax.lax.while_loop(on, body, (jnp.int32(0), state, out))
    return state, out


def at_stop(tail_BW: jax.Array, stop_XW: jax.Array) -> jax.Array:
    """[B]: whether the last tokens are one of the stop sequences."""
    return jnp.any(jnp.all((tail_BW[:, None] == stop_XW) | (stop_XW == ANY), axis=-1), axis=-1)


def stop_rows(stop: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """stop_XW: the sequences at the right, ANY before them; X and W of sizes that repeat, rows of NONE never match."""
    stop = [np.asarray(ids, np.int64).reshape(-1) for ids in stop]
    for ids in stop:
        if not len(ids) or not (ids.min() >= 0 and ids.max() < vocab_size):
            raise InputError(f"stop = {ids.tolist()}: expected tokens of 0 to {vocab_size - 1}, at least one")
    stop_XW = np.full((bucket(max(1, len(stop))), bucket(max([1, *map(len, stop)]))), NONE, np.int32)
    for row, ids in zip(stop_XW, stop, strict=False):
        row[:] = [ANY] * (len(row) - len(ids)) + ids.tolist()
    return stop_XW


def stop_lengths(tokens: np.ndarray, lengths: np.ndarray, stopped: np.ndarray, stop_XW: np.ndarray) -> np.ndarray:
    """[N, n]: tokens of the longest stop sequence that each ends in, 0 where it came to none."""
    found = np.zeros(lengths.shape, int)
    for row in stop_XW[stop_XW[:, -1] >= 0]:
        ids = row[row >= 0]
        for i, j in np.argwhere(stopped):
            end = lengths[i, j]
            if end >= len(ids) and (tokens[i, j, end - len(ids) : end] == ids).all():
                found[i, j] = max(found[i, j], len(ids))
    return found


def checked_prompt(i: int, prompt: np.ndarray, vocab_size: int, window: int | None) -> np.ndarray:
    """The prompt's ids, int32. Raises InputError, with its number, where it cannot be continued."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size:
        raise InputError(f"prompt {i}: empty; a model continues at least one token")
    if not np.issubdtype(ids.dtype, np.integer) or not (ids.min() >= 0 and ids.max() < vocab_size):
        raise InputError(f"prompt {i}: expected tokens of 0 to {vocab_size - 1}")
    if window is not None and len(ids) > window:
        raise InputError(
            f"prompt {i}: {len(ids)} tokens, longer than the window of {window} that the model was trained on; "
            "shorten it"
        )
    return ids.astype(np.int32)


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value < 2**31:
            raise InputError(f"{name} = {value!r}: expected a whole number of at least 1")


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed!r}: expected a whole number from 0 to 2^32 - 1")
