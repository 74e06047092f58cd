"""Causal attention, four ways: softmax(q k / sqrt(K)) v over the positions up to one's own, softmax in float32.

All take q_BTGJK, k_BTGK, v_BTGK and give out_BTGJK. Letters: B batch, T time (S: the time attended to), G key/value
heads, J query heads per key/value head, K head width, X the queries of one product, J x T of them or a block.
"""

import jax
import jax.numpy as jnp

from models.implementation import Implementation
from models.matmul import cpu_matmul

MASKED = -1e30  # finite, so that a fully masked row gives no NaN
BLOCK = 64  # queries: measured best of 32, 64, 128 at T = 128 and 256 on a Zen 3 core
MOST_BLOCKS = 16  # bounds the size of the program at large T


def causal_attention(q_BTGJK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, how: Implementation) -> jax.Array:
    match how.attention:
        case "plain":
            return plain(q_BTGJK, k_BTGK, v_BTGK, how)
        case "blocked":
            return plain(q_BTGJK, k_BTGK, v_BTGK, how, max(BLOCK, -(-q_BTGJK.shape[1] // MOST_BLOCKS)))
        case "cudnn":
            return fused(q_BTGJK, k_BTGK, v_BTGK, "cudnn")
        case "splash":
            q_axes = ("batch", None, "kv_heads", None, None)
            kv_axes = ("batch", None, "kv_heads", None)
            return how.per_device(splash, (q_axes, kv_axes, kv_axes), q_axes)(q_BTGJK, k_BTGK, v_BTGK)


def plain(
    q_BTGJK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, how: Implementation, block: int | None = None
) -> jax.Array:
    """Masked products; with `block`, so many queries at a time, each block with the keys that it may see and no others.

    Heads are moved in front of time and the J queries of a group share one product, so that XLA's CPU backend sees
    plain batched matrix products. Weights are normalised after they met the values, on K numbers a row and not S.
    """
    times = cpu_matmul if how.transpose_gradients else jnp.matmul
    B, T, G, J, K = q_BTGJK.shape
    q_BGTJK = (q_BTGJK * K**-0.5).astype(q_BTGJK.dtype).transpose(0, 2, 1, 3, 4)
    k_BGSK, v_BGSK = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)
    outs = []
    for start in range(0, T, block or T):
        end = min(start + (block or T), T)
        q_BGXK = q_BGTJK[:, :, start:end].reshape(B, G, (end - start) * J, K)
        logits_BGXS = times(q_BGXK, k_BGSK[:, :, :end].swapaxes(2, 3)).astype(jnp.float32)
        causal_XS = jnp.repeat(jnp.arange(start, end), J)[:, None] >= jnp.arange(end)
        logits_BGXS = jnp.where(causal_XS, logits_BGXS, MASKED)
        highest_BGX1 = jax.lax.stop_gradient(logits_BGXS.max(-1, keepdims=True))
        weights_BGXS = jnp.exp(logits_BGXS - highest_BGX1)
        total_BGX1 = weights_BGXS.sum(-1, keepdims=True)
        out_BGXK = times(weights_BGXS.astype(v_BGSK.dtype), v_BGSK[:, :, :end]) / total_BGX1
        outs.append(out_BGXK.astype(q_BTGJK.dtype).reshape(B, G, end - start, J, K))
    return jnp.concatenate(outs, axis=2).transpose(0, 2, 1, 3, 4)


def cached_attention(q_BTGJK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """out_BTGJK: each query over the slots that it sees.

    Plain batched products with B and G in front: of the layouts tried, the only one that XLA's CPU backend reads at the
    speed of memory.
    """
    B, T, G, J, K = q_BTGJK.shape
    q_BGXK = (q_BTGJK * K**-0.5).astype(q_BTGJK.dtype).transpose(0, 2, 1, 3, 4).reshape(B, G, T * J, K)
    logits_BGXS = jnp.einsum("bgxk,bgsk->bgxs", q_BGXK, k_BGSK).astype(jnp.float32)
    seen_B1XS = jnp.repeat(seen_BTS, J, axis=1)[:, None]
    weights_BGXS = jax.nn.softmax(jnp.where(seen_B1XS, logits_BGXS, MASKED), axis=-1)
    out_BGXK = jnp.einsum("bgxs,bgsk->bgxk", weights_BGXS.astype(v_BGSK.dtype), v_BGSK)
    return out_BGXK.reshape(B, G, T, J, K).transpose(0, 2, 1, 3, 4)


def fused(q_BTGJK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, implementation: str | None) -> jax.Array:
    """`jax.nn.dot_product_attention`: with "cudnn", NVIDIA's fused kernel (bfloat16 or float16, T even)."""
    B, T, G, J, K = q_BTGJK.shape
    q_BTHK = q_BTGJK.reshape(B, T, G * J, K)
    out = jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation=implementation)
    return out.reshape(B, T, G, J, K)


def splash(q_BTGJK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, interpret: bool = False) -> jax.Array:
    """Pallas splash attention (TPU), which skips the masked blocks; `interpret` runs it, slowly, on any backend."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, G, J, K = q_BTGJK.shape
    mask = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(G * J)])
    attend = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, interpret=interpret)
    q_BHTK = (q_BTGJK * K**-0.5).astype(q_BTGJK.dtype).reshape(B, T, G * J, K).transpose(0, 2, 1, 3)
    k_BHTK, v_BHTK = (jnp.repeat(x, J, axis=2).transpose(0, 2, 1, 3) for x in (k_BTGK, v_BTGK))
    return jax.vmap(attend)(q_BHTK, k_BHTK, v_BHTK).transpose(0, 2, 1, 3).reshape(B, T, G, J, K)
