"""One token at a time with a cache: prefill a batch of prompts of different lengths, then step. Pure functions.

Each gives the logits of one full pass over all that a sequence has seen, to float32 rounding. A cache has a fixed
number of slots: prompts take as many as the longest of them, each step one more, and the caller keeps count.

Letters as in models/transformer.py; P the longest prompt's length.
"""

from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.implementation import Implementation
from models.transformer import DEFAULT, Cache, Transformer

Params = Any


def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    slots: int,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> tuple[jax.Array, Cache]:
    """(logits_BV after each prompt's last token, the cache) of prompts of 1 <= length <= P tokens, padded on the right.

    `slots` >= P.
    """
    model = Transformer(config, dtype, how)
    x_BPD, cache = model.apply({"params": params}, tokens_BP, length_B, slots, method="begin")
    last_BTD = jnp.take_along_axis(x_BPD, length_B[:, None, None] - 1, axis=1)
    return model.apply({"params": params}, last_BTD, method="logits")[:, 0], cache


def step(
    config: ModelConfig,
    params: Params,
    tokens_B: jax.Array,
    cache: Cache,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> tuple[jax.Array, Cache]:
    """(logits_BV after this token, the cache with it). The cache must have a free slot."""
    logits_BTV, cache = extend(config, params, tokens_B[:, None], cache, None, dtype, how)
    return logits_BTV[:, 0], cache


def extend(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    cache: Cache,
    real_B: jax.Array | None = None,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> tuple[jax.Array, Cache]:
    """(logits_BTV, the cache) of T tokens more, of which the first real_B (by default all) belong to each sequence."""
    return Transformer(config, dtype, how).apply({"params": params}, tokens_BT, None, cache, real_B)


def take(cache: Cache, index_X: jax.Array) -> Cache:
    """The cache of sequences chosen by index, some perhaps several times: one prompt continued in several ways."""
    layers = jax.tree.map(lambda x: x[index_X], cache.layers)
    return Cache(layers, cache.seen_BS[index_X], cache.length_B[index_X], cache.slot)


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` in all."""
    more = slots - cache.seen_BS.shape[1]
    layers = jax.tree.map(lambda x_BGSK: jnp.pad(x_BGSK, ((0, 0), (0, 0), (0, more), (0, 0))), cache.layers)
    return Cache(layers, jnp.pad(cache.seen_BS, ((0, 0), (0, more))), cache.length_B, cache.slot)
