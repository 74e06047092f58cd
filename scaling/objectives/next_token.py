"""Next token: the mean cross-entropy of every token given those before it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.objectives import Objective, mean_one, tokens_of


@dataclass(frozen=True)
class NextToken(Objective):
    """Batch: tokens_BU, U = T + 1; of padded rows also weight_BT of the targets, 0 where they are padding."""

    def whole(self, batch: Any) -> Any:
        return batch | {"weight_BT": mean_one(batch["weight_BT"])} if "weight_BT" in batch else batch

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        objective, loss = apply.mean_loss(params, batch["tokens_BU"], batch.get("weight_BT"))
        return objective, {"loss": loss}

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        loss_BT = apply.token_losses(params, batch["tokens_BU"])
        return loss_BT * batch["weight_BT"] if "weight_BT" in batch else loss_BT

    def counted(self, batch: Any) -> float:
        if "weight_BT" in batch:
            return float(batch["weight_BT"].sum(dtype=np.float64))
        return batch["tokens_BU"][:, 1:].size

    def batch(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        padded = {"weight_BT": rows["real_BT"].astype(np.float32)} if "real_BT" in rows else {}
        return {"tokens_BU": tokens_of(rows), **padded}
