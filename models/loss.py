"""Cross-entropy of the next token over the vocabulary, whole or in chunks of positions, in nats, float32."""

import functools

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.implementation import Implementation


def token_losses(logits_BTV: jax.Array, target_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss_BT, log_z_BT): -log softmax(logits)[target], and log of the partition function, for z-loss."""
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return log_z_BT - target_BT, log_z_BT


def sums(
    logits_BTV: jax.Array, target_BT: jax.Array, z_loss: float, weight_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(objective, loss), both summed over the tokens, weighted where weights are given; the objective adds
    z_loss log(Z)^2 (PaLM, 2204.02311).
    """
    loss_BT, log_z_BT = token_losses(logits_BTV, target_BT)
    if weight_BT is None:
        loss = jnp.sum(loss_BT)
        return loss + z_loss * jnp.sum(jnp.square(log_z_BT)), loss
    objective_BT = loss_BT + z_loss * jnp.square(log_z_BT)
    return jnp.sum(objective_BT * weight_BT), jnp.sum(loss_BT * weight_BT)


def head_loss(
    config: ModelConfig,
    how: Implementation,
    logits_of,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(objective, loss) summed over the tokens, from the last hidden layer; `logits_of(x_BTD, w_DV) -> logits_BTV`.

    In `chunks_of` parts.
    """
    chunks = chunks_of(how, x_BTD)
    if chunks == 1:
        return sums(logits_of(x_BTD, w_DV), target_BT, config.z_loss, weight_BT)
    w_DV = how.constrain(w_DV, None, "vocab")  # gathered once, not once a chunk
    return in_chunks(logits_of, config.z_loss, chunks, x_BTD, w_DV, target_BT, weight_BT)


def head_token_losses(
    how: Implementation, logits_of, x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`token_losses` from the last hidden layer, in `chunks_of` parts. Not for training: gradients keep them all."""
    chunks = chunks_of(how, x_BTD)
    if chunks == 1:
        return token_losses(logits_of(x_BTD, w_DV), target_BT)
    w_DV = how.constrain(w_DV, None, "vocab")
    parts = jax.lax.map(lambda part: token_losses(logits_of(part[0], w_DV), part[1]), split((x_BTD, target_BT), chunks))
    return merge(parts)


def chunks_of(how: Implementation, x_BTD: jax.Array) -> int:
    """`how.loss_chunks` where that divides T, else the next smaller number that does."""
    return next(n for n in range(min(how.loss_chunks, x_BTD.shape[1]), 0, -1) if x_BTD.shape[1] % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def in_chunks(logits_of, z_loss: float, chunks: int, x_BTD, w_DV, target_BT, weight_BT):
    """`sums` with the logits of one chunk at a time. The objective alone can be differentiated.

    The gradients are made on the way forward, while the chunk's logits are at hand: nothing is computed twice.
    """

    def body(total, chunk):
        x, target, weight = chunk
        new = sums(logits_of(x, w_DV), target, z_loss, weight)
        return (total[0] + new[0], total[1] + new[1]), None

    return jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), split((x_BTD, target_BT, weight_BT), chunks))[0]


def forward(logits_of, z_loss, chunks, x_BTD, w_DV, target_BT, weight_BT):
    def body(carry, chunk):
        objective, loss, dw = carry
        x, target, weight = chunk
        of = lambda x, w: sums(logits_of(x, w), target, z_loss, weight)  # noqa: E731
        (new_objective, new_loss), (dx, new_dw) = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(x, w_DV)
        return (objective + new_objective, loss + new_loss, dw + new_dw.astype(jnp.float32)), dx

    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(w_DV.shape, jnp.float32))
    (objective, loss, dw_DV), dx = jax.lax.scan(body, start, split((x_BTD, target_BT, weight_BT), chunks))
    return (objective, loss), (merge(dx), dw_DV.astype(w_DV.dtype))


def backward(logits_of, z_loss, chunks, gradients, cotangents):
    dx_BTD, dw_DV = gradients
    scale = cotangents[0]
    return (dx_BTD * scale).astype(dx_BTD.dtype), (dw_DV * scale).astype(dw_DV.dtype), None, None


in_chunks.defvjp(forward, backward)


def split(arrays, chunks: int):
    """A tree of [B, T, ...] -> [chunks, B, T / chunks, ...]: every so many-th position, so that a sharded T stays
    sharded.
    """

    def cut(x_BT: jax.Array) -> jax.Array:
        B, T = x_BT.shape[:2]
        return jnp.moveaxis(x_BT.reshape(B, T // chunks, chunks, *x_BT.shape[2:]), 2, 0)

    return jax.tree.map(cut, arrays)


def merge(arrays):
    """The inverse of `split`."""

    def joined(x: jax.Array) -> jax.Array:
        chunks, B, part = x.shape[:3]
        return jnp.moveaxis(x, 0, 2).reshape(B, part * chunks, *x.shape[3:])

    return jax.tree.map(joined, arrays)
