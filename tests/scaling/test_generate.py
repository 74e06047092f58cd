"""Sampling as an experiment: what is drawn has the model's distribution, and is the same whatever lies beside it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from scaling import draw
from scaling.beam import beam_search
from scaling.generate import CHUNK, GROWS, Sampling, sample

SMALL = ModelConfig(vocab_size=5, d_model=16, n_layers=1, n_heads=2)
apply = jax.jit(transformer.apply, static_argnums=0)


@functools.cache
def noisy(model=SMALL, scale=0.5):
    """Parameters away from their zeros, so that the next token depends on all that came before."""
    params = transformer.init(model, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


PROMPTS = [np.array(ids) for ids in ([1], [2, 3, 4], [0, 1, 2, 3, 4, 0, 1], [4, 4])]


def logprobs(prompt, written):
    """[T, V]: what the model says after the prompt and each token written, by full passes without a cache."""
    whole = np.concatenate([prompt, written])
    padded = np.pad(whole, (0, 64 - len(whole)))
    return np.asarray(jax.nn.log_softmax(apply(SMALL, noisy(), padded[None])[0]))[len(prompt) - 1 : len(whole) - 1]


def distribution(prompt, length):
    """{sequence: probability} of all continuations of that length, by full passes."""
    sequences = np.array(list(itertools.product(range(5), repeat=length)))
    whole = np.concatenate([np.tile(prompt, (len(sequences), 1)), sequences], axis=1)
    log_p = jax.nn.log_softmax(apply(SMALL, noisy(), whole))[:, len(prompt) - 1 : -1]
    of_tokens = np.take_along_axis(np.asarray(log_p, np.float64), sequences[..., None], axis=-1)[..., 0]
    return {tuple(s): float(p) for s, p in zip(sequences.tolist(), np.exp(of_tokens.sum(1)), strict=True)}


@pytest.mark.parametrize("V", [1, 2, 5, 16, 17, 300])
def test_a_pick_has_the_weights_as_its_probabilities(V):
    """Over an even grid of u each token comes as often as its weight says, to one count at each of its two edges."""
    rng = np.random.default_rng(V)
    p = rng.exponential(size=V) * (rng.random(V) < 0.7)
    p[rng.integers(V)] += 1.0
    M = 4_000
    u = (np.arange(M) + 0.5) / M
    got = np.asarray(draw.pick(jnp.tile(jnp.asarray(p, jnp.float32), (M, 1)), jnp.asarray(u, jnp.float32)))
    counts = np.bincount(got, minlength=V)
    np.testing.assert_allclose(counts, M * p / p.sum(), atol=2)
    assert np.all(np.diff(got) >= 0), "the inverse of a distribution function does not fall"
    assert np.all(p[got] > 0)


def test_the_ends_of_the_unit_interval_pick_what_has_weight():
    p = jnp.array([[0.0, 3.0, 0.0, 1.0, 0.0]] * 3)
    u = jnp.array([0.0, 1 - 2.0**-24, 0.5])
    assert draw.pick(p, u).tolist() == [1, 3, 1]


@pytest.mark.parametrize("seed", range(4))
def test_the_cut_is_that_of_its_definition(seed):
    """Against a sort: the k largest, then of those the fewest whose share of the sum reaches p."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(6, 40)).astype(np.float32) * 2
    for k, p in [(40, 1.0), (1, 1.0), (7, 1.0), (40, 0.9), (40, 0.05), (12, 0.6), (10_000, 1e-6)]:
        got = np.isfinite(draw.cut(jnp.asarray(z), Sampling(top_k=k, top_p=p).knobs(40)))
        for row, kept in zip(z.astype(np.float64), got, strict=True):
            order = np.argsort(-row)[:k]
            share = np.exp(row[order]) / np.exp(row[order]).sum()
            fewest = 1 + np.sum(np.cumsum(share)[:-1] < p)
            assert set(np.flatnonzero(kept)) == set(order[:fewest])


def test_equals_of_the_last_that_stays_stay():
    z = jnp.array([[1.0, 2.0, 1.0, 0.0, -0.0]])
    assert np.isfinite(draw.cut(z, Sampling(top_k=2).knobs(5))).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=3), Sampling(top_p=0.9)],
    ids=str,
)
def test_samples_have_the_distribution_of_the_model(sampling):
    """20,000 pairs of tokens against the probabilities of all 25, changed as the sampling says, by a chi-square test.

    The seed is fixed: at p < 1e-3 the sampler draws from another distribution.
    """
    prompt, n = PROMPTS[1], 20_000
    got = sample(SMALL, noisy(), [prompt], n, 2, seed=3, sampling=sampling, batch=5_000)
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(got.tokens[0].T), 1)
    expected = np.zeros((5, 5))
    first = changed(logprobs(prompt, [0])[0], sampling)
    for token in range(5):
        expected[token] = first[token] * changed(logprobs(prompt, [token, 0])[1], sampling)
    assert expected.sum() == pytest.approx(1)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert possible.sum() >= 4
    assert stats.chisquare(counts[possible], n * expected[possible]).pvalue > 1e-3
    of_tokens = np.log(np.maximum(expected, 1e-30))[tuple(got.tokens[0].T)]
    np.testing.assert_allclose(got.drawn_logprobs[0].sum(1), of_tokens, rtol=1e-4, atol=1e-4)


def changed(log_p, sampling):
    """The distribution after temperature, top_k and top_p, in NumPy."""
    p = np.exp(log_p.astype(np.float64) / sampling.temperature)
    order = np.argsort(-p)[: sampling.top_k or None]
    share = p[order] / p[order].sum()
    order = order[: 1 + np.sum(np.cumsum(share)[:-1] < sampling.top_p)]
    out = np.zeros_like(p)
    out[order] = p[order] / p[order].sum()
    return out


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(greedy=True), Sampling(temperature=0.7, top_k=3)], ids=str)
def test_log_probabilities_are_those_of_the_full_pass(sampling):
    """Of prompts of several lengths, over more steps than one call makes."""
    got = sample(SMALL, noisy(), PROMPTS, 2, CHUNK + 9, sampling=sampling)
    assert (got.lengths == CHUNK + 9).all()
    for i, j in np.ndindex(len(PROMPTS), 2):
        written = got.tokens[i, j]
        full = logprobs(PROMPTS[i], written)
        np.testing.assert_allclose(got.logprobs[i, j], full[np.arange(len(written)), written], rtol=1e-4, atol=1e-4)
        if sampling.greedy:
            np.testing.assert_array_equal(written, full.argmax(1))


def test_the_same_seed_gives_the_same_tokens_whatever_is_beside():
    """In batches of any size, on several threads, with more samples or fewer, in caches that grow or do not."""
    many = sample(SMALL, noisy(), PROMPTS, GROWS, CHUNK + 3, seed=7)
    for n, batch in [(3, 5), (1, 1)]:
        few = sample(SMALL, noisy(), PROMPTS, n, CHUNK + 3, seed=7, batch=batch)
        np.testing.assert_array_equal(few.tokens, many.tokens[:, :n])
        np.testing.assert_allclose(few.logprobs, many.logprobs[:, :n], rtol=1e-4, atol=1e-4)
    other = sample(SMALL, noisy(), PROMPTS, 3, CHUNK + 3, seed=8, batch=5)
    assert (other.tokens != many.tokens[:, :3]).mean() > 0.3
    assert (many.tokens[:, 0] != many.tokens[:, 1]).mean() > 0.3, "samples of one prompt share their randomness"


def test_a_sequence_ends_at_its_first_stop_sequence():
    """Where the free sequence has the stop first, there the stopped one ends, also across two calls."""
    stop = [[1, 2], [3, 3, 3]]
    free = sample(SMALL, noisy(), PROMPTS, 8, CHUNK + 3, seed=1)
    got = sample(SMALL, noisy(), PROMPTS, 8, CHUNK + 3, seed=1, stop=stop)
    found = set()
    for i, j in np.ndindex(len(PROMPTS), 8):
        row = free.tokens[i, j].tolist()
        ends = [(t, ids) for t in range(len(row)) for ids in stop if t >= len(ids) and row[t - len(ids) : t] == ids]
        end, ids = ends[0] if ends else (len(row), [])
        assert got.lengths[i, j] == end
        assert got.kept[i, j] == end - len(ids)
        assert got.stopped[i, j] == bool(ends)
        assert got.tokens[i, j].tolist() == row[:end] + [0] * (len(row) - end)
        assert not got.logprobs[i, j, end:].any()
        found.add(len(ids))
    assert {2, 3} <= found, "no sequence came to each stop; the test shows nothing"


def test_nothing_is_written_beyond_the_window():
    """A prompt as long as the window has one next token; a model is never given more than it was trained on."""
    got = sample(SMALL, noisy(), PROMPTS, 1, 20, window=7)
    assert got.lengths[:, 0].tolist() == [7, 5, 1, 6]
    assert not got.stopped.any()
    with pytest.raises(InputError, match="prompt 2: 7 tokens, longer than the window of 6"):
        sample(SMALL, noisy(), PROMPTS, 1, 20, window=6)


def test_a_wide_beam_finds_the_most_probable_of_all():
    """As wide as there are continuations but the last token, a beam is exhaustive; of all 125 the order is known."""
    exact = sorted(distribution(PROMPTS[1], 3).items(), key=lambda item: -item[1])
    got = beam_search(SMALL, noisy(), PROMPTS[:2], 25, 3)
    assert [tuple(row) for row in got.tokens[1].tolist()] == [s for s, _ in exact[:25]]
    np.testing.assert_allclose(np.exp(got.logprobs[1].sum(-1)), [p for _, p in exact[:25]], rtol=1e-4)


def test_a_beam_of_one_is_greedy():
    greedy = sample(SMALL, noisy(), PROMPTS, 1, 20, sampling=Sampling(greedy=True))
    beam = beam_search(SMALL, noisy(), PROMPTS, 1, 20)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_allclose(beam.logprobs, greedy.logprobs, rtol=1e-4, atol=1e-5)


def test_a_beam_keeps_what_has_stopped():
    """All continuations of up to 3 tokens, a 2 ending one: the best of them, found by enumeration."""
    ended = {}
    for tokens, p in distribution(PROMPTS[0], 3).items():
        end = tokens.index(2) + 1 if 2 in tokens else 3
        ended[tokens[:end]] = ended.get(tokens[:end], 0.0) + p
    exact = sorted(ended.items(), key=lambda item: -item[1])[:10]
    got = beam_search(SMALL, noisy(), PROMPTS[:1], 60, 3, stop=[[2]])
    for k, (tokens, p) in enumerate(exact):
        assert tuple(got.tokens[0, k, : got.lengths[0, k]]) == tokens
        assert np.exp(got.logprobs[0, k].sum()) == pytest.approx(p, rel=1e-4)
        assert got.stopped[0, k] == (tokens[-1] == 2)
        assert got.kept[0, k] == len(tokens) - (tokens[-1] == 2)


def test_a_beam_wider_than_what_there_is_says_so_by_length():
    got = beam_search(SMALL, noisy(), PROMPTS[:1], 8, 1)
    assert got.lengths[0].tolist() == [1] * 5 + [0] * 3
    assert sorted(got.tokens[0, :5, 0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "choose greedy"),
        ({"temperature": 1e-40}, "temperature = 1e-40: expected a number from 1e-06"),
        ({"temperature": 1e7}, "temperature = 10000000.0"),
        ({"temperature": -1.0}, "temperature = -1.0: expected a number from 1e-06"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0: expected a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"greedy": True, "top_k": 3}, "leave temperature, top_k and top_p out"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [np.array([], int)]}, "prompt 0: empty"),
        ({"prompts": [np.array([1]), np.array([5])]}, "prompt 1: expected tokens of 0 to 4"),
        ({"prompts": [np.array([0.5])]}, "prompt 0: expected tokens"),
        ({"n": 0}, "n = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"stop": [[]]}, "stop = "),
        ({"stop": [[7]]}, "stop = "),
    ],
)
def test_what_cannot_be_continued_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        sample(SMALL, noisy(), **({"prompts": PROMPTS} | changes))


def test_no_prompts_give_no_samples():
    assert sample(SMALL, noisy(), [], 3, 4).tokens.shape == (0, 3, 4)
