"""Next token: the mean cross-entropy of every token given those before it."""

from dataclasses import dataclass
from typing import Any

from scaling.objectives import Objective


@dataclass(frozen=True)
class NextToken(Objective):
    """Batch: tokens_BU, U = T + 1."""

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        objective, loss = apply.mean_loss(params, batch["tokens_BU"])
        return objective, {"loss": loss}

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        return apply.token_losses(params, batch["tokens_BU"])

    def counted(self, batch: Any) -> float:
        return batch["tokens_BU"][:, 1:].size
