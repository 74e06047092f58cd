"""World F, relational: 8 relations map 1,024 entities onto each other, so facts compose into chains of known answer.

`relations:hops=2,trace=1`. A question is the relations in the order in which they are followed, an entity of two
symbols and "?"; its answer is the entity at the end, with trace=1 after all those on the way. All questions of a row
are of as many hops, drawn evenly from least to hops. Lengths are 3 h + 3 tokens with the trace and h + 5 without: rows
of 72 tokens hold 1, 2 and 3 hops with their traces without padding.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.data.draws import below, bits, choose, entropy, stream, thresholds, unit, zipf
from scaling.data.order import window_indices
from scaling.data.sources.facts import FIRST, MARK, SYMBOLS, V, digits, noise_entropy, noise_nats
from scaling.data.task import START, Example, Items, Rows, World, expect, item_numbers, packed, packed_oracle, world

USAGE = "relations[:OPTIONS]"
RELATIONS, ENTITIES = 8, V**2
R0 = SYMBOLS.index("r0")


@dataclass(frozen=True)
class Relations(World):
    seed: int = 0
    #: the first fact of a chain has rank r with probability ~ r^-(1 + a), so evenly over log rank at 0, and over all
    #: facts at -1; later relations are uniform
    a: float = 0.5
    eps: float = 0.0  #: probability that a symbol of an answer is replaced by a uniform one
    least: int = 1  #: hops
    hops: int = 2  #: at most
    trace: bool = True  #: answers name the entities on the way
    #: of the 8 chains that differ in their last relation alone, one is kept for validation (of two hops and more)
    held: bool = False

    symbols = SYMBOLS

    def __post_init__(self) -> None:
        expect("a", self.a, -1 <= self.a <= 10, "a number of -1 to 10")
        expect("eps", self.eps, 0 <= self.eps <= 1, "a number of 0 to 1")
        expect("seed", self.seed, 0 <= self.seed < 2**32, "a whole number of 0 to 2^32 - 1")
        expect("hops", self.hops, 1 <= self.hops <= 8, "a whole number of 1 to 8")
        expect("least", self.least, 1 <= self.least <= self.hops, f"a whole number of 1 to hops = {self.hops}")

    def length(self, h: int) -> int:
        return h + 3 + 2 * (h if self.trace else 1)

    @property
    def item_length(self) -> int:
        return self.length(self.hops)

    @functools.cached_property
    def weights_R(self) -> np.ndarray:
        return zipf(RELATIONS * ENTITIES, self.a)

    @functools.cached_property
    def thresholds_R(self) -> np.ndarray:
        return thresholds(self.weights_R)

    @functools.cached_property
    def key_R(self) -> np.ndarray:
        """relation * ENTITIES + entity of each rank."""
        return window_indices(RELATIONS * ENTITIES, self.seed, 0, RELATIONS * ENTITIES)

    @functools.cached_property
    def entity_K(self) -> np.ndarray:
        """Where each relation leads from each entity."""
        key_K = np.arange(RELATIONS * ENTITIES)
        return below(bits(stream("relations", self.seed, "facts"), key_K, 1)[:, 0], ENTITIES)

    def hops_of(self, split: str, index_n: np.ndarray) -> np.ndarray:
        """Of each row, or of each example."""
        return self.least + below(bits(self.stream(split, "hops"), index_n, 1)[:, 0], self.hops - self.least + 1)

    @property
    def choices(self) -> tuple[np.ndarray, ...] | None:
        return None if self.trace and self.hops > 1 else (np.arange(FIRST, FIRST + V),) * 2

    def right(self, example: Example, answers_SA: np.ndarray) -> np.ndarray:
        return (answers_SA == example.answer).all(axis=1)

    def items_of(self, split: str, index_n: np.ndarray, h: int) -> Items:
        """Questions of h hops."""
        values = 2 * (h if self.trace else 1)
        drawn = bits(self.stream(split, h), index_n, 1 + (h - 1) + 2 * values)
        rank_n = choose(self.thresholds_R, drawn[:, 0])
        first_n, entity_n = np.divmod(self.key_R[rank_n], ENTITIES)
        relation_nh = np.concatenate([first_n[:, None], below(drawn[:, 1:h], RELATIONS)], axis=1)
        if self.held and h > 1:
            relation_nh[:, -1] = self.last_relation(split, entity_n, relation_nh[:, :-1], drawn[:, h - 1])
        trace_nh = self.follow(relation_nh, entity_n)
        answer_nA = FIRST + self.answer(trace_nh)
        noise_nA = unit(drawn[:, h : h + values]) < self.eps
        shown_nA = np.where(noise_nA, FIRST + below(drawn[:, h + values :], V), answer_nA)
        mark = np.full((len(index_n), 1), MARK)
        prompt_nP = np.concatenate([R0 + relation_nh, FIRST + digits(entity_n, 2), mark], axis=1)
        oracle_nA = noise_nats(self.eps, shown_nA == answer_nA)
        return Items(prompt_nP, shown_nA, answer_nA, {"rank": rank_n + 1, "hops": np.full(len(rank_n), h)}, oracle_nA)

    def last_relation(self, split: str, entity_n: np.ndarray, others_nh: np.ndarray, drawn_n: np.ndarray) -> np.ndarray:
        """Kept for validation, or one of the seven others."""
        chain_n = functools.reduce(lambda number, r: number * RELATIONS + r, others_nh.T, entity_n)
        held_n = below(bits(stream("relations", self.seed, "held", others_nh.shape[1]), chain_n, 1)[:, 0], RELATIONS)
        return held_n if split == "valid" else (held_n + 1 + below(drawn_n, RELATIONS - 1)) % RELATIONS

    def follow(self, relation_nh: np.ndarray, entity_n: np.ndarray) -> np.ndarray:
        """The entities that chains come to, one after another [n, h]."""
        trace = []
        for relation_n in relation_nh.T:
            entity_n = self.entity_K[relation_n * ENTITIES + entity_n]
            trace.append(entity_n)
        return np.stack(trace, axis=1)

    def answer(self, trace_nh: np.ndarray) -> np.ndarray:
        """In numbers of content symbols."""
        named = trace_nh if self.trace else trace_nh[:, -1:]
        return digits(named.ravel(), 2).reshape(len(named), 2 * named.shape[1])

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        self.check(T)
        indices_n = np.asarray(indices_n)
        n = len(indices_n)
        rows = {"tokens_BU": np.empty((n, T + 1), np.int32), "answer_BT": np.empty((n, T), bool)}
        if any(T % self.length(h) for h in range(self.least, self.hops + 1)):
            rows["real_BT"] = np.ones((n, T), bool)
        for which, items in self.by_hops(split, indices_n, T):
            for name, x in packed(items, len(which), T).items():
                rows[name][which] = x
        return rows

    def oracle(self, split: str, indices_n: np.ndarray, T: int) -> np.ndarray:
        oracle_nT = np.empty((len(indices_n), T))
        for which, items in self.by_hops(split, indices_n, T):
            oracle_nT[which] = packed_oracle(items, len(which), T)
        return oracle_nT

    def by_hops(self, split: str, indices_n: np.ndarray, T: int) -> Iterator[tuple[np.ndarray, Items]]:
        """(which rows have so many hops, their questions)."""
        hops_n = self.hops_of(split, indices_n)
        for h in range(self.least, self.hops + 1):
            which = np.flatnonzero(hops_n == h)
            if which.size:
                yield which, self.items_of(split, item_numbers(indices_n[which], T // self.length(h)), h)

    def example(self, split: str, index: int) -> Example:
        at = np.array([index], np.int64)
        items = self.items_of(split, at, int(self.hops_of(split, at)[0]))
        prompt = np.concatenate([[START], items.prompt_nP[0]])
        return Example(prompt, items.answer_nA[0], {name: float(x[0]) for name, x in items.facts.items()})

    def exact(self) -> dict[str, float]:
        """`key`: nats of the first relation and the entity together; `value_token` of each symbol of an answer, as its
        facts are known; `all_tokens` a token where rows have no padding, on the training split.
        """
        value, key = noise_entropy(self.eps), entropy(self.weights_R)
        means = []
        for h in range(self.least, self.hops + 1):
            relations = (h - 1) * math.log(RELATIONS)
            if self.held and h > 1:
                relations += math.log((RELATIONS - 1) / RELATIONS)
            means.append((key + relations + 2 * (h if self.trace else 1) * value) / self.length(h))
        return {
            "value_token": value,
            "key": key,
            "all_tokens": float(np.mean(means)),
            "guess_accuracy": 1 / ENTITIES,
        }

    def verify(self, prompt: Any, text: Any) -> float:
        """1 where all entities of the answer are right, those on the way too."""
        asked, answer = self.ids(prompt), self.ids(text)
        relations = asked[(asked >= R0) & (asked < R0 + RELATIONS)] - R0
        entity = asked[-3:-1] - FIRST
        if asked[-1] != MARK or (entity < 0).any() or not len(relations):
            raise InputError("relations: a prompt that is no question: relations, an entity of two symbols and ?")
        trace = self.follow(relations[None], np.array([entity[0] * V + entity[1]]))
        return float(np.array_equal(answer, FIRST + self.answer(trace)[0]))


def task(spec: str, rest: str, cache: Path) -> Relations:
    return world(Relations, spec, rest)
