"""Direct preference optimisation (2305.18290, equation 7): a policy from pairs, without a reward model between.

The reference is the run's parent, frozen. What it gives each pair is computed once, before the first step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.objectives._pairs import SIDES, Pairs, apart, both, right


@dataclass(frozen=True)
class Dpo(Pairs):
    """Batch: chosen_BU and rejected_BU, the targets that answer, chosen_answer_BT and rejected_answer_BT, and the
    reference's log-probabilities of the two answers.

    margin = beta (log pi / ref (chosen) - log pi / ref (rejected)), of which the mean is a metric; the loss is
    -(1 - s) log sigmoid(margin) - s log sigmoid(-margin), nats a pair, s being `label_smoothing`. `kl` is the mean of
    log ref / pi over the answers, nats an answer: an unbiased estimate of KL(reference || policy) where the pairs were
    drawn from the reference.
    """

    beta: float = 0.1  #: the larger, the nearer the policy stays to the reference
    label_smoothing: float = 0.0  #: s: the share of pairs that are the wrong way round

    metrics = ("loss", "accuracy", "margin", "kl")
    reference = ("reference_chosen_B", "reference_rejected_B")

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise InputError(f"objective.options: beta = {self.beta!r}: expected a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(
                f"objective.options: label_smoothing = {self.label_smoothing!r}: expected a number from 0 to below 0.5"
            )

    def side(self, side: str, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer_BT = np.asarray(rows[f"{side}_answer_BT"], np.float32)
        return {f"{side}_BU": rows[f"{side}_BU"], f"{side}_answer_BT": answer_BT}

    def answers(self, apply: Any, params: Any, batch: Any) -> tuple[Any, Any]:
        """Log-probabilities, nats, of the chosen and of the rejected answers given their prompts, each [B]."""
        loss_BT = apply.token_losses(params, both(batch, "BU")) * both(batch, "answer_BT")
        return apart(-loss_BT.sum(axis=1))

    def of_reference(self, apply: Any, params: Any, batch: Any) -> dict[str, Any]:
        return dict(zip(self.reference, self.answers(apply, params, batch), strict=True))

    def ratios(self, apply: Any, params: Any, batch: Any) -> tuple[Any, Any]:
        """log policy / reference of the chosen and of the rejected answers, each [B]."""
        policy = self.answers(apply, params, batch)
        return tuple(of_policy - batch[f"reference_{side}_B"] for side, of_policy in zip(SIDES, policy, strict=True))

    def losses_of(self, margin_B: Any) -> Any:
        import jax

        s = self.label_smoothing
        return (1 - s) * jax.nn.softplus(-margin_B) + s * jax.nn.softplus(margin_B)

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        import jax.numpy as jnp

        chosen_B, rejected_B = self.ratios(apply, params, batch)
        margin_B = self.beta * (chosen_B - rejected_B)
        loss = jnp.mean(self.losses_of(margin_B))
        kl = -0.5 * jnp.mean(chosen_B + rejected_B)
        return loss, {"loss": loss, "accuracy": right(margin_B), "margin": jnp.mean(margin_B), "kl": kl}

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        chosen_B, rejected_B = self.ratios(apply, params, batch)
        return self.losses_of(self.beta * (chosen_B - rejected_B))
