"""What objectives on pairs share: an answer that was chosen, and one that was rejected, to the same prompt."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from models.errors import InputError
from scaling.objectives import Objective

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pairs(Objective):
    """A token of `RunConfig.tokens` stands for one of each side, so a step sees twice as many."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    flops_factor: ClassVar[float] = 2.0
    sequences: ClassVar[int] = 2

    def counted(self, batch: Any) -> float:
        return len(batch["chosen_BU"])

    def columns(self, tokens: np.ndarray, store: Any) -> dict[str, np.ndarray]:
        raise InputError(
            f"data.source = {store.source!r}: text has no pairs, which the objective wants; take a task that has them, "
            "such as jsonl:FILE of lines with prompt, chosen and rejected"
        )

    def batch(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for side in SIDES:
            if f"{side}_BU" not in rows:
                raise InputError(
                    "data.source: this task has no pairs, which the objective wants; take one that has them"
                )
        return {name: x for side in SIDES for name, x in self.side(side, rows).items()}

    def side(self, side: str, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a batch holds of one side."""
        raise NotImplementedError


def both(batch: Any, name: str) -> Any:
    """The arrays of both sides under one another, [2 B, ...], the sides of a row side by side: so a part of the batch
    lies where its rows do.
    """
    import jax.numpy as jnp

    sides = jnp.stack([batch[f"{side}_{name}"] for side in SIDES], axis=1)
    return sides.reshape(-1, *sides.shape[2:])


def apart(x_2B: Any) -> tuple[Any, Any]:
    """(chosen, rejected), each [B], of what was made of `both`."""
    x_B2 = x_2B.reshape(-1, 2)
    return x_B2[:, 0], x_B2[:, 1]


def right(margin_B: Any) -> Any:
    """The share of rows whose margin is above zero; of a tie a half."""
    import jax.numpy as jnp

    return jnp.mean(0.5 * (jnp.sign(margin_B) + 1.0))
