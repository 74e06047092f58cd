"""A random walk on a random graph: its losses follow power laws though nothing in it does (2601.10684).

`graph:nodes=1000,edges=5000`. An Erdos-Renyi graph G(n, m): m of all pairs of nodes, undirected. A row is one walk, its
nodes written as two symbols each; it begins at a node drawn in proportion to its degree, which is stationary.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.data.draws import below, bits, entropy
from scaling.data.order import window_indices
from scaling.data.sources.facts import CONTENT, V, digits
from scaling.data.task import START, Example, Rows, World, expect, pack, world

USAGE = "graph[:OPTIONS]"
FIRST = 1  # the id of the first content symbol
SHOWN = 8  # nodes of an example


@dataclass(frozen=True)
class Graph(World):
    seed: int = 0
    nodes: int = 1000
    edges: int = 5000

    symbols = (".", *CONTENT)
    item_length = 4  # a node, and the one after it

    def __post_init__(self) -> None:
        expect("seed", self.seed, 0 <= self.seed < 2**32, "a whole number of 0 to 2^32 - 1")
        expect("nodes", self.nodes, 2 <= self.nodes <= V**2, f"a whole number of 2 to {V**2}")
        pairs = self.nodes * (self.nodes - 1) // 2
        expect("edges", self.edges, 1 <= self.edges <= pairs, f"a whole number of 1 to {pairs}")

    @functools.cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(from, to) of each edge in both directions, sorted by where they begin, [2 edges]."""
        low, high = np.tril_indices(self.nodes, -1)
        chosen = window_indices(len(low), self.seed, 0, self.edges)
        begin = np.concatenate([low[chosen], high[chosen]])
        end = np.concatenate([high[chosen], low[chosen]])
        order = np.lexsort((end, begin))
        return begin[order], end[order]

    @functools.cached_property
    def degree_N(self) -> np.ndarray:
        return np.bincount(self.ends[0], minlength=self.nodes)

    def walk(self, split: str, index_n: np.ndarray, steps: int) -> np.ndarray:
        """Nodes [n, steps]."""
        begin, end = self.ends
        first_N, degree_N = np.cumsum(self.degree_N) - self.degree_N, self.degree_N
        drawn = bits(self.stream(split), index_n, steps)
        at_n = begin[below(drawn[:, 0], 2 * self.edges)]
        walk = [at_n]
        for i in range(1, steps):
            # The upper 32 bits times a degree, over 2^32.
            turn_n = ((drawn[:, i] >> np.uint64(32)) * degree_N[at_n].astype(np.uint64)) >> np.uint64(32)
            at_n = end[first_N[at_n] + turn_n.astype(np.int64)]
            walk.append(at_n)
        return np.stack(walk, axis=1)

    def rows(self, split: str, indices_n: np.ndarray, T: int) -> Rows:
        """answer_BT: every node but the first."""
        self.check(T)
        walk_nS = self.walk(split, indices_n, T // 2)
        tokens = FIRST + digits(walk_nS.ravel(), 2).reshape(len(indices_n), 1, -1)
        return pack(tokens, 2, T)

    def oracle(self, split: str, indices_n: np.ndarray, T: int) -> np.ndarray:
        """Of each node but the first; of its first symbol, what is known of it by the degree of the node before, and of
        its second what is left.
        """
        walk_nS = self.walk(split, indices_n, T // 2)
        before_nS, high_nS = walk_nS[:, :-1], walk_nS[:, 1:] // V
        begin, end = self.ends
        count_NV = np.zeros((self.nodes, V), np.int64)
        np.add.at(count_NV, (begin, end // V), 1)
        count_nS = count_NV[before_nS, high_nS]
        nats_nS2 = np.stack([np.log(self.degree_N[before_nS] / count_nS), np.log(count_nS)], axis=2)
        return np.pad(nats_nS2.reshape(len(walk_nS), -1), ((0, 0), (2, T % 2)), constant_values=np.nan)

    def example(self, split: str, index: int) -> Example:
        """A walk of 7 nodes, and the eighth."""
        walk = FIRST + digits(self.walk(split, np.array([index], np.int64), SHOWN)[0], 2)
        return Example(np.concatenate([[START], walk[:-1].ravel()]), walk[-1], {})

    def verify(self, prompt: Any, text: Any) -> float:
        """1 where the answer is a neighbour of the last node."""
        asked, answer = self.ids(prompt)[-2:] - FIRST, self.ids(text) - FIRST
        if len(asked) != 2 or (asked < 0).any():
            raise InputError("graph: a prompt that does not end in a node of two symbols")
        if len(answer) != 2 or (answer < 0).any():
            return 0.0
        begin, end = self.ends
        return float(bool((end[begin == asked[0] * V + asked[1]] == answer[0] * V + answer[1]).any()))

    @property
    def choices(self) -> tuple[np.ndarray, ...]:
        return (np.arange(FIRST, FIRST + V),) * 2

    def exact(self) -> dict[str, float]:
        """`node`: nats a step, the mean of ln(degree) over the stationary distribution, which is the degrees' share;
        `value_token` half of it, as a node is two tokens; `first`: nats of the first node of a walk.
        """
        stationary_N = self.degree_N / self.degree_N.sum()
        node = float(stationary_N @ np.log(np.maximum(self.degree_N, 1)))
        return {"node": node, "value_token": node / 2, "first": entropy(self.degree_N)}


def task(spec: str, rest: str, cache: Path) -> Graph:
    return world(Graph, spec, rest)
