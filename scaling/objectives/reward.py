"""Reward model: how much better the chosen answer is than the rejected one, as Bradley & Terry (1952) would have it.

The reward of a sequence is `params["reward"]`, a vector, times the last hidden layer at the last token of the answer
(2009.01325, section 3.4). Only differences count, so there is no bias.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import ModelConfig
from scaling.objectives._pairs import Pairs, apart, both, right


@dataclass(frozen=True)
class Reward(Pairs):
    """Batch: chosen_BU and rejected_BU, and the number of the last token of each, chosen_last_B and rejected_last_B.

    The loss is -log sigmoid(r_chosen - r_rejected), nats a pair; `margin` the mean of that difference.
    """

    logits = False
    reads_last = True

    def heads(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"reward": (model.d_model,)}

    def side(self, side: str, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer_BT = np.asarray(rows[f"{side}_answer_BT"])
        last_B = answer_BT.shape[1] - np.argmax(answer_BT[:, ::-1], axis=1)  # of the tokens, one of which is before
        return {f"{side}_BU": rows[f"{side}_BU"], f"{side}_last_B": last_B.astype(np.int32)}

    def margins(self, apply: Any, params: Any, batch: Any) -> Any:
        """r_chosen - r_rejected, [B]."""
        chosen_B, rejected_B = apart(apply.scalars(params, "reward", both(batch, "BU"), both(batch, "last_B")))
        return chosen_B - rejected_B

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        import jax
        import jax.numpy as jnp

        margin_B = self.margins(apply, params, batch)
        loss = jnp.mean(jax.nn.softplus(-margin_B))
        return loss, {"loss": loss, "accuracy": right(margin_B), "margin": jnp.mean(margin_B)}

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        import jax

        return jax.nn.softplus(-self.margins(apply, params, batch))
