"""Decoding with a cache is the full forward pass: of every model option, of prompts of any lengths, however cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decode, transformer
from models.config import ModelConfig, replace
from models.implementation import Implementation

TINY = ModelConfig(vocab_size=17, d_model=16, n_layers=2, n_heads=4)
VARIANTS = {
    "plain": TINY,
    "grouped": replace(TINY, n_kv_heads=2),
    "multi-query": replace(TINY, n_kv_heads=1),
    "no qk_norm": replace(TINY, qk_norm=False),
    "tied": replace(TINY, tied=True),
    "softcap": replace(TINY, logit_softcap=2.0),
    "gelu": replace(TINY, activation="gelu"),
    "relu2": replace(TINY, activation="relu2"),
    "theta": replace(TINY, rope_theta=100.0),
    "mup": replace(TINY, parametrization="mup", base_width=8, base_head_dim=2),
    "mup tied": replace(TINY, parametrization="mup", base_width=8, tied=True),
    "completep": replace(TINY, parametrization="completep", base_width=8, base_depth=1),
    "all": replace(
        TINY, n_kv_heads=2, tied=True, logit_softcap=3.0, activation="relu2", parametrization="completep", base_depth=1
    ),
}
HOW = {
    "plain": Implementation(),
    "blocked": Implementation(attention="blocked"),
    "scanned": Implementation(layers="scanned"),
    "scanned, remat": Implementation(layers="scanned", remat="full"),
    "transposing": Implementation(transpose_gradients=True),
}
LENGTHS = np.array([1, 7, 4, 5])
STEPS = 6

prefill = jax.jit(decode.prefill, static_argnums=(0, 4, 5, 6))
step = jax.jit(decode.step, static_argnums=(0, 4, 5))
extend = jax.jit(decode.extend, static_argnums=(0, 5, 6))
apply = jax.jit(transformer.apply, static_argnums=(0, 3, 4))


@functools.cache
def noisy(config):
    """Parameters away from their zeros, so that every part of the model acts."""
    params = transformer.init(config, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def sequences(n=4, length=16):
    return np.asarray(jax.random.randint(jax.random.key(0), (n, length), 0, 17))


def padded(x, lengths, to):
    """The first so many tokens of each row; what stands in the padding must not matter, so it is no zero."""
    return np.where(np.arange(to) < lengths[:, None], x[:, :to], 16)


def decoded(config, how, x, lengths, to=8, slots=16):
    """logits [STEPS + 1, B, V]: after the prompts, then after each token that follows."""
    params = noisy(config)
    logits_BV, cache = prefill(config, params, padded(x, lengths, to), jnp.asarray(lengths), slots, jnp.float32, how)
    out = [logits_BV]
    for i in range(STEPS):
        logits_BV, cache = step(config, params, x[np.arange(len(x)), lengths + i], cache, jnp.float32, how)
        out.append(logits_BV)
    np.testing.assert_array_equal(cache.length_B, lengths + STEPS)
    return np.stack(out)


def wanted(config, x, lengths, how=Implementation()):  # noqa: B008
    """The same of one full pass over each whole sequence."""
    full = np.asarray(apply(config, noisy(config), x, jnp.float32, how))
    return np.stack([full[np.arange(len(x)), lengths - 1 + i] for i in range(STEPS + 1)])


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_steps_are_the_full_pass(name):
    """Prompts of 1, 7, 4 and 5 tokens side by side, then six steps, to 1e-5 of logits of order 1, in float32.

    If this fails, a model that is asked for its next token is not the model that was trained.
    """
    config, x = VARIANTS[name], sequences()
    got, full = decoded(config, HOW["plain"], x, LENGTHS), wanted(config, x, LENGTHS)
    assert np.abs(full).max() > 0.1
    np.testing.assert_allclose(got, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HOW)
def test_however_it_is_computed_the_logits_are_the_same(name):
    """A run that was trained with layers scanned or recomputed is decoded all the same."""
    config, x = VARIANTS["all"], sequences()
    got, full = decoded(config, HOW[name], x, LENGTHS), wanted(config, x, LENGTHS, HOW[name])
    np.testing.assert_allclose(got, full, rtol=1e-5, atol=1e-5)


def test_a_sequence_does_not_see_its_neighbours_or_its_padding():
    """Alone, with more padding or with more slots: the same logits to rounding."""
    config, x = VARIANTS["grouped"], sequences()
    together = decoded(config, HOW["plain"], x, LENGTHS)
    for b in range(len(x)):
        alone = decoded(config, HOW["plain"], x[b : b + 1], LENGTHS[b : b + 1], to=11, slots=29)
        np.testing.assert_allclose(alone[:, 0], together[:, b], rtol=1e-5, atol=1e-5)


def test_a_cache_is_forked_and_grown():
    """Prompt 1 continued in two ways and prompt 0 in one, in a cache that gets room on the way."""
    config, x, index = VARIANTS["grouped"], sequences(2), np.array([1, 0, 1])
    params, lengths = noisy(config), np.array([3, 6])
    _, cache = prefill(config, params, padded(x, lengths, 6), jnp.asarray(lengths), 6, jnp.float32, Implementation())
    cache = decode.take(decode.grow(cache, 9), index)
    more = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    logits_BTV, cache = extend(config, params, more, cache, None, jnp.float32, Implementation())
    for i, b in enumerate(index):
        whole = np.concatenate([x[b, : lengths[b]], more[i]])
        full = apply(config, params, whole[None], jnp.float32, Implementation())[0]
        np.testing.assert_allclose(logits_BTV[i], full[lengths[b] :], rtol=1e-5, atol=1e-5)


def test_tokens_of_several_counts_are_added_at_once():
    """Two of the three, then all: the slot that was left empty is never seen."""
    config, x = VARIANTS["plain"], sequences(2)
    params = noisy(config)
    cache = transformer.empty_cache(config, 2, 8)
    _, cache = extend(config, params, x[:, :3], cache, jnp.array([2, 3]), jnp.float32, Implementation())
    following = np.stack([x[0, 2:6], x[1, 3:7]])
    logits_BTV, cache = extend(config, params, following, cache, None, jnp.float32, Implementation())
    full = apply(config, params, x, jnp.float32, Implementation())
    np.testing.assert_allclose(logits_BTV, np.stack([full[0, 2:6], full[1, 3:7]]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.length_B, [6, 7])
