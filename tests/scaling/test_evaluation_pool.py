"""One pool for every n and every beta, against enumeration and against the exact law of the scores."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from analysis import estimators
from models.config import ModelConfig
from models.errors import InputError
from models.transformer import init
from scaling.config import DataConfig, ObjectiveConfig, RunConfig
from scaling.data.sources.comparisons import Comparisons
from scaling.evaluation import find
from scaling.evaluation._asker import Asker
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


def policy(seed: int) -> Asker:
    """Of a vocabulary of 17, that writes strings of two tokens, each as a place in a folder of its own."""
    model = ModelConfig(vocab_size=17, d_model=8, n_layers=1, n_heads=1)
    params = init(model, jax.random.key(seed))
    params["head"] = jax.random.normal(jax.random.key(seed + 10), params["head"].shape)
    config = RunConfig(model=model, data=DataConfig("comparisons:length=2", "symbols", seq_len=2))
    return Asker(SimpleNamespace(config=config, params=params, folder=f"policy-{seed}", window=2))


def chances(asker: Asker) -> np.ndarray:
    """p of each of the 17^2 strings."""
    pairs = np.array(list(itertools.product(range(17), repeat=2)))
    return np.exp(asker.targets(np.pad(pairs, ((0, 0), (1, 0))))[0].sum(axis=1))


def test_the_true_reward_of_a_policy_and_its_kl_are_those_of_all_its_strings():
    """If this fails, what is written is not drawn from the policy, or KL is taken the wrong way round."""
    asker, parent = policy(0), policy(1)
    asker.beside = lambda run: parent
    p, q = chances(asker), chances(parent)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    gold = Comparisons(length=2).gold(np.array(list(itertools.product(range(17), repeat=2))))
    wanted = {"gold": p @ gold, "kl": p @ np.log(p / q)}
    for row in find("gold", '{"M": 4096, "to": "0123456789ab"}').rows(asker, 0):
        assert row["value"] == pytest.approx(wanted[row["metric"]], abs=4 * row["stderr"])
        assert row["stderr"] < 0.1
    assert asker.flops > 0


def test_a_pool_is_written_by_the_policy_and_only_a_reward_model_scores_it():
    asker = policy(2)
    (first, *_) = find("pool", '{"M": 1024, "proxy": "gold"}').rows(asker, 0)
    gold = Comparisons(length=2).gold(np.array(list(itertools.product(range(17), repeat=2))))
    assert first["k"] == 1
    assert first["value"] == pytest.approx(chances(asker) @ gold, abs=4 * first["stderr"])
    with pytest.raises(InputError, match="no reward model"):
        find("pool", '{"M": 1024}').rows(asker, 0)


def test_a_reward_model_writes_nothing():
    """Its head for next tokens is that of its parent, below layers that have moved."""
    asker = policy(2)
    asker.model.config = dataclasses.replace(asker.model.config, objective=ObjectiveConfig("reward"))
    asker.model.folder = "scores"
    with pytest.raises(InputError, match="scores: objective reward trains no head for next tokens"):
        find("pool", '{"M": 1024}').rows(asker, 0)


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
