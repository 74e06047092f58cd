"""A decoder-only transformer in Flax linen, functional: `init` gives a tree of arrays, `apply` is pure.

Pre-norm RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU / GELU / squared ReLU. Layers are
unrolled, with separate weight arrays, which XLA's CPU backend runs faster than a scan over stacked weights. Nothing
here knows a mesh: every parameter carries logical axis names, and `scaling/sharding.py` maps those onto devices.

Letters: B batch, T time (S: the time attended to), D model width, F feed-forward width, H query heads, G key/value
heads, J query heads per key/value head, K head width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import ModelConfig

Params = Any
MASKED = -1e30  # finite, so that a fully masked row gives no NaN


class Transformer(nn.Module):
    """tokens_BT (int32) -> logits_BTV (float32). Products run in `dtype`, parameters and norms stay float32."""

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        c = self.config
        # Unit-scale embeddings; a tied head wants 1/sqrt(D), so the embedding is then scaled up on the way in.
        std = c.d_model**-0.5 if c.tied else 1.0
        embed_VD = self.param("embed", logical(normal(std), "vocab", "embed"), (c.vocab_size, c.d_model))
        x_BTD = embed_VD[tokens_BT].astype(self.dtype)
        if c.tied:
            x_BTD = x_BTD * c.d_model**0.5
        cos_TK, sin_TK = rotary_angles(tokens_BT.shape[1], c.head_dim, c.rope_theta)
        for i in range(c.n_layers):
            x_BTD = Block(c, self.dtype, name=f"block_{i}")(x_BTD, cos_TK, sin_TK)
        x_BTD = RMSNorm("embed", name="norm_out")(x_BTD)
        if c.tied:
            w_DV = embed_VD.T
        else:
            w_DV = self.param("head", logical(nn.initializers.zeros, "embed", "vocab"), (c.d_model, c.vocab_size))
        logits_BTV = matmul(x_BTD, w_DV.astype(self.dtype)).astype(jnp.float32)
        if c.logit_softcap:
            logits_BTV = c.logit_softcap * jnp.tanh(logits_BTV / c.logit_softcap)
        return logits_BTV


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)). Both outputs start at zero."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(RMSNorm("embed", name="norm_attention")(x_BTD), cos_TK, sin_TK)
        return x_BTD + self.feed_forward(RMSNorm("embed", name="norm_feed_forward")(x_BTD))

    def attention(self, x_BTD: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
        c = self.config
        B, T, D = x_BTD.shape
        G, J, K = c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim
        # One product for queries, keys and values; grouped by key/value head, so that heads shard together.
        w_DGNK = self.param(
            "qkv", logical(normal(D**-0.5), "embed", "kv_heads", "qkv", "head_dim"), (D, G, J + 2, K)
        ).astype(self.dtype)
        qkv_BTGNK = matmul(x_BTD, w_DGNK)
        q_BTGJK, k_BTGK, v_BTGK = qkv_BTGNK[..., :J, :], qkv_BTGNK[..., J, :], qkv_BTGNK[..., J + 1, :]
        if c.qk_norm:
            q_BTGJK = RMSNorm("head_dim", name="norm_q")(q_BTGJK)
            k_BTGK = RMSNorm("head_dim", name="norm_k")(k_BTGK)
        q_BTGJK = rotate(q_BTGJK, cos_TK[:, None, None], sin_TK[:, None, None])
        k_BTGK = rotate(k_BTGK, cos_TK[:, None], sin_TK[:, None])
        out_BTGJK = causal_attention(q_BTGJK, k_BTGK, v_BTGK)
        w_GJKD = self.param(
            "attention_out",
            logical(nn.initializers.zeros, "kv_heads", "q_per_kv", "head_dim", "embed"),
            (G, J, K, D),
        ).astype(self.dtype)
        return matmul(out_BTGJK.reshape(B, T, G * J * K), w_GJKD.reshape(G * J * K, D))

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, F = c.d_model, c.d_ff
        n_in = 2 if c.activation == "swiglu" else 1
        w_DNF = self.param("up", logical(normal(D**-0.5), "embed", "gate", "mlp"), (D, n_in, F)).astype(self.dtype)
        h_BTNF = matmul(x_BTD, w_DNF)
        match c.activation:
            case "swiglu":
                h_BTF = nn.silu(h_BTNF[..., 0, :]) * h_BTNF[..., 1, :]
            case "gelu":
                h_BTF = nn.gelu(h_BTNF[..., 0, :])
            case "relu2":
                h_BTF = jnp.square(nn.relu(h_BTNF[..., 0, :]))
        w_FD = self.param("down", logical(nn.initializers.zeros, "mlp", "embed"), (F, D)).astype(self.dtype)
        return matmul(h_BTF, w_FD)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (1910.07467)."""

    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (normed * scale).astype(x.dtype)


def causal_attention(q_BTGJK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(K)) v over the positions up to one's own -> out_BTGJK; softmax in float32.

    Heads are moved in front of time and the J queries of a group share one product, so that XLA's CPU backend sees
    plain batched matrix products.
    """
    B, T, G, J, K = q_BTGJK.shape
    q_BGXK = q_BTGJK.transpose(0, 2, 3, 1, 4).reshape(B, G, J * T, K)
    k_BGSK, v_BGSK = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)
    logits_BGXS = jnp.einsum("bgxk,bgsk->bgxs", q_BGXK, k_BGSK).astype(jnp.float32) * K**-0.5
    causal_XS = jnp.tile(jnp.tril(jnp.ones((T, T), bool)), (J, 1))
    weights_BGXS = nn.softmax(jnp.where(causal_XS, logits_BGXS, MASKED)).astype(v_BGSK.dtype)
    out_BGXK = jnp.einsum("bgxs,bgsk->bgxk", weights_BGXS, v_BGSK)
    return out_BGXK.reshape(B, G, J, T, K).transpose(0, 3, 1, 2, 4)


def matmul(x_BTX: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, X] times w [X, ...] -> [B, T, ...], as one two-dimensional product."""
    B, T, X = x_BTX.shape
    return (x_BTX.reshape(B * T, X) @ w.reshape(X, -1)).reshape(B, T, *w.shape[1:])


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


def apply(config: ModelConfig, params: Params, tokens_BT: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """logits_BTV, float32."""
    return Transformer(config, dtype).apply({"params": params}, tokens_BT)


def next_token_loss(
    config: ModelConfig, params: Params, tokens_BU: jax.Array, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of predicting tokens[:, 1:] from tokens[:, :-1] (U = T + 1), in nats, float32.

    Returns (loss_BT, log_z_BT): the loss per token, and log of the partition function, for z-loss.
    """
    logits_BTV = apply(config, params, tokens_BU[:, :-1], dtype)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, tokens_BU[:, 1:, None], axis=-1)[..., 0]
    return log_z_BT - target_BT, log_z_BT
