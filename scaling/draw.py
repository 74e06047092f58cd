"""Choosing the next token from logits, compiled: greedy, by a draw, or by a draw from a part of the vocabulary.

A draw is the inverse of the distribution function at one uniform number a token: Gumbel noise would want one for every
token of the vocabulary, which costs more than the model where that is small. Letters: B sequences, V vocabulary.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

EXACT = jax.lax.Precision.HIGHEST  # sums by products with ones: an accelerator would round them to fewer bits


class Knobs(NamedTuple):
    """Numbers of a `Sampling`, none of which changes the program."""

    temperature: jax.Array
    top_k: jax.Array  #: V for all
    top_p: jax.Array


def choose(mode: str, logits_BV: jax.Array, u_B: jax.Array, knobs: Knobs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens_B, their log-probability by the model, and by what they were drawn from); u_B uniform in [0, 1).

    mode: greedy, whole or cut (see `scaling.generate.Sampling`).
    """
    if mode == "greedy":
        token_B = jnp.argmax(logits_BV, axis=-1)
        return token_B, log_probability(logits_BV, token_B), jnp.zeros_like(u_B)
    z_BV = logits_BV / knobs.temperature
    if mode == "cut":
        z_BV = cut(z_BV, knobs)
    p_BV = jnp.exp(z_BV - z_BV.max(-1, keepdims=True))
    token_B = pick(p_BV, u_B)
    drawn_B = jnp.log(at(p_BV, token_B)) - jnp.log(p_BV.sum(-1))
    return token_B, log_probability(logits_BV, token_B), drawn_B


def cut(z_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Logits in which what top_k and then top_p leave out is -inf. Tokens as probable as the last that stays, stay."""
    z_BV = above(z_BV, jnp.ones_like(z_BV), jnp.broadcast_to(knobs.top_k.astype(jnp.float32), len(z_BV)))
    p_BV = jnp.exp(z_BV - z_BV.max(-1, keepdims=True))
    return above(z_BV, p_BV, knobs.top_p * p_BV.sum(-1))


def above(z_BV: jax.Array, weight_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """z, largest first, down to where the weights come to what is wanted; -inf for the rest.

    By bisection over the 2^32 floats: a sort would cost ten times as much on a CPU.
    """
    bits_BV = jax.lax.bitcast_convert_type(z_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # whole numbers in the order of the floats

    def halve(_: int, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = span  # down to low it is enough, down to high it is not
        mid_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, without overflow
        enough_B = jnp.where(order_BV >= mid_B[:, None], weight_BV, 0.0).sum(-1) >= wanted_B
        return jnp.where(enough_B, mid_B, low_B), jnp.where(enough_B, high_B, mid_B)

    low_B, _ = jax.lax.fori_loop(0, 32, halve, (order_BV.min(-1), order_BV.max(-1) + 1))
    return jnp.where(order_BV >= low_B[:, None], z_BV, -jnp.inf)


def pick(p_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The index whose part of [0, total) holds u * total, of weights p >= 0. One of weight 0 is never picked.

    In two levels, groups and then within one, so that the running sums are two small products.
    """
    B, V = p_BV.shape
    C = math.isqrt(V - 1) + 1
    p_BRC = jnp.pad(p_BV, ((0, 0), (0, -V % C))).reshape(B, -1, C)
    group_BR = p_BRC.sum(-1)
    upto_BR = running(group_BR)
    x_B = u_B * upto_BR[:, -1]
    r_B = first(group_BR, upto_BR, x_B)
    p_BC = jnp.take_along_axis(p_BRC, r_B[:, None, None], axis=1)[:, 0]
    c_B = first(p_BC, running(p_BC), x_B - (at(upto_BR, r_B) - at(group_BR, r_B)))
    return r_B * C + c_B


def running(p_BX: jax.Array) -> jax.Array:
    """Sums of the first 1, 2, ... X."""
    X = p_BX.shape[-1]
    return jnp.matmul(p_BX, jnp.triu(jnp.ones((X, X), p_BX.dtype)), precision=EXACT)


def first(p_BX: jax.Array, upto_BX: jax.Array, x_B: jax.Array) -> jax.Array:
    """The first index of positive p up to which the sum exceeds x; by rounding there may be none: then the last."""
    held_BX = p_BX > 0
    found_BX = (upto_BX > x_B[:, None]) & held_BX
    last_B = p_BX.shape[-1] - 1 - jnp.argmax(held_BX[:, ::-1], axis=-1)
    return jnp.where(found_BX.any(-1), jnp.argmax(found_BX, axis=-1), last_B)


def log_probability(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return at(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)


def at(x_BX: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BX, index_B[:, None], axis=-1)[:, 0]
