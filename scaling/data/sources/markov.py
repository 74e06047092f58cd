"""A random Markov source: strings of 16 symbols whose entropy is known exactly. `markov:length=24`."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.data.draws import bits, choose, choose_each, entropy, stream, thresholds, unit
from scaling.data.task import Items, World, expect, world

USAGE = "markov[:OPTIONS]"
S = 16  # symbols


@dataclass(frozen=True)
class Markov(World):
    seed: int = 0
    length: int = 24  #: of a string; each begins anew, from the stationary distribution
    sharp: float = 1.0  #: transition probabilities are in proportion to powers of this of exponential numbers

    symbols = (".", *"abcdefghijklmnop")

    def __post_init__(self) -> None:
        expect("seed", self.seed, 0 <= self.seed < 2**32, "a whole number of 0 to 2^32 - 1")
        expect("length", self.length, 2 <= self.length <= 4096, "a whole number of 2 to 4096")
        expect("sharp", self.sharp, 0 <= self.sharp <= 10, "a number of 0 to 10")

    @property
    def item_length(self) -> int:
        return self.length

    @functools.cached_property
    def weights_SS(self) -> np.ndarray:
        """Of the transitions from each symbol (a row) to each, whole numbers near 2^20 times the probability."""
        drawn = bits(stream("markov", self.seed, "transitions"), np.arange(S), S)
        weight = (-np.log(unit(drawn) + 2.0**-54)) ** self.sharp
        return np.maximum(1, np.rint(weight / weight.sum(axis=1, keepdims=True) * 2**20)).astype(np.int64)

    @functools.cached_property
    def transition_SS(self) -> np.ndarray:
        return self.weights_SS / self.weights_SS.sum(axis=1, keepdims=True)

    @functools.cached_property
    def first_S(self) -> np.ndarray:
        """The stationary distribution as whole weights near 2^30 times the probability."""
        equations = np.concatenate([self.transition_SS.T - np.eye(S), np.ones((1, S))])
        stationary_S = np.linalg.lstsq(equations, np.eye(S + 1)[S], rcond=None)[0]
        return np.maximum(1, np.rint(stationary_S * 2**30)).astype(np.int64)

    @property
    def stationary_S(self) -> np.ndarray:
        return self.first_S / self.first_S.sum()

    def strings(self, of: int, index_n: np.ndarray) -> np.ndarray:
        """Strings of the source by the draws of a stream, as numbers of symbols, int64 [n, length]."""
        drawn = bits(of, index_n, self.length)
        of_first, of_next = thresholds(self.first_S), thresholds(self.weights_SS)
        at_n = choose(of_first, drawn[:, 0])
        string = [at_n]
        for i in range(1, self.length):
            at_n = choose_each(of_next[at_n], drawn[:, i])
            string.append(at_n)
        return np.stack(string, axis=1)

    def items(self, split: str, index_n: np.ndarray) -> Items:
        string_nA = self.strings(self.stream(split), index_n)
        next_nA = self.transition_SS[string_nA[:, :-1], string_nA[:, 1:]]
        p_nA = np.concatenate([self.stationary_S[string_nA[:, :1]], next_nA], axis=1)
        return Items(string_nA[:, :0], 1 + string_nA, 1 + string_nA, {}, -np.log(p_nA))

    def exact(self) -> dict[str, float]:
        """`rate`: nats a symbol given the one before it; `all_tokens` with the first symbol of each string, whose
        entropy is that of the stationary distribution.
        """
        rate = float(self.stationary_S @ [entropy(row) for row in self.weights_SS])
        first = entropy(self.first_S)
        return {"rate": rate, "first": first, "all_tokens": (first + (self.length - 1) * rate) / self.length}

    def verify(self, prompt: Any, text: Any) -> float:
        raise InputError(f"{self.kind}: every string is one that the source may give; none is right or wrong")


def task(spec: str, rest: str, cache: Path) -> Markov:
    return world(Markov, spec, rest)
