"""One pool for every n and every beta, against enumeration and against the exact law of the scores."""

import itertools

import numpy as np
import pytest

from analysis import estimators
from models.errors import InputError
from scaling.data.sources.comparisons import Comparisons
from scaling.evaluation import find
from scaling.evaluation.pool import betas_of, measured


def values(rows: list[dict], metric: str, axis: str) -> dict[float, float]:
    return {row[axis]: row["value"] for row in rows if row["metric"] == metric}


def test_best_of_n_of_a_pool_is_the_mean_over_all_its_subsets():
    """If this fails, a pool gives a biased reward at some n, and with it every curve of the study."""
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 9))
    found = values(measured(proxy, gold, np.array([1, 2, 3, 5]), ()), "best_of_n", "k")
    for n, value in found.items():
        subsets = [list(pick) for pick in itertools.combinations(range(9), int(n))]
        assert value == pytest.approx(np.mean([gold[pick][np.argmax(proxy[pick])] for pick in subsets]), abs=1e-12)


def test_a_pool_agrees_with_the_estimators_of_the_analysis():
    """Two programs, with ties: values, standard errors and KL."""
    rng = np.random.default_rng(1)
    proxy, gold = np.round(rng.normal(size=400), 1), rng.normal(size=400)
    rows = measured(proxy, gold, np.array([1, 2, 7, 25]), (0.05, 0.3))
    theirs = estimators.best_of_n(proxy, gold, [1, 2, 7, 25])
    own = [row for row in rows if row["metric"] == "best_of_n"]
    assert [row["value"] for row in own] == pytest.approx(theirs.value)
    assert [row["stderr"] for row in own] == pytest.approx(theirs.stderr)
    assert [row["kl"] for row in own] == pytest.approx(estimators.best_of_n_kl([1, 2, 7, 25]))
    optima = [row for row in rows if row["metric"] == "optimum"]
    theirs = estimators.tilted(proxy, gold, [row["beta"] for row in optima])
    assert len(optima) == 2
    assert [row["value"] for row in optima] == pytest.approx(theirs.gold)
    assert [row["effective"] for row in optima] == pytest.approx(theirs.effective)


def test_the_optimum_of_a_pool_is_the_tilted_distribution():
    """Of 65,536 strings: the optimum's true reward at each KL is that of the exact law of the scores under weights
    exp(proxy / beta), to five standard errors. If this fails, beta, KL or weights are not those of one optimum. At a KL
    of 6 a few strings carry the weight, so nothing is said.
    """
    task = Comparisons()
    score_S, p_S = task.scores
    z_S = (score_S - p_S @ score_S) / np.sqrt(p_S @ (score_S - p_S @ score_S) ** 2)
    strings = 1 + task.strings(task.stream("train"), np.arange(2**16))
    proxy = task.standardised(strings)
    rows = measured((proxy - proxy.mean()) / proxy.std(), task.gold(strings), np.array([1]), (0.25, 1.0, 2.0, 6.0))
    optima = [row for row in rows if row["metric"] == "optimum"]
    assert len(optima) == 3
    for row, wanted in zip(optima, (0.25, 1.0, 2.0), strict=True):
        assert row["kl"] == pytest.approx(wanted, abs=1e-6)
        weight_S = p_S * np.exp(z_S / (row["beta"] * proxy.std()))
        weight_S /= weight_S.sum()
        assert row["kl"] == pytest.approx(np.sum(weight_S * np.log(weight_S / p_S)), rel=0.1)
        assert row["value"] == pytest.approx(weight_S @ (z_S - task.b * z_S**2), abs=5 * row["stderr"])


def test_an_optimum_that_no_beta_reaches_is_left_out():
    """Two strings share the highest proxy, so no tilt of eight strings goes beyond ln 4."""
    proxy = np.array([0.0, 0, 1, 1, 2, 2, 3, 3])
    assert len(betas_of(proxy, (0.5, 1.3, 1.5))) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('{"M": 1024, "n": [65]}', "1 to M / 16 = 64"),
        ('{"M": 1024, "kl": [5.0]}', "below ln M - 3"),
        ('{"M": 8}', "at least 256"),
        ('{"proxy": "golden"}', "reward, gold or random"),
    ],
)
def test_what_a_pool_cannot_say_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        find("pool", options).check()
