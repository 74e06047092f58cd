"""Beam search: the continuations that a model holds most probable as a whole, among those that its beam comes by.

Letters: K the beam's width, V vocabulary, T the most tokens, X stop sequences of up to W tokens, P prompt length.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import decode
from models.config import ModelConfig
from models.transformer import Cache
from scaling.generate import (
    HOW,
    NONE,
    Params,
    Samples,
    at_stop,
    begin,
    check_counts,
    checked_prompt,
    right_padded,
    stop_lengths,
    stop_rows,
)
from scaling.shapes import bucket


def beam_search(
    model: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    width: int,
    max_tokens: int = 64,
    stop: Sequence[Sequence[int]] = (),
    window: int | None = None,
) -> Samples:
    """For each prompt the `width` continuations of highest log-probability that were found, the best first.

    At each step the best `width` of all one-token continuations stay; one that came to a stop sequence stays as it is.
    Log-probabilities are summed, not divided by a length: a short one is not held back. Where there are fewer
    continuations than the beam is wide, the last are of length 0. Raises InputError as `scaling.generate.sample` does.
    """
    prompts = [checked_prompt(i, prompt, model.vocab_size, window) for i, prompt in enumerate(prompts)]
    check_counts(beam=width, max_tokens=max_tokens)
    shape = (len(prompts), width, max_tokens)
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, stopped = np.zeros(shape[:2], int), np.zeros(shape[:2], bool)
    stop_XW = stop_rows(stop, model.vocab_size)
    for i, prompt in enumerate(prompts):
        most = max_tokens if window is None else min(max_tokens, window + 1 - len(prompt))
        tokens_BP, length_B = right_padded([prompt])
        T = bucket(most, 16)
        logits_BV, cache = begin(model, tokens_BP.shape[1] + T, params, tokens_BP, length_B)
        found = jax.device_get(search(model, width, T, params, logits_BV, cache, stop_XW, np.int32(most)))
        tokens[i, :, :most], logprobs[i, :, :most] = found.tokens_KT[:, :most], found.logprobs_KT[:, :most]
        possible_K = np.isfinite(found.score_K)
        lengths[i], stopped[i] = np.where(possible_K, found.written_K, 0), found.stopped_K & possible_K
    beyond = np.arange(max_tokens) >= lengths[..., None]
    tokens[beyond], logprobs[beyond] = 0, 0
    kept = lengths - stop_lengths(tokens, lengths, stopped, stop_XW)
    return Samples(tokens, logprobs, np.zeros_like(logprobs), lengths, kept, stopped)


class Beam(NamedTuple):
    """Continuations on their way, the best first."""

    tokens_KT: jax.Array
    logprobs_KT: jax.Array
    score_K: jax.Array  #: the sum of the log-probabilities
    written_K: jax.Array
    stopped_K: jax.Array
    tail_KW: jax.Array  #: the last W tokens written


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def search(
    model: ModelConfig,
    K: int,
    T: int,
    params: Params,
    logits_BV: jax.Array,
    cache: Cache,
    stop_XW: jax.Array,
    most: jax.Array,
) -> Beam:
    """The beam after up to `most` <= T steps, from one prompt's logits and cache (B = 1)."""
    W = stop_XW.shape[1]
    first = Beam(
        tokens_KT=jnp.zeros((K, T), jnp.int32),
        logprobs_KT=jnp.zeros((K, T)),
        score_K=jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf),  # one prompt, not K alike
        written_K=jnp.zeros(K, jnp.int32),
        stopped_K=jnp.zeros(K, bool),
        tail_KW=jnp.full((K, W), NONE, jnp.int32),
    )
    V = logits_BV.shape[-1]

    def on(carry: tuple[jax.Array, Beam, Any]) -> jax.Array:
        i, beam, _ = carry
        return (i < most) & ~jnp.all(beam.stopped_K)

    def body(carry: tuple[jax.Array, Beam, Any]) -> tuple[jax.Array, Beam, Any]:
        i, beam, (logits_KV, cache) = carry
        logp_KV = jax.nn.log_softmax(logits_KV)
        # What has stopped has one continuation, itself.
        itself_V = jnp.where(jnp.arange(V) == 0, 0.0, -jnp.inf)
        score_KV = beam.score_K[:, None] + jnp.where(beam.stopped_K[:, None], itself_V, logp_KV)
        score_K, best_K = jax.lax.top_k(score_KV.reshape(-1), K)
        parent_K, token_K = best_K // V, (best_K % V).astype(jnp.int32)
        logp_K = logp_KV[parent_K, token_K]
        beam = jax.tree.map(lambda x: x[parent_K], beam)._replace(score_K=score_K)
        new_K = ~beam.stopped_K
        tail_KW = jnp.concatenate([beam.tail_KW[:, 1:], token_K[:, None]], axis=1)
        beam = Beam(
            tokens_KT=beam.tokens_KT.at[:, i].set(jnp.where(new_K, token_K, 0)),
            logprobs_KT=beam.logprobs_KT.at[:, i].set(jnp.where(new_K, logp_K, 0.0)),
            score_K=score_K,
            written_K=beam.written_K + new_K,
            stopped_K=beam.stopped_K | at_stop(tail_KW, stop_XW),
            tail_KW=jnp.where(new_K[:, None], tail_KW, beam.tail_KW),
        )
        return i + 1, beam, decode.step(model, params, token_K, decode.take(cache, parent_K), how=HOW)

    zeros_K = jnp.zeros(K, jnp.int32)
    start = jnp.int32(0), first, (logits_BV[zeros_K], decode.take(cache, zeros_K))
    return jax.lax.while_loop(on, body, start)[1]
