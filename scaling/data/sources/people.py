"""People and what is known of them, told as biographies and asked for: `people:form=qa,who=second`.

A biography is a name of two symbols and then, for each of four attributes, a phrase and the value. A question names one
attribute of one person. Pretrained on biographies of all and finetuned on questions about the first half, does a model
answer questions about the second? It does where each attribute was told in varied words and order; else it has the text
by heart and cannot get at the facts (Allen-Zhu & Li, Physics of Language Models 3.1, 2309.14316).
"""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.data.draws import below, bits, stream
from scaling.data.order import window_indices
from scaling.data.sources.facts import CONTENT, V, digits
from scaling.data.task import Example, Items, World, expect, world

USAGE = "people[:OPTIONS]"
ATTRIBUTES = ("birth", "city", "school", "work")
WORDINGS = 8  # phrases that an attribute may be told in
A = len(ATTRIBUTES)
ORDERS = np.array(list(itertools.permutations(range(A))))
ASK, MARK, ASKED = 1, 2, 3  # Q, ?, and the first of the attributes' names
TOLD = ASKED + A  # the first phrase
FIRST = TOLD + A * WORDINGS  # the first content symbol


@dataclass(frozen=True)
class People(World):
    seed: int = 0
    people: int = 1000
    form: str = "bio"  #: bio: name, then phrase and value four times; qa: Q name attribute ? value
    who: str = "all"  #: or the first half of the people, or the second
    order: str = "fixed"  #: of a biography's attributes: fixed, or permuted each time that it is told
    wordings: int = 1  #: phrases that an attribute of a person is told in; which ones differs from person to person

    symbols = (".", "Q", "?", *ATTRIBUTES, *(f"{a}{i}" for a in ATTRIBUTES for i in range(WORDINGS)), *CONTENT)

    def __post_init__(self) -> None:
        expect("seed", self.seed, 0 <= self.seed < 2**32, "a whole number of 0 to 2^32 - 1")
        expect("people", self.people, 2 <= self.people <= V**2, f"a whole number of 2 to {V**2}")
        expect("form", self.form, self.form in ("bio", "qa"), "bio or qa")
        expect("who", self.who, self.who in ("all", "first", "second"), "all, first or second")
        expect("order", self.order, self.order in ("fixed", "permuted"), "fixed or permuted")
        expect("wordings", self.wordings, 1 <= self.wordings <= WORDINGS, f"a whole number of 1 to {WORDINGS}")

    @property
    def item_length(self) -> int:
        return 2 + 2 * A if self.form == "bio" else 6

    @functools.cached_property
    def person_N(self) -> np.ndarray:
        """The names, as numbers of V^2, of those who are told or asked about."""
        person_N = window_indices(V**2, self.seed, 0, self.people)
        half = self.people // 2
        return {"all": person_N, "first": person_N[:half], "second": person_N[half:]}[self.who]

    @functools.cached_property
    def value_KA(self) -> np.ndarray:
        """Of the attributes of everyone, numbers of content symbols."""
        return below(bits(stream("people", self.seed, "values"), np.arange(V**2), A), V)

    @functools.cached_property
    def phrase_KA(self) -> np.ndarray:
        """The first of the phrases that each attribute of everyone is told in; the others follow it, around."""
        return below(bits(stream("people", self.seed, "phrases"), np.arange(V**2), A), WORDINGS)

    @property
    def choices(self) -> tuple[np.ndarray, ...] | None:
        return None if self.form == "bio" else (np.arange(FIRST, FIRST + V),)

    def right(self, example: Example, answers_SA: np.ndarray) -> np.ndarray:
        return (answers_SA == example.answer).all(axis=1)

    def items(self, split: str, index_n: np.ndarray) -> Items:
        drawn = bits(self.stream(split), index_n, 2 + A)
        person_n = self.person_N[below(drawn[:, 0], len(self.person_N))]
        name_n2 = FIRST + digits(person_n, 2)
        if self.form == "qa":
            attribute_n = below(drawn[:, 1], A)
            fixed = np.ones((len(person_n), 1), np.int64)
            prompt_nP = np.concatenate([ASK * fixed, name_n2, ASKED + attribute_n[:, None], MARK * fixed], axis=1)
            answer_n1 = FIRST + self.value_KA[person_n, attribute_n][:, None]
            return Items(prompt_nP, answer_n1, answer_n1, {"attribute": attribute_n}, np.zeros(answer_n1.shape))
        order_nA = ORDERS[below(drawn[:, 1], len(ORDERS)) if self.order == "permuted" else np.zeros(len(person_n), int)]
        phrase_nA = (self.phrase_KA[person_n] + below(drawn[:, 2:], self.wordings)) % WORDINGS
        told_nA = TOLD + WORDINGS * np.arange(A) + phrase_nA
        pairs_nA2 = np.stack([told_nA, FIRST + self.value_KA[person_n]], axis=2)
        answer_nA = np.take_along_axis(pairs_nA2, order_nA[:, :, None], axis=1).reshape(len(person_n), -1)
        return Items(name_n2, answer_nA, answer_nA, {})

    def exact(self) -> dict[str, float]:
        """`key`: nats of who is told or asked about, with the attribute asked for; `all_tokens` a token, of who knows
        everyone: of a biography its order and its phrases, of an answer nothing.
        """
        key = math.log(len(self.person_N))
        if self.form == "qa":
            key += math.log(A)
            return {"key": key, "all_tokens": key / self.item_length, "value_token": 0.0, "guess_accuracy": 1 / V}
        told = A * math.log(self.wordings) + (math.log(len(ORDERS)) if self.order == "permuted" else 0.0)
        return {"key": key, "told": told, "all_tokens": (key + told) / self.item_length}

    def verify(self, prompt: Any, text: Any) -> float:
        if self.form == "bio":
            raise InputError("people: a biography is told in many ways; ask with form=qa")
        asked, answer = self.ids(prompt), self.ids(text)
        name, attribute = asked[-4:-2] - FIRST, asked[-2] - ASKED
        if asked[-1] != MARK or (name < 0).any() or not 0 <= attribute < A:
            raise InputError("people: a prompt that is no question: Q, a name of two symbols, an attribute and ?")
        value = FIRST + self.value_KA[name[0] * V + name[1], attribute]
        return float(len(answer) == 1 and answer[0] == value)


def task(spec: str, rest: str, cache: Path) -> People:
    return world(People, spec, rest)
