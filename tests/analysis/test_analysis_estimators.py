"""Estimators against enumeration, closed forms and planted truths."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy import stats

from analysis.errors import InputError
from analysis.estimators import (
    best_of_n,
    best_of_n_kl,
    best_weights,
    binomial_interval,
    calibration,
    mean_over_problems,
    pass_at_k,
    pass_at_k_exact,
    tilted,
)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one():
    for c in range(7):
        right = [1] * c + [0] * (6 - c)
        for k in range(1, 7):
            subsets = list(combinations(right, k))
            assert pass_at_k(6, [c], k)[0, 0] == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-14)


def test_pass_at_k_is_unbiased_for_every_k():
    """The mean over all outcomes of n tries, each weighed by its chance, is 1 - (1 - p)^k."""
    n, p = 8, 0.3
    chance = np.array([comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    ks = np.arange(1, n + 1)
    assert chance @ pass_at_k(n, np.arange(n + 1), ks) == pytest.approx(1 - (1 - p) ** ks, rel=1e-13)


def test_pass_at_k_of_a_large_pool_keeps_its_digits():
    assert pass_at_k(65_536, [1], [1, 7, 65_536])[0] == pytest.approx([1 / 65_536, 7 / 65_536, 1.0], rel=1e-12)
    assert pass_at_k([4, 9], [4, 0], 3).tolist() == [[1.0], [0.0]]


def test_exact_pass_at_k_of_rare_problems_keeps_its_digits():
    assert pass_at_k_exact([1e-12, 0.0, 1.0, 0.5], [1, 1000])[:, 1] == pytest.approx([1e-9, 0, 1, 1], rel=1e-9)


def test_the_standard_error_of_a_mean_is_that_of_repeated_samples():
    """Clustered problems: a standard error that ignored the cluster would be half as large."""
    rng, cluster = np.random.default_rng(0), np.repeat(np.arange(40), 10)
    draws = [(rng.standard_normal(40)[cluster] + rng.standard_normal(400)) for _ in range(400)]
    spread = np.std([np.mean(v) for v in draws])
    assert np.mean([mean_over_problems(v, cluster).stderr for v in draws]) == pytest.approx(spread, rel=0.1)
    assert np.mean([mean_over_problems(v).stderr for v in draws]) < 0.6 * spread


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(1)
    proxy, gold = rng.integers(0, 4, 7).astype(float), rng.standard_normal(7)  # with ties
    for n in range(1, 8):
        means = []
        for subset in map(list, combinations(range(7), n)):
            best = [i for i in subset if proxy[i] == proxy[subset].max()]
            means.append(np.mean(gold[best]))
        taken = best_of_n(proxy, gold, n).value[0]
        # Of equal proxies the mean of *all* in the pool stands for the one taken: the same on average over subsets.
        assert taken == pytest.approx(np.mean(means), abs=1e-12)


def test_the_weights_of_best_of_n_are_exact_in_a_pool_of_65536():
    M = 65_536
    for n in (1, 2, 512, 4096, M):
        weights = best_weights(M, n)
        assert weights.sum() == pytest.approx(1, rel=1e-10)
        for i in (M, M - 1, M // 2, n):
            assert weights[i - 1] == pytest.approx(float(comb(i - 1, n - 1) * 10**30 // comb(M, n)) / 1e30, abs=1e-15)


def test_best_of_n_of_a_known_gold_and_its_standard_error():
    """Gold uniform, proxy the gold: the mean of the best of n is n/(n+1), and errors are as the jackknife says."""
    rng = np.random.default_rng(2)
    pools = [best_of_n(u, u, [1, 4, 64]) for u in rng.random((300, 1000))]
    values, errors = (np.array([getattr(p, name) for p in pools]) for name in ("value", "stderr"))
    n = np.array([1, 4, 64])
    assert values.mean(axis=0) == pytest.approx(n / (n + 1), abs=4 * (values.std(axis=0) / 300**0.5).max())
    assert errors.mean(axis=0) == pytest.approx(values.std(axis=0), rel=0.15)


def test_kl_of_best_of_n_is_that_of_its_weights():
    weights = best_weights(200_000, 32)
    kept = weights[weights > 0]
    assert np.sum(kept * np.log(kept * 200_000)) == pytest.approx(float(best_of_n_kl(32)), rel=1e-3)


def test_the_tilted_optimum_of_a_gaussian_is_its_closed_form():
    """Proxy standard normal: at beta it is N(1/beta, 1), KL 1/(2 beta^2); gold = proxy - .2 proxy^2 follows."""
    z = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    betas = np.array([2.0, 1.0, 0.5])
    found, mean = tilted(z, z - 0.2 * z**2, betas), 1 / betas
    assert found.kl == pytest.approx(mean**2 / 2, rel=6e-3)
    assert found.proxy == pytest.approx(mean, rel=3e-3)
    assert found.gold == pytest.approx(mean - 0.2 * (1 + mean**2), abs=5e-3)
    assert found.trusted.all()
    assert not tilted(z[::2000], z[::2000], 0.05).trusted.any()


@pytest.mark.parametrize("p", [0.02, 0.3, 0.97])
def test_the_binomial_interval_covers_at_least_what_it_says(p):
    k = np.arange(31)
    low, high = binomial_interval(k, 30)
    covered = stats.binom.pmf(k, 30, p) @ ((low <= p) & (p <= high))
    assert 0.9 <= covered <= 0.99
    assert low[0] == 0
    assert high[-1] == 1


def test_calibration_knows_a_calibrated_model_from_one_that_is_not():
    rng = np.random.default_rng(3)
    said = rng.random((200, 2000))
    right = rng.random(said.shape) < said
    found = [calibration(s, r) for s, r in zip(said, right, strict=True)]
    ece = np.array([c.ece for c in found])
    assert ece.mean() == pytest.approx(np.mean([c.expected for c in found]), rel=0.05)
    assert np.mean([c.ece < c.expected + 2 * c.stderr for c in found]) > 0.95
    shifted = [calibration(np.clip(s + 0.15, 0, 1), r) for s, r in zip(said, right, strict=True)]
    errors = np.array([c.ece for c in shifted])
    assert errors.mean() == pytest.approx(0.15 - 0.15**2 / 2, abs=0.01)
    assert np.mean([c.stderr for c in shifted]) == pytest.approx(errors.std(), rel=0.3)
    inside = np.mean(
        [(c.table["low"] <= c.table["confidence"]) & (c.table["confidence"] <= c.table["high"]) for c in found]
    )
    assert inside >= 0.9, "the reliability curve's intervals must cover where the model is calibrated"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pass_at_k(8, [3], 9), "k = 9: above the pool of 8"),
        (lambda: pass_at_k(8, [9], 2), "from 0 to the number of samples"),
        (lambda: pass_at_k(8, [3], 1.5), "whole numbers of at least 1"),
        (lambda: pass_at_k_exact([1.2], 2), "probabilities"),
        (lambda: best_of_n([1, 2], [1, 2], 3), "n = 3: above the pool of 2"),
        (lambda: best_of_n([1, np.nan], [1, 2], 1), "finite"),
        (lambda: tilted([1.0], [1.0], 0), "above 0"),
        (lambda: binomial_interval(3, 2), "counts"),
        (lambda: calibration([0.5] * 3, [1] * 3), "at least 10 answers"),
        (lambda: calibration([0.5] * 10, [2] * 10), "expected 0 or 1"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
