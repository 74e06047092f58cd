"""Heads beside the one that makes logits: a scalar read off the last hidden layer, such as a reward.

Letters: B batch, U tokens of a sequence, D model width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.implementation import Implementation
from models.transformer import DEFAULT, Transformer


def scalar_at(
    config: ModelConfig,
    params: Any,
    head_D: jax.Array,
    tokens_BU: jax.Array,
    last_B: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> jax.Array:
    """[B], float32: the last hidden layer, after its norm, at the token with the number last_B, times a vector.

    What follows that token is not seen.
    """
    x_BUD, _ = Transformer(config, dtype, how).apply({"params": params}, tokens_BU, method="hidden")
    x_BD = jnp.take_along_axis(x_BUD, last_B[:, None, None], axis=1)[:, 0]
    return x_BD.astype(jnp.float32) @ head_D
