"""Laws of what a study measures: coverage in k, gold reward, transfer with censored points; on planted truths."""

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from analysis.errors import InputError
from analysis.estimators import pass_at_k_exact
from analysis.fitting.censored import fit_censored
from analysis.fitting.fit import fit
from analysis.forecast.passes import fit_passes
from analysis.forecast.reward import peak
from analysis.forecast.transfer import data_transferred, fit_transfer, scratch
from analysis.laws.forms import LAWS
from analysis.runs import read_runs
from analysis.uncertainty.bootstrap import bootstrap, derived

KS = 2 ** np.arange(15)


def test_the_lognormal_law_is_the_mean_over_a_lognormal_of_rates():
    z = stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000)
    for mu, sigma in ((-5.0, 0.3), (-8.0, 3.0), (-2.0, 4.5)):
        p = -np.expm1(-np.exp(mu + sigma * z))
        expected = pass_at_k_exact(p, [1, 16, 4096]).mean(axis=0)
        law = LAWS["pass_at_k_lognormal"].loss({"mu": mu, "sigma": sigma}, np.array([1, 16, 4096]))
        assert law == pytest.approx(expected, rel=2e-4)


def test_the_beta_law_is_the_mean_over_a_beta_of_chances():
    p = stats.beta.ppf((np.arange(400_000) + 0.5) / 400_000, 0.4, 6.0)
    law = LAWS["pass_at_k_beta"].loss({"al": 0.4, "be": 6.0}, np.array([1.0, 16, 4096]))
    assert law == pytest.approx(pass_at_k_exact(p, [1, 16, 4096]).mean(axis=0), rel=1e-3)


def planted_p(rng, which, problems=3000):
    if which == "pass_at_k_beta":
        return rng.beta(0.3, 20.0, problems)
    return -np.expm1(-np.exp(-9 + 2.5 * rng.standard_normal(problems)))


@pytest.mark.parametrize("truth", ["pass_at_k_beta", "pass_at_k_lognormal"])
def test_held_out_k_chooses_the_law_that_made_the_problems(truth):
    """Fitted at k up to 64, judged up to 16,384. The losers must be told apart, and the right law be near."""
    rng, right, errors = np.random.default_rng(0), 0, []
    for seed in range(8):
        fits = fit_passes(KS, planted_p(rng, truth), draws=50, seed=seed)
        right += next(iter(fits)) == truth
        errors.append(fits[truth].error)
    assert right >= 6, right
    assert np.mean(errors) < 0.15


def test_the_error_of_the_right_law_covers_zero():
    """Of many problem sets: the error at k = 16,384 lies within its interval of zero as often as stated."""
    rng, inside = np.random.default_rng(1), []
    for seed in range(60):
        held = fit_passes(KS, planted_p(rng, "pass_at_k_beta", 800), laws=["pass_at_k_beta"], draws=100, seed=seed)
        last = held["pass_at_k_beta"].held.iloc[-1]
        inside.append(last["low"] <= 0 <= last["high"])
    assert 0.8 <= np.mean(inside) <= 0.98


def test_coverage_from_counts_agrees_with_that_from_known_chances():
    rng = np.random.default_rng(2)
    p = rng.beta(1.0, 20.0, 2000)
    known = fit_passes(KS[:9], p, fit_up_to=16, laws=["pass_at_k_beta"], draws=50)["pass_at_k_beta"]
    counted = fit_passes(
        KS[:9], samples=256, correct=rng.binomial(256, p), fit_up_to=16, laws=["pass_at_k_beta"], draws=50
    )
    assert counted["pass_at_k_beta"].held["measured"].to_numpy() == pytest.approx(known.held["measured"], rel=0.03)
    assert counted["pass_at_k_beta"].params["al"] == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize(
    ("law", "form"),
    [("best_of_n", lambda d: d * (0.9 - 0.2 * d)), ("rl_reward", lambda d: d * (0.9 - 0.4 * np.log(d)))],
)
def test_the_predicted_peak_covers_the_true_one(law, form):
    """Fitted below the peak alone; its place and height are then extrapolated."""
    truth = (0.9 / 0.4) ** 2 if law == "best_of_n" else np.exp(0.9 / 0.4 - 1) ** 2
    rng, K, inside = np.random.default_rng(3), np.geomspace(0.05, 0.6 * truth, 24), []
    for seed in range(40):
        reward = form(np.sqrt(K)) + 0.02 * rng.standard_normal(len(K))
        runs = read_runs(pd.DataFrame({"kl": K, "gold": reward}), inputs={"K": "kl"}, loss_column="gold", signed=True)
        top = peak(bootstrap(fit(runs, law, objective="lsq"), runs, 200, seed=seed))
        inside.append((top.kl_low <= truth <= top.kl_high, top.reward_low <= form(truth**0.5) <= top.reward_high))
        assert top.share > 0.9
    assert (np.mean(inside, axis=0) >= 0.8).all(), np.mean(inside, axis=0)


def test_a_reward_that_only_rises_has_no_peak():
    K = np.geomspace(0.1, 10, 20)
    noise = 0.01 * np.random.default_rng(4).standard_normal(20)
    runs = read_runs(
        pd.DataFrame({"K": K, "loss": np.sqrt(K) * (1 + 0.1 * np.sqrt(K)) + noise}), inputs={"K": "K"}, signed=True
    )
    top = peak(bootstrap(fit(runs, "best_of_n", objective="lsq"), runs, 50))
    assert top.kl == np.inf
    assert top.share == 0


def test_a_law_of_positive_values_refuses_those_that_are_not():
    runs = read_runs(pd.DataFrame({"x": [1.0, 2, 3, 4], "loss": [1.0, -1, 0.5, 0.2]}), inputs={"x": "x"}, signed=True)
    with pytest.raises(InputError, match="-1 in row 1 is not above 0"):
        fit(runs, "power")


def test_the_law_of_an_accuracy_covers_with_binomial_noise():
    """Right answers of 400 problems at 20 runs: the exponents of N and D lie in their intervals as often as stated."""
    rng, inside, ratio, truth = np.random.default_rng(8), [], [], {"c": -14.0, "s": 0.5, "u": 0.6}
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(7e3, 1e5, 5), np.geomspace(1e6, 1.2e7, 4)))
    p = LAWS["logit_power"].loss(truth, n, d)
    assert 0.1 < p.min() < p.max() < 0.97
    for seed in range(40):
        solved = (rng.binomial(400, p) + 0.5) / 401
        runs = read_runs(pd.DataFrame({"N": n, "D": d, "solved": solved}), loss_column="solved", loss_unit="nats")
        one = bootstrap(fit(runs, "logit_power", objective="lsq"), runs, 200, seed=seed)
        inside.append([lo <= truth[k] <= hi for k, (lo, hi) in one.intervals.items()])
        ratio.append(derived(one, lambda p: p["s"] / p["u"]).inside(0.5 / 0.6))
    assert np.mean(inside) >= 0.8, np.mean(inside, axis=0)
    assert np.mean(ratio) >= 0.8, "so must the slope of equal accuracy, log D against log N"


def censored_table(rng, beta=0.4, highest=np.inf, groups=None):
    F, n = (v.ravel() for v in np.meshgrid(np.geomspace(4e3, 3e5, 8), np.geomspace(7e3, 1e5, 5)))
    group = np.arange(len(F)) if groups is None else np.arange(len(F)) % groups
    noise = 0.2 * rng.standard_normal(group.max() + 1)[group] + 0.2 * rng.standard_normal(len(F))
    y = 30 * F**0.4 * n**beta * np.exp(noise)
    return F, n, np.minimum(y, highest), (y > highest).astype(int), group


def test_without_censored_points_it_is_least_squares():
    F, n, y, side, _ = censored_table(np.random.default_rng(5))
    one = fit_transfer(F, n, y, side)
    X = np.stack([np.ones(len(F)), np.log(F), np.log(n)], axis=1)
    assert list(one.params.values()) == pytest.approx(np.linalg.lstsq(X, np.log(y), rcond=None)[0], rel=1e-4)
    assert one.predict(alpha=np.log(F), beta=np.log(n)) == pytest.approx(np.exp(X @ list(one.params.values())))


@pytest.mark.parametrize("groups", [None, 10])
def test_intervals_cover_where_a_third_of_the_points_is_censored(groups):
    """Dropped, those points would flatten the law; and runs that share noise must not count as many."""
    rng, inside, dropped, right = np.random.default_rng(6), [], [], []
    for _ in range(100):
        F, n, y, side, group = censored_table(rng, highest=1.6e5, groups=groups)
        one = fit_transfer(F, n, y, side, group)
        right.append(one.n_right / one.n)
        inside.append(
            [lo <= t <= hi for t, (lo, hi) in zip((np.log(30), 0.4, 0.4), one.intervals.values(), strict=True)]
        )
        kept = side == 0
        dropped.append(fit_transfer(F[kept], n[kept], y[kept], side[kept]).params["beta"])
    assert 0.25 < np.mean(right) < 0.45
    assert (np.mean(inside, axis=0) > 0.8).all(), np.mean(inside, axis=0)
    assert np.mean(dropped) < 0.37, np.mean(dropped)


def test_a_censored_mean_is_the_closed_form_of_its_likelihood():
    """Half the points censored at the median: the score equations hold at the optimum, by numeric derivatives."""
    y = np.exp(np.minimum(np.random.default_rng(7).standard_normal(200), 0.0))
    side = (y == 1).astype(int)
    one = fit_censored({"c": np.ones(200)}, y, side)

    def log_likelihood(mean, sigma):
        z = (np.log(y) - mean) / sigma
        return np.where(side == 1, special.log_ndtr(-z), stats.norm.logpdf(z) - np.log(sigma)).sum()

    best = log_likelihood(one.params["c"], one.sigma)
    assert one.log_likelihood == pytest.approx(best)
    for step in (1e-3, -1e-3):
        assert log_likelihood(one.params["c"] + step, one.sigma) < best
        assert log_likelihood(one.params["c"], one.sigma + step) < best
    assert one.params["c"] == pytest.approx(0, abs=0.25)


def test_data_transferred_inverts_the_curve_from_scratch():
    """A planted model: pretraining is worth exactly T tokens, so that D_T = T, whatever D_F, or what is seen."""
    D = np.geomspace(2**11, 2**21, 21)
    curve = scratch(D, 0.65 + 80 * D**-0.5)
    finetune = np.array([2.0**12, 2**14, 2**16, 2**18])
    for T in (5e4, 5e5, 4e6):
        moved, side = data_transferred(curve, finetune, 0.65 + 80 * (finetune + T) ** -0.5)
        expected = np.where(finetune + T > D[-1], 1, np.where(0.05 * finetune > T, -1, 0))
        assert side.tolist() == expected.tolist()
        assert moved[side == 0] == pytest.approx(T, rel=0.05)
        assert moved[side == 1] == pytest.approx(D[-1] - finetune[side == 1])
    past, side = data_transferred(curve, [2.0**22], [0.66])
    assert (past.tolist(), side.tolist()) == ([1.0], [1]), (
        "past the curve a low loss says nothing of what was transferred"
    )
    none, side = data_transferred(curve, finetune, curve.loss_at(finetune) * 1.01)
    assert side.tolist() == [-1] * 4, "pretraining that harms transfers less than can be seen, not a missing value"
    assert none == pytest.approx(0.05 * finetune)
    most, side = data_transferred(curve, np.array([512.0]), curve.loss_at([2**11]) * 1.1)
    assert (most.item(), side.item()) == (2**11 - 512, -1), "above the shortest run's loss there is only a bound"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_passes([1, 2, 128], [0.1, 0.2]), "2 values up to 64 and 1 above"),
        (lambda: fit_passes([1, 2, 4, 128], [0.0, 0.0]), "is 0 or 1"),
        (lambda: fit_censored({"c": [1.0, 1]}, [1.0, -1]), "above 0"),
        (lambda: fit_censored({"c": np.ones(3)}, [1.0, 1, 1], [1, 1, 0]), "1 measured points cannot identify 1"),
        (lambda: scratch([1e3, 1e3], [1.0, 2.0]), "two or more numbers of tokens"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError, match=words):
        call()
