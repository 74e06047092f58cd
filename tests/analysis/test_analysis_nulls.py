"""Equivalence, monotone fits and clustered intervals: their error rates and coverage on planted truths."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.errors import InputError
from analysis.uncertainty.clustered import clustered
from analysis.uncertainty.equivalence import decide, mean_equivalence, robust, slope_equivalence
from analysis.uncertainty.isotonic import isotonic


def test_the_mean_of_single_rows_is_the_t_test():
    y = np.random.default_rng(0).standard_normal(9) + 0.3
    estimate, stderr, dof, clusters = robust(np.ones((9, 1)), y)
    expected = stats.ttest_1samp(y, 0)
    assert estimate / stderr == pytest.approx(expected.statistic, rel=1e-12)
    assert (dof, clusters) == (pytest.approx(8), 9)


def test_equal_clusters_are_the_t_test_of_their_means():
    """However many rows a run has, it counts once."""
    rng = np.random.default_rng(1)
    y, run = rng.standard_normal(6).repeat(50) + 0.01 * rng.standard_normal(300), np.arange(6).repeat(50)
    estimate, stderr, dof, _ = robust(np.ones((300, 1)), y, run)
    expected = stats.ttest_1samp(y.reshape(6, 50).mean(axis=1), 0)
    assert estimate / stderr == pytest.approx(expected.statistic, rel=1e-9)
    assert dof == pytest.approx(5)


def planted(rng, slope, runs=8, rows=20, shared=1.0):
    """x a run's own (log10 N), y with noise that the rows of a run share."""
    x = np.linspace(0, 2, runs)
    noise = shared * rng.standard_normal(runs)[:, None] + 0.3 * rng.standard_normal((runs, rows))
    y = slope * x[:, None] + noise
    return np.repeat(x, rows), y.ravel(), np.repeat(np.arange(runs), rows)


def test_a_slope_at_the_margin_is_called_equivalent_as_rarely_as_promised():
    """The error that matters: a true slope of just the margin passes for none in at most 5 % of studies."""
    rng = np.random.default_rng(2)
    edge = [slope_equivalence(x, y, 2.0, run).verdict for x, y, run in (planted(rng, 2.0) for _ in range(500))]
    assert np.mean(np.array(edge) == "equivalent") < 0.08
    none = [slope_equivalence(x, y, 2.0, run).verdict for x, y, run in (planted(rng, 0.0) for _ in range(300))]
    assert np.mean(np.array(none) == "equivalent") > 0.7, "a null that is true and well measured must be upheld"
    assert np.mean(np.array(none) == "different") < 0.02
    far = [slope_equivalence(x, y, 2.0, run).verdict for x, y, run in (planted(rng, 5.0) for _ in range(100))]
    assert np.mean(np.array(far) == "different") > 0.95


@pytest.mark.parametrize("runs", [5, 12])
def test_the_interval_of_a_slope_covers_where_runs_share_noise(runs):
    """Ignoring the runs would cover about a third."""
    rng = np.random.default_rng(3)
    found = [slope_equivalence(x, y, 1.0, run) for x, y, run in (planted(rng, 0.5, runs) for _ in range(500))]
    assert 0.86 < np.mean([f.low <= 0.5 <= f.high for f in found]) < 0.95
    naive = [slope_equivalence(x, y, 1.0) for x, y, _ in (planted(rng, 0.5, runs) for _ in range(200))]
    assert np.mean([f.low <= 0.5 <= f.high for f in naive]) < 0.6


def test_what_is_undecided_says_how_many_more_runs_decide():
    """With so many more the same estimate is decided, and with a tenth fewer it is not."""
    found = decide(0.02, 0.02, 7, 0.03, 8)
    assert found.verdict == "undecided"
    for total, verdict in ((8 + found.more, "equivalent"), (8 + int(0.9 * found.more), "undecided")):
        again = decide(0.02, 0.02 * (8 / total) ** 0.5, 7 * total / 8, 0.03, total)
        assert again.verdict == verdict
    assert f"about {found.more} more runs" in str(found)
    assert decide(0.0, 0.001, 7, 0.03, 8).more == 0
    beyond = decide(0.05, 0.04, 7, 0.03, 8)
    assert (
        decide(0.05, 0.04 * (8 / (8 + beyond.more)) ** 0.5, 7 * (8 + beyond.more) / 8, 0.03, 8).verdict == "different"
    )


def test_the_monotone_fit_is_the_nearest_monotone_curve():
    values = np.array([[0.1, 0.5, 0.3, 0.9]] * 3) + np.array([[-0.01], [0], [0.01]])
    found = isotonic([1, 2, 3, 4], values)
    assert found.fitted == pytest.approx([0.1, 0.4, 0.4, 0.9])
    assert found.p_monotone == 0
    assert found.where_it_fails.startswith("2 to 3: -0.2")
    assert isotonic([4, 3, 2, 1], values, increasing=False).fitted == pytest.approx([0.9, 0.4, 0.4, 0.1])


def curves(rng, means, problems=300, groups=None):
    p = np.clip(
        rng.normal(0, 0.15, (groups or problems, 1)).repeat(problems // (groups or problems), axis=0) + means, 0, 1
    )
    return (rng.random(p.shape) < p).astype(float)


def test_the_chance_of_a_monotone_curve_follows_the_truth():
    rng = np.random.default_rng(4)
    rising, falling = [0.2, 0.4, 0.6, 0.8], [0.2, 0.5, 0.3, 0.8]
    assert np.mean([isotonic(range(4), curves(rng, rising), draws=300).p_monotone for _ in range(20)]) > 0.99
    found = [isotonic(range(4), curves(rng, falling), draws=300) for _ in range(20)]
    assert np.mean([f.p_monotone for f in found]) < 0.01
    assert all(f.where_it_fails.startswith("1 to 2") for f in found)
    flat = [isotonic(range(2), curves(rng, [0.5, 0.5]), draws=300).p_monotone for _ in range(200)]
    assert np.mean(flat) == pytest.approx(0.5, abs=0.08), "of two equal points either is the higher one"


def test_a_flat_curve_of_many_points_seldom_fails_somewhere():
    """Judged step by step at 5 %, a plateau of nine points would be called falling in every third study."""
    rng = np.random.default_rng(9)
    fails = [isotonic(range(9), curves(rng, [0.5] * 9), draws=500, seed=i).where_it_fails != "" for i in range(80)]
    assert np.mean(fails) < 0.14


def test_problems_of_one_template_are_resampled_together():
    rng = np.random.default_rng(5)
    values = np.repeat(rng.standard_normal((10, 1)) * [0.0, 1.0], 30, axis=0)
    alone, together = (isotonic([0, 1], values, cluster=c) for c in (None, np.arange(300) // 30))
    assert np.ptp([together.low[1], together.high[1]]) > 3 * np.ptp([alone.low[1], alone.high[1]])


@pytest.mark.parametrize("runs", [6, 20])
def test_an_interval_clustered_by_run_covers(runs):
    """Of a mean and of a ratio; the plain percentiles of 6 runs would cover 0.83."""
    rng, inside = np.random.default_rng(6), []
    for seed in range(100):
        noise = rng.standard_normal(runs).repeat(5) + 0.2 * rng.standard_normal(5 * runs)
        frame = pd.DataFrame({"trunk": np.arange(runs).repeat(5), "value": 1 + 0.3 * noise})
        inside.append(1.0 in clustered(frame, lambda f: float(f["value"].to_numpy().mean()), draws=200, seed=seed))
    assert 0.85 < np.mean(inside) < 0.96


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_equivalence([1.0, 2.0], 0), "margin = 0"),
        (lambda: mean_equivalence([1.0, 2.0], 1, cluster=["a", "a"]), "1 clusters"),
        (lambda: slope_equivalence([1, 1, 1], [1, 2, 3], 1), "all values are equal"),
        (lambda: slope_equivalence([1, 2, 3], [1, np.nan, 3], 1), "finite"),
        (lambda: isotonic([1, 1], [[1, 2], [3, 4]]), "all differ"),
        (lambda: isotonic([1, 2], [[1, 2]]), "at least two of each"),
        (lambda: clustered(pd.DataFrame({"trunk": [1, 2]}), len), "2 clusters; an interval needs at least 3"),
        (lambda: clustered(pd.DataFrame({"trunc": [1]}), len), "did you mean 'trunc'"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError, match=words):
        call()
