"""Answers only: the mean cross-entropy of the tokens that answer, as in instruction tuning; the prompt is only read.

A task says itself which tokens answer. On a text corpus an answer is what follows `marker` in a line, up to and with
the line's end: of "2 + 3 = 5" and marker "=", the " 5" and the new line. Positions are found in the whole corpus, so a
window may begin within an answer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.objectives import Objective, mean_one, tokens_of

BLOCK = 2**22  # tokens looked at together: bounds the memory


@dataclass(frozen=True)
class AnswersOnly(Objective):
    """Batch: tokens_BU, and weight_BT of the targets, 0 or 1 (or between). Mean over the weighted tokens."""

    marker: str = "="  #: the character after which a line answers; with data.tokenizer = bytes; not of a task

    metrics = ("loss", "answer_share")
    weighted_by = "answer_share"

    def __post_init__(self) -> None:
        if not isinstance(self.marker, str) or len(self.marker.encode()) != 1 or self.marker == "\n":
            raise InputError(f"objective.options: marker = {self.marker!r}: expected one ASCII character")

    def whole(self, batch: Any) -> Any:
        """A batch without an answer trains nothing."""
        return batch | {"weight_BT": mean_one(batch["weight_BT"])}

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        import jax.numpy as jnp

        objective, loss = apply.mean_loss(params, batch["tokens_BU"], batch["weight_BT"])
        return objective, {"loss": loss, "answer_share": jnp.mean(batch["weight_BT"] > 0)}

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        return apply.token_losses(params, batch["tokens_BU"]) * batch["weight_BT"]

    def counted(self, batch: Any) -> float:
        return float(batch["weight_BT"].sum(dtype=np.float64))

    def batch(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens_BU": tokens_of(rows), "weight_BT": rows["answer_BT"].astype(np.float32)}

    def columns(self, tokens: np.ndarray, store: Any) -> dict[str, np.ndarray]:
        if store.vocab_size != 256:
            raise InputError("objective.name = 'answers_only': finds its marker by bytes; set data.tokenizer to bytes")
        weight = answers(tokens, ord(self.marker), ord("\n"))
        if not weight.any():
            raise InputError(
                f"objective.options: marker {self.marker!r} stands in no line of {store.source!r}, so nothing answers; "
                "choose another"
            )
        return {"weight_BT": weight}


def answers(tokens: np.ndarray, marker: int, end: int) -> np.ndarray:
    """Whether the token after each position is of an answer: the last marker or end up to there is a marker; bool."""
    weight, within = np.zeros(len(tokens), bool), False
    for at in range(0, len(tokens), BLOCK):
        part = np.asarray(tokens[at : at + BLOCK])
        places = np.flatnonzero((part == marker) | (part == end))
        states = np.concatenate([[within], part[places] == marker])
        weight[at : at + BLOCK] = np.repeat(states, np.diff(np.concatenate([[0], places, [len(part)]])))
        within = bool(states[-1])
    return weight
