"""Pairs of strings of the Markov source, of which a judge with a known taste has chosen one. `comparisons:b=0.2`.

The true reward of a string is g = z - b z^2, z its standardised score: the sum of a whole-numbered taste for each pair
of neighbours, less its mean, over its standard deviation on the source. It is highest at z = 1 / (2 b), beyond which
more of what was liked is worse. As tastes are small whole numbers, the distribution of scores is known exactly, and
with it the best loss of a reward model, best-of-n and the optimum under a penalty on KL.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.config import ADDED
from scaling.data.draws import below, bits, stream, unit
from scaling.data.sources.markov import Markov, S
from scaling.data.task import START, Example, Rows, expect, world

USAGE = "comparisons[:OPTIONS]"
TASTE = 8  # the largest taste for a pair of neighbours, and less its negative


@dataclass(frozen=True)
class Comparisons(Markov):
    b: float = 0.2  #: of z^2, what is too much of z; 0: the more the better
    sharpness: float = 1.0  #: noisy labels: log-odds of the right choice, over the difference in true reward
    labels: str = "noisy"  #: noisy, as Bradley & Terry (1952); gold, the better one; random, a coin
    #: what has a taste: pairs of neighbours, or symbols (each but the first of a string), of which there are but 16
    taste: str = field(default="pairs", metadata=ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect("b", self.b, 0 <= self.b <= 10, "a number of 0 to 10")
        expect("sharpness", self.sharpness, 0 < self.sharpness <= 1e6, "a number above 0, at most 1e6")
        expect("taste", self.taste, self.taste in ("pairs", "symbols"), "pairs or symbols")
        expect("labels", self.labels, self.labels in ("noisy", "gold", "random"), "noisy, gold or random")

    @functools.cached_property
    def taste_SS(self) -> np.ndarray:
        drawn = bits(stream("comparisons", self.seed, "taste"), np.arange(S), S)
        taste_SS = below(drawn, 2 * TASTE + 1) - TASTE
        return np.broadcast_to(taste_SS[0], (S, S)) if self.taste == "symbols" else taste_SS

    @functools.cached_property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(every score that a string may have, its probability on the source), float64, exact."""
        most = TASTE * (self.length - 1)
        p_SN = np.zeros((S, 2 * most + 1))
        p_SN[:, most] = self.stationary_S
        for _ in range(self.length - 1):
            new_SN = np.zeros_like(p_SN)
            for taste in range(-TASTE, TASTE + 1):
                # No score leaves the table, so nothing but zeros is rolled around its ends.
                new_SN += (self.transition_SS * (self.taste_SS == taste)).T @ np.roll(p_SN, taste, axis=1)
            p_SN = new_SN
        p_N = p_SN.sum(axis=0)
        return np.arange(-most, most + 1)[p_N > 0].astype(np.float64), p_N[p_N > 0]

    @functools.cached_property
    def moments(self) -> tuple[float, float]:
        """(mean, standard deviation) of the scores."""
        score_N, p_N = self.scores
        mean = float(p_N @ score_N)
        return mean, float(np.sqrt(p_N @ (score_N - mean) ** 2))

    def standardised(self, tokens_NT: np.ndarray) -> np.ndarray:
        """z of strings of token ids, float64 [N]; a token that is no symbol of the source makes its neighbours' taste
        the lowest.
        """
        symbol_NT = np.asarray(tokens_NT, np.int64) - 1
        taste_NT = self.taste_SS[symbol_NT[:, :-1], symbol_NT[:, 1:]]
        within_NT = (symbol_NT >= 0) & (symbol_NT < S)
        score_N = np.where(within_NT[:, :-1] & within_NT[:, 1:], taste_NT, -TASTE).sum(axis=1)
        mean, std = self.moments
        return (score_N - mean) / std

    def gold(self, tokens_NT: np.ndarray) -> np.ndarray:
        """The true reward g = z - b z^2 of strings of token ids, T = length, without START; float64 [N]."""
        z_N = self.standardised(tokens_NT)
        return z_N - self.b * z_N**2

    def pairs(self, split: str, index_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected), tokens of strings, each [n, length]."""
        first, second = (1 + self.strings(self.stream(split, which), index_n) for which in ("first", "second"))
        better_n = self.gold(first) - self.gold(second)
        drawn_n = unit(bits(self.stream(split, "labels"), index_n, 1)[:, 0])
        chance_n = {
            "noisy": sigmoid(self.sharpness * better_n),
            "gold": (better_n >= 0).astype(np.float64),
            "random": np.full(len(better_n), 0.5),
        }[self.labels]
        swap = (drawn_n >= chance_n)[:, None]
        return np.where(swap, second, first), np.where(swap, first, second)

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        """chosen_BU, chosen_answer_BT, rejected_BU, rejected_answer_BT: START, a string, and padding."""
        self.check(T)
        rows, n = {}, len(indices_n)
        for name, string in zip(("chosen", "rejected"), self.pairs(split, indices_n), strict=True):
            rows[f"{name}_BU"] = np.full((n, T + 1), START, np.int32)
            rows[f"{name}_BU"][:, 1 : 1 + self.length] = string
            rows[f"{name}_answer_BT"] = np.broadcast_to(np.arange(T) < self.length, (n, T))
        return rows

    def example(self, split: str, index: int) -> Example:
        """The answer is the string that was chosen; its facts are the true rewards of both."""
        chosen, rejected = self.pairs(split, np.array([index], np.int64))
        gold = {"gold": self.gold(chosen)[0], "gold_rejected": self.gold(rejected)[0]}
        return Example(np.array([START]), chosen[0], {name: float(value) for name, value in gold.items()})

    def verify(self, prompt: Any, text: Any) -> float:
        """The true reward."""
        return float(self.gold(self.ids(text)[None])[0])

    def exact(self) -> dict[str, float]:
        """Of the source as `markov`; and of the labels: `best_loss` and `best_accuracy`, what the true reward itself
        reaches on pairs, in nats a pair; `gold` the mean true reward of the source, `gold_std` its deviation.
        """
        score_N, p_N = self.scores
        mean, std = self.moments
        z_N = (score_N - mean) / std
        gold_N = z_N - self.b * z_N**2
        better_NN, p_NN = gold_N[:, None] - gold_N, p_N[:, None] * p_N
        if self.labels == "noisy":
            odds_NN = self.sharpness * np.abs(better_NN)
            right_NN = sigmoid(odds_NN)
            loss = float((p_NN * (np.logaddexp(0, -odds_NN) + (1 - right_NN) * odds_NN)).sum())
            accuracy = float((p_NN * right_NN).sum())
        else:
            tied = float((p_NN * (better_NN == 0)).sum())
            loss, accuracy = (np.log(2), 0.5) if self.labels == "random" else (np.log(2) * tied, 1 - tied / 2)
        spread = float(np.sqrt(p_N @ (gold_N - p_N @ gold_N) ** 2))
        labels = {"best_loss": float(loss), "best_accuracy": accuracy, "gold": float(p_N @ gold_N), "gold_std": spread}
        return super().exact() | labels


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def task(spec: str, rest: str, cache: Path) -> Comparisons:
    return world(Comparisons, spec, rest)
