"""What a step minimises: one file an objective, found by the file's name. No JAX here.

`scaling/objectives/answers_only.py` defines the class `AnswersOnly(Objective)`, and `objective.name = "answers_only"`
in a configuration chooses it. The fields of the class are its options.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from models.config import ModelConfig
from models.errors import InputError
from models.sizing import flops_per_token
from scaling import by_file


@dataclass(frozen=True)
class Objective:
    """Hashable, and part of the compiled program's key: equal objectives share a program.

    `apply` is the model (scaling.engine.program.Apply), `frozen` a tree of arrays that are not trained (empty unless a
    run has any), `batch` a tree of arrays with leading axis B, `key` a PRNG key of the step, None unless `random`.
    Where a batch is accumulated in parts, objective and metrics are means over the parts.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)  #: names of the scalars of a step: columns of curve.parquet
    flops_factor: ClassVar[float] = 1.0  #: training FLOPs, as a multiple of next token's on the same tokens
    sequences: ClassVar[int] = 1  #: that a row of a batch holds
    logits: ClassVar[bool] = True  #: whether logits are made
    reads_last: ClassVar[bool] = False  #: whether the model reads the last token of a row too
    #: names of what the run's parent gives each row (`of_reference`): the batch has them too, and a parent is needed
    reference: ClassVar[tuple[str, ...]] = ()
    random: ClassVar[bool] = False  #: whether `loss` takes a key
    weighted_by: ClassVar[str | None] = None  #: the metric that says how much of a step its loss is a mean over

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        """(what is minimised, metrics by name), scalars; for next tokens means over the batch, in nats."""
        raise NotImplementedError

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        """Losses [B, ...] of a validation batch, whose sum over `counted` is the run's loss."""
        raise NotImplementedError

    def counted(self, batch: Any) -> float:
        """How many losses of a validation batch (NumPy arrays) count."""
        raise NotImplementedError

    def heads(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of arrays that are trained beside the model's, by name, in the same tree; they start at zero."""
        return {}

    def flops_per_token(self, model: ModelConfig, seq_len: int) -> float:
        """Training FLOPs per token of `RunConfig.tokens`."""
        head = 0.0 if self.logits else 6.0 * model.d_model * model.vocab_size
        return self.flops_factor * (flops_per_token(model, seq_len) - head)

    def columns(self, tokens: np.ndarray, store: Any) -> dict[str, np.ndarray]:
        """What a batch holds besides its tokens: arrays over the positions of a split of the corpus, named by what they
        are in the batch. A name that ends in T has T values of a window from its first input on; bool becomes float32.

        Raises InputError where the corpus does not have it.
        """
        return {}

    def batch(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a batch holds of the rows of a task (scaling.data.task.Task.rows), int32 and float32.

        Raises InputError where they do not have it.
        """
        raise InputError(f"objective.name: {type(self).__name__} does not train on a task; take a corpus of text")

    def of_reference(self, apply: Any, params: Any, batch: Any) -> dict[str, Any]:
        """What the parent's `params` give each row of a batch, by the names of `reference`, [B] each, float32."""
        raise NotImplementedError

    def whole(self, batch: Any) -> Any:
        """The batch after what must be known of all of it, before it is accumulated in parts."""
        return batch


def tokens_of(rows: dict[str, np.ndarray]) -> np.ndarray:
    """tokens_BU of rows that are sequences. Raises InputError where they are pairs."""
    if "tokens_BU" not in rows:
        raise InputError("objective.name: this task gives pairs, which only an objective on pairs (reward, dpo) takes")
    return rows["tokens_BU"]


def mean_one(weight_BT: Any) -> Any:
    """Weights with a mean of 1 over a batch, so that parts of it with few of them count for few; zeros stay zeros."""
    import jax.numpy as jnp

    return weight_BT * (weight_BT.size / jnp.maximum(jnp.sum(weight_BT), 1.0))


def names() -> tuple[str, ...]:
    """The objectives there are."""
    return by_file.names(__name__)


def check_name(name: str) -> None:
    """Raises InputError where there is no objective of this name."""
    by_file.check_name(__name__, name, "objective")


@functools.cache
def find(name: str, options: str = "") -> Objective:
    """The objective of a name, with options as a JSON object. Raises InputError for a misspelt one."""
    return by_file.made(__name__, name, options, "objective")
