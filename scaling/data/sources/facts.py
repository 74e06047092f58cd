"""World F: keys of three symbols with values of two, at frequencies of a power law, with noise of known entropy.

`facts:a=0.5,eps=0.1`. The key of rank r is drawn with p_r ~ r^-(1 + a); each symbol of its value is replaced by a
uniform one with probability eps. What is learned of it is a table, so the loss falls as its tail is filled in, and ends
at an entropy that is known exactly (Hutter 2021, 2102.04074; Michaud et al. 2023, 2303.13506).
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.data.draws import below, bits, choose, entropy, stream, thresholds, unit, zipf
from scaling.data.order import window_indices
from scaling.data.task import Example, Items, World, expect, world

USAGE = "facts[:OPTIONS]"
CONTROLS = (".", "Q", "?", "A", "F", "R", "I", ":", *(f"r{i}" for i in range(8)))
CONTENT = tuple("abcdefghijklmnopqrstuvwxyz012345")
SYMBOLS = CONTROLS + CONTENT
FIRST, V = len(CONTROLS), len(CONTENT)  # the id of the first content symbol, and how many there are
BITS = V.bit_length() - 1  # of a content symbol: V is a power of two
ASK, MARK = SYMBOLS.index("Q"), SYMBOLS.index("?")


@dataclass(frozen=True)
class Facts(World):
    seed: int = 0  #: of the world and of its draws
    a: float = 0.5  #: exponent of the tail of frequencies; 0 asks evenly over log rank, -1 for all keys equally often
    eps: float = 0.1  #: probability that a symbol of a value is replaced by a uniform one
    form: str = "plain"  #: plain: k1 k2 k3 v1 v2; qa: Q k1 k2 k3 ? v1 v2
    uniform: int = 0  #: ask only for so many keys, equally often; 0: all 32,768 by rank
    redraw: bool = False  #: values drawn anew at every occurrence, so that there is nothing to learn
    of: int = -1  #: seed of another world whose ranks of keys it has, and of whose values a share; -1: none
    shared: float = 0.0  #: that share of the keys
    permuted: int = 0  #: the content symbols are permuted, by this seed; 0: not

    symbols = SYMBOLS
    key_symbols = 3
    value_symbols = 2

    def __post_init__(self) -> None:
        expect("a", self.a, -1 <= self.a <= 10, "a number of -1 to 10")
        for name in ("eps", "shared"):
            value = getattr(self, name)
            expect(name, value, 0 <= value <= 1, "a number of 0 to 1")
        expect("form", self.form, self.form in ("plain", "qa"), "plain or qa")
        expect("uniform", self.uniform, 0 <= self.uniform <= self.n_keys, f"a whole number of 0 to {self.n_keys}")
        for name, least in {"seed": 0, "permuted": 0, "of": -1}.items():
            value = getattr(self, name)
            expect(name, value, least <= value < 2**32, f"a whole number of {least} to 2^32 - 1")
        expect("shared", self.shared, self.of >= 0 or self.shared == 0, "0, or with `of` the seed of the other world")

    @property
    def n_keys(self) -> int:
        return V**self.key_symbols

    @property
    def item_length(self) -> int:
        return self.key_symbols + self.value_symbols + 2 * (self.form == "qa")

    @functools.cached_property
    def weights_R(self) -> np.ndarray:
        """Of the ranks."""
        return np.ones(self.uniform, np.int64) if self.uniform else zipf(self.n_keys, self.a)

    @functools.cached_property
    def thresholds_R(self) -> np.ndarray:
        return thresholds(self.weights_R)

    @functools.cached_property
    def key_R(self) -> np.ndarray:
        """The key of each rank, as a number of n_keys."""
        of = self.seed if self.of < 0 else self.of
        return window_indices(self.n_keys, of, 0, len(self.weights_R))

    @functools.cached_property
    def value_KA(self) -> np.ndarray:
        """The value of each key, as numbers of content symbols."""
        key_K = np.arange(self.n_keys)

        def values(seed: int) -> np.ndarray:
            return below(bits(stream("facts", seed, "values"), key_K, self.value_symbols), V)

        if self.of < 0:
            return values(self.seed)
        kept_K = unit(bits(stream("facts", self.seed, "shared"), key_K, 1)) < self.shared
        return np.where(kept_K, values(self.of), values(self.seed))

    @functools.cached_property
    def token_V(self) -> np.ndarray:
        """The token of each content symbol."""
        order_V = window_indices(V, self.permuted, 0, V) if self.permuted else np.arange(V)
        return FIRST + order_V

    @property
    def choices(self) -> tuple[np.ndarray, ...]:
        return (np.sort(self.token_V),) * self.value_symbols

    def right(self, example: Example, answers_SA: np.ndarray) -> np.ndarray:
        return (answers_SA == example.answer).all(axis=1) & (not self.redraw)

    def items(self, split: str, index_n: np.ndarray) -> Items:
        A = self.value_symbols
        drawn = bits(self.stream(split), index_n, 1 + 2 * A)
        rank_n = choose(self.thresholds_R, drawn[:, 0])
        key_n = self.key_R[rank_n]
        answer_nA = self.value_KA[key_n]
        noise_nA = (unit(drawn[:, 1 : 1 + A]) < self.eps) | self.redraw
        shown_nA = np.where(noise_nA, below(drawn[:, 1 + A :], V), answer_nA)
        token = self.token_V
        key_nP = token[digits(key_n, self.key_symbols)]
        if self.form == "qa":
            fixed = np.ones((len(key_n), 1), np.int64)
            key_nP = np.concatenate([ASK * fixed, key_nP, MARK * fixed], axis=1)
        oracle_nA = noise_nats(1.0 if self.redraw else self.eps, shown_nA == answer_nA)
        return Items(key_nP, token[shown_nA], token[answer_nA], {"rank": rank_n + 1}, oracle_nA)

    def exact(self) -> dict[str, float]:
        """`value_token` is -(1 - eps + eps/V) ln(1 - eps + eps/V) - (V - 1)(eps/V) ln(eps/V), V = 32, of each symbol of
        a value; `key` is of a whole key, `all_tokens` the mean over all tokens of an item.
        """
        eps = 1.0 if self.redraw else self.eps
        value, key, A = noise_entropy(eps), entropy(self.weights_R), self.value_symbols
        right = 1 - eps + eps / V
        return {
            "value_token": value,
            "key": key,
            "all_tokens": (key + A * value) / self.item_length,
            "best_accuracy": right**A,
            "guess_accuracy": float(V) ** -A,
            "keys": float(len(self.weights_R)),
        }

    def verify(self, prompt: Any, text: Any) -> float:
        if self.redraw:
            raise InputError("facts: values that are redrawn at every occurrence have no right answer")
        asked, answer = self.ids(prompt), self.ids(text)
        end = len(asked) - (self.form == "qa")
        symbols = [int(np.flatnonzero(self.token_V == t)[0]) for t in asked[end - self.key_symbols : end] if t >= FIRST]
        if len(symbols) != self.key_symbols:
            raise InputError(f"facts: a prompt that does not end in a key of {self.key_symbols} symbols")
        key = int(np.polyval(symbols, V))
        return float(np.array_equal(answer, self.token_V[self.value_KA[key]]))


def digits(number_n: np.ndarray, count: int) -> np.ndarray:
    """Numbers as symbols, the highest first; int64 [n, count] of 0 to V - 1."""
    return number_n[:, None] >> np.arange(BITS * (count - 1), -1, -BITS) & (V - 1)


def noise_entropy(eps: float) -> float:
    """Nats of a symbol that is replaced by a uniform one of V with probability eps."""
    return entropy(np.array([1 - eps + eps / V, *[eps / V] * (V - 1)]))


def noise_nats(eps: float, same: np.ndarray) -> np.ndarray:
    """-log of the probability of a symbol that is, or is not, the right one."""
    return np.where(same, -np.log(1 - eps + eps / V), -np.log(max(eps / V, 1e-300)))


def task(spec: str, rest: str, cache: Path) -> Facts:
    return world(Facts, spec, rest)
