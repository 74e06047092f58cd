"""A decoder-only transformer in Flax linen, functional: `init` gives a tree of arrays, `apply` is pure.

Pre-norm RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU / GELU / squared ReLU. Layers have
weight arrays of their own whether they are computed unrolled or in a scan, so that parameters, optimiser state and
checkpoints are the same for both. Nothing here knows a mesh: every parameter carries logical axis names,
`scaling/engine/sharding.py` maps those onto devices, and how things are computed stands in an `Implementation`.

Letters: B batch, T time, D model width, F feed-forward width, H query heads, G key/value heads, J query heads per
key/value head, K head width, V vocabulary, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import causal_attention
from models.config import ModelConfig
from models.implementation import Implementation
from models.loss import head_loss, token_losses
from models.parametrization import embedding_multiplier, multipliers, rule
from models.product import product

Params = Any
DEFAULT = Implementation()
REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Transformer(nn.Module):
    """tokens_BT (int32) -> logits_BTV (float32). Products run in `dtype`, parameters and norms stay float32."""

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    how: Implementation = DEFAULT

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD, w_DV = self.hidden(tokens_BT)
        return logits(self.config, self.how, x_BTD, w_DV)

    @nn.compact
    def hidden(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_BTD, w_DV): the last hidden layer after its norm, and the head that makes logits of it, in `dtype`."""
        c, constrain = self.config, self.how.constrain
        # Unit-scale embeddings; a tied head wants 1/sqrt(D), so the embedding is then scaled up on the way in.
        std = (c.d_model**-0.5 if c.tied else 1.0) * rule(c, "embed").init
        embed_VD = self.param("embed", logical(normal(std), "vocab", "embed"), (c.vocab_size, c.d_model))
        x_BTD = embed_VD[tokens_BT].astype(self.dtype)
        if c.tied:
            x_BTD = x_BTD * embedding_multiplier(c)
        x_BTD = constrain(x_BTD, "batch", "time", None)
        x_BTD = self.layers(x_BTD, *rotary_angles(tokens_BT.shape[1], c.head_dim, c.rope_theta))
        x_BTD = RMSNorm("embed", name="norm_out")(x_BTD)
        if c.tied:
            w_DV = embed_VD.T
        else:
            w_DV = self.param("head", logical(nn.initializers.zeros, "embed", "vocab"), (c.d_model, c.vocab_size))
        return x_BTD, w_DV.astype(self.dtype)

    def layers(self, x_BTD: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
        c = self.config
        names = [f"block_{i}" for i in range(c.n_layers)]
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            for name in names:
                x_BTD = Block(c, self.dtype, self.how, name=name)(x_BTD, cos_TK, sin_TK)
            return x_BTD
        block = Block(c, self.dtype, self.how, parent=None)

        def one(x_BTD: jax.Array, params: Params) -> jax.Array:
            return block.apply({"params": params}, x_BTD, cos_TK, sin_TK)

        if self.how.remat != "none":
            one = jax.checkpoint(one, policy=REMAT[self.how.remat], prevent_cse=self.how.layers == "unrolled")
        params = [self.variables["params"][name] for name in names]
        if self.how.layers == "unrolled":
            return functools.reduce(one, params, x_BTD)
        # Stacked here and not in the state: in the dtype of the products, one copy a step, and the optimiser and the
        # checkpoints know nothing of it.
        stacked = jax.tree.map(lambda *w: jnp.stack([x.astype(self.dtype) if x.ndim > 1 else x for x in w]), *params)
        return jax.lax.scan(lambda x, layer: (one(x, layer), None), x_BTD, stacked)[0]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)). Both outputs start at zero."""

    config: ModelConfig
    dtype: jnp.dtype
    how: Implementation

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
        residual = multipliers(self.config).residual
        new_BTD = self.attention(RMSNorm("embed", name="norm_attention")(x_BTD), cos_TK, sin_TK)
        x_BTD = x_BTD + scaled(new_BTD, residual)
        new_BTD = self.feed_forward(RMSNorm("embed", name="norm_feed_forward")(x_BTD))
        return x_BTD + scaled(new_BTD, residual)

    def attention(self, x_BTD: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
        c = self.config
        B, T, D = x_BTD.shape
        G, J, K = c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim
        # One product for queries, keys and values; grouped by key/value head, so that heads shard together.
        w_DGNK = self.param(
            "qkv", logical(normal(D**-0.5), "embed", "kv_heads", "qkv", "head_dim"), (D, G, J + 2, K)
        ).astype(self.dtype)
        qkv_BTGNK = matmul(x_BTD, w_DGNK, self.how)
        self.sow("intermediates", "qkv", qkv_BTGNK)
        q_BTGJK, k_BTG1K, v_BTG1K = jnp.split(qkv_BTGNK, [J, J + 1], axis=3)
        k_BTGK, v_BTGK = k_BTG1K[..., 0, :], v_BTG1K[..., 0, :]
        if c.qk_norm:
            q_BTGJK = RMSNorm("head_dim", name="norm_q")(q_BTGJK)
            k_BTGK = RMSNorm("head_dim", name="norm_k")(k_BTGK)
        q_BTGJK = rotate(q_BTGJK, cos_TK[:, None, None], sin_TK[:, None, None])
        k_BTGK = rotate(k_BTGK, cos_TK[:, None], sin_TK[:, None])
        q_BTGJK = scaled(q_BTGJK, multipliers(c).attention)
        out_BTGJK = causal_attention(q_BTGJK, k_BTGK, v_BTGK, self.how)
        w_GJKD = self.param(
            "attention_out",
            logical(nn.initializers.zeros, "kv_heads", "q_per_kv", "head_dim", "embed"),
            (G, J, K, D),
        ).astype(self.dtype)
        return matmul(out_BTGJK.reshape(B, T, G * J * K), w_GJKD.reshape(G * J * K, D), self.how)

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, F = c.d_model, c.d_ff
        n_in = 2 if c.activation == "swiglu" else 1
        w_DNF = self.param("up", logical(normal(D**-0.5), "embed", "gate", "mlp"), (D, n_in, F)).astype(self.dtype)
        h_BTNF = matmul(x_BTD, w_DNF, self.how)
        self.sow("intermediates", "up", h_BTNF)
        match c.activation:
            case "swiglu":
                h_BTF = nn.silu(h_BTNF[..., 0, :]) * h_BTNF[..., 1, :]
            case "gelu":
                h_BTF = nn.gelu(h_BTNF[..., 0, :])
            case "relu2":
                h_BTF = jnp.square(nn.relu(h_BTNF[..., 0, :]))
        w_FD = self.param("down", logical(nn.initializers.zeros, "mlp", "embed"), (F, D)).astype(self.dtype)
        return matmul(h_BTF, w_FD, self.how)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (1910.07467)."""

    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (normed * scale).astype(x.dtype)


def logits(config: ModelConfig, how: Implementation, x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
    """logits_BTV, float32, soft-capped where the model is."""
    logits_BTV = scaled(matmul(x_BTD, w_DV, how).astype(jnp.float32), multipliers(config).logits)
    if config.logit_softcap:
        logits_BTV = config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap)
    return logits_BTV


def scaled(x: jax.Array, by: float) -> jax.Array:
    """by * x, and nothing at all where by is 1, so that a model without multipliers keeps its program."""
    return x if by == 1.0 else (x * by).astype(x.dtype)


def matmul(x_BTX: jax.Array, w: jax.Array, how: Implementation) -> jax.Array:
    """x [B, T, X] times w [X, ...] -> [B, T, ...], as one two-dimensional product."""
    B, T, X = x_BTX.shape
    times = product if how.transpose_gradients else jnp.matmul
    return times(x_BTX.reshape(B * T, X), w.reshape(X, -1)).reshape(B, T, *w.shape[1:])


def rotary_angles(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * theta^(-2i/K), each [T, K/2], float32 (RoFormer, 2104.09864 equation 15)."""
    frequency_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_TK = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency_K
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i+K/2}) of the last axis by the given angles; dtype of x is kept."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def logical(initializer: Callable, *axes: str) -> Callable:
    """An initializer whose array carries the names of its logical axes."""
    return nn.with_logical_partitioning(initializer, axes)


def normal(std: float) -> Callable:
    return nn.initializers.normal(std)


def init(config: ModelConfig, key: jax.Array, boxed: bool = False) -> Params:
    """Fresh float32 parameters as a plain nested dict (boxed: each array in its box of logical axis names)."""
    variables = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))
    return variables["params"] if boxed else nn.unbox(variables["params"])


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> jax.Array:
    """logits_BTV, float32."""
    return Transformer(config, dtype, how).apply({"params": params}, tokens_BT)


def next_token_loss(
    config: ModelConfig,
    params: Params,
    tokens_BU: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of predicting tokens[:, 1:] from tokens[:, :-1] (U = T + 1), in nats, float32.

    Returns (loss_BT, log_z_BT): the loss per token, and log of the partition function, for z-loss.
    """
    return token_losses(apply(config, params, tokens_BU[:, :-1], dtype, how), tokens_BU[:, 1:])


def mean_loss(
    config: ModelConfig,
    params: Params,
    tokens_BU: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
    """(objective, loss): means over all tokens in nats; the objective, to be differentiated, has z-loss added."""
    x_BTD, w_DV = Transformer(config, dtype, how).apply({"params": params}, tokens_BU[:, :-1], method="hidden")
    logits_of = functools.partial(logits, config, how)
    objective, loss = head_loss(config, how, logits_of, x_BTD, w_DV, tokens_BU[:, 1:])
    return objective / tokens_BU[:, 1:].size, loss / tokens_BU[:, 1:].size
