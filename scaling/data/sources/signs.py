"""World S: put signs before numbers so that they sum to a target; easy to check, and guessing's worth is exact.

`signs:k=8,largest=9`. The numbers a_1 .. a_k are uniform in 1 .. largest and the target is their sum with random signs,
so every question has an answer, and often several. Direct answers are k signs; with thinking=1 each sign is followed
by what is left of the target.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling.data.draws import below, bits
from scaling.data.task import Example, Items, World, expect, item_numbers, packed_oracle, world

USAGE = "signs[:OPTIONS]"
PLUS, MINUS = 1, 2
MOST_MULTISETS = 1_000_000  # of numbers, over which the entropy is summed


@dataclass(frozen=True)
class Signs(World):
    seed: int = 0
    k: int = 8  #: numbers, and signs
    largest: int = 9  #: of the numbers
    thinking: bool = False  #: after each sign, what is left
    numbers: int = 0  #: the largest that has a symbol, to keep the vocabulary over several k; 0: k * largest

    def __post_init__(self) -> None:
        expect("seed", self.seed, 0 <= self.seed < 2**32, "a whole number of 0 to 2^32 - 1")
        expect("k", self.k, 1 <= self.k <= 30, "a whole number of 1 to 30")
        expect("largest", self.largest, 1 <= self.largest <= 1000, "a whole number of 1 to 1000")
        least = self.k * self.largest
        expect("numbers", self.numbers, self.numbers == 0 or least <= self.numbers <= 10**5, f"0 or {least} to 100000")

    @property
    def bound(self) -> int:
        return self.numbers or self.k * self.largest

    @functools.cached_property
    def symbols(self) -> tuple[str, ...]:
        return (".", "+", "-", *map(str, range(-self.bound, self.bound + 1)))

    @property
    def item_length(self) -> int:
        return self.k + 1 + self.k * (2 if self.thinking else 1)

    def token(self, number: np.ndarray) -> np.ndarray:
        """Of whole numbers of -bound to bound."""
        return number + (self.bound + 3)

    def items(self, split: str, index_n: np.ndarray) -> Items:
        drawn = bits(self.stream(split), index_n, self.k + 1)
        a_nk = 1 + below(drawn[:, : self.k], self.largest)
        minus_nk = (drawn[:, self.k :] >> np.arange(63, 63 - self.k, -1).astype(np.uint64) & np.uint64(1)).astype(bool)
        target_n = np.where(minus_nk, -a_nk, a_nk).sum(axis=1)
        prompt_nP = self.token(np.concatenate([a_nk, target_n[:, None]], axis=1))
        answer_nA = self.answer(a_nk, target_n, minus_nk)
        return Items(prompt_nP, answer_nA, answer_nA, {})

    def answer(self, a_nk: np.ndarray, target_n: np.ndarray, minus_nk: np.ndarray) -> np.ndarray:
        """The tokens of an answer with these signs."""
        sign_nk = np.where(minus_nk, MINUS, PLUS)
        if not self.thinking:
            return sign_nk
        left_nk = target_n[:, None] - np.cumsum(np.where(minus_nk, -a_nk, a_nk), axis=1)
        return np.stack([sign_nk, self.token(left_nk)], axis=2).reshape(len(a_nk), -1)

    def oracle(self, split: str, indices_n: np.ndarray, T: int) -> np.ndarray:
        """Of each sign by how many of the right answers that begin so far go on with it; what is left costs nothing."""
        items = self.items(split, item_numbers(indices_n, T // self.item_length))
        a_nk = items.prompt_nP[:, : self.k] - self.token(0)
        every = 2 if self.thinking else 1
        signed_nk = np.where(items.answer_nA[:, ::every] == MINUS, -a_nk, a_nk)
        left_nk = np.cumsum(signed_nk[:, ::-1], axis=1)[:, ::-1]  # of the target, before each sign
        count_nS = no_numbers(*a_nk.shape, self.largest)
        nats_nA, after_n = np.zeros(items.answer_nA.shape), np.ones(len(a_nk))
        for i in reversed(range(self.k)):
            count_nS = one_more(count_nS, a_nk[:, i])
            before_n = np.take_along_axis(count_nS, left_nk[:, i, None] + self.k * self.largest, 1)[:, 0]
            nats_nA[:, i * every], after_n = np.log(before_n / after_n), before_n
        return packed_oracle(items._replace(oracle_nA=nats_nA), len(indices_n), T)

    def example(self, split: str, index: int) -> Example:
        """Its facts: how many of the 2^k answers are right, and what guessing is worth, their share."""
        plain = super().example(split, index)
        a, target = self.question(plain.prompt)
        count = int(solutions(a[None], self.largest)[0, target + self.k * self.largest])
        return plain._replace(facts={"solutions": float(count), "guess": count / 2**self.k})

    def question(self, prompt: Any) -> tuple[np.ndarray, int]:
        """(a_k, target) of a prompt."""
        numbers = self.ids(prompt)[-self.k - 1 :] - self.token(0)
        return numbers[:-1], int(numbers[-1])

    @property
    def choices(self) -> tuple[np.ndarray, ...] | None:
        return None if self.thinking else (np.array([PLUS, MINUS]),) * self.k

    def right(self, example: Example, answers_SA: np.ndarray) -> np.ndarray:
        a, target = self.question(example.prompt)
        sign_Sk = answers_SA[:, :: 2 if self.thinking else 1]
        right_S = np.where(sign_Sk == MINUS, -a, a).sum(axis=1) == target
        return right_S & np.isin(sign_Sk, (PLUS, MINUS)).all(axis=1)

    def verify(self, prompt: Any, text: Any) -> float:
        """1 where it is as long as an answer is and its signs sum to the target, whatever is thought between them."""
        answer = self.ids(text)
        whole = len(answer) == self.item_length - self.k - 1
        return float(whole and self.right(Example(prompt, answer, {}), answer[None])[0])

    def exact(self) -> dict[str, float]:
        """`guess_accuracy`: of random signs, P(sum of d_i a_i = 0) with d_i the halved difference of two random signs.
        `answer`: nats of the answer to a question, the mean logarithm of how many are right (with as few numbers as
        can be gone through). `all_tokens`: nats a token of questions with their answers.
        """
        step = np.zeros(2 * self.largest + 1)
        step[: self.largest] = step[self.largest + 1 :] = 1 / (4 * self.largest)
        step[self.largest] = 1 / 2
        difference = functools.reduce(np.convolve, [step] * self.k)
        facts = {
            "guess_accuracy": float(difference[len(difference) // 2]),
            "all_tokens": self.k * math.log(2 * self.largest) / self.item_length,
        }
        if math.comb(self.largest + self.k - 1, self.k) <= MOST_MULTISETS:
            facts["answer"] = mean_log_solutions(self.largest, self.k)
        return facts


def solutions(a_nk: np.ndarray, largest: int) -> np.ndarray:
    """How many choices of signs give each sum, int64 [n, 2 k largest + 1]; the sum 0 is in the middle."""
    count_nS = no_numbers(*a_nk.shape, largest)
    for a_n in a_nk.T:
        count_nS = one_more(count_nS, a_n)
    return count_nS


def no_numbers(n: int, k: int, largest: int) -> np.ndarray:
    count_nS = np.zeros((n, 2 * k * largest + 1), np.int64)
    count_nS[:, k * largest] = 1
    return count_nS


def one_more(count_nS: np.ndarray, a_n: np.ndarray) -> np.ndarray:
    """The counts of sums with a number more. Sums never leave the table, so what goes around its ends is zero."""
    place_S, width = np.arange(count_nS.shape[1]), count_nS.shape[1]
    up_nS, down_nS = (place_S - a_n[:, None]) % width, (place_S + a_n[:, None]) % width
    return np.take_along_axis(count_nS, up_nS, 1) + np.take_along_axis(count_nS, down_nS, 1)


@functools.lru_cache(maxsize=16)
def mean_log_solutions(largest: int, k: int) -> float:
    """E ln(number of right answers) over all questions, exactly: a sum over multisets of numbers."""
    total, chosen = 0.0, itertools.combinations_with_replacement(range(1, largest + 1), k)
    while block := list(itertools.islice(chosen, 4096)):
        a_nk = np.array(block)
        times = [math.factorial(k) / math.prod(math.factorial(row.count(v)) for v in set(row)) for row in block]
        count_nS = solutions(a_nk, largest)
        mean_n = (count_nS * np.log(np.maximum(count_nS, 1))).sum(axis=1) / 2**k
        total += float(np.dot(times, mean_n))
    return total / largest**k


def task(spec: str, rest: str, cache: Path) -> Signs:
    return world(Signs, spec, rest)
