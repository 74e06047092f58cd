"""The verdict on simulated ladders, clean and corrupted.

The ladders are SGD on a quadratic with a power-law spectrum, its expected loss step by step: larger models have more
modes and train longer, the best learning rate is the one a grid finds, and a wrong one costs what it costs there.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.tuning.health import SizeCurve, health, health_line, health_text, scores, verdict
from analysis.tuning.table import tuning_table

MODES = (32, 48, 72, 108, 162, 243)
BEST = 2**-1.5  # at every size; test_the_simulated_best_is_the_best


def simulate(modes: int, lr: float) -> np.ndarray | None:
    """Loss of every step under warm-up-free WSD; None where it diverges."""
    steps, i = 12 * modes, np.arange(1, modes + 1.0)
    curvature, error = i**-1.5, i**-0.2
    beyond = np.sum(np.arange(modes + 1.0, 20_000) ** -1.7)  # what a model of this size cannot learn
    rates = lr * (1 - np.sqrt(np.clip(((np.arange(steps) + 0.5) / steps - 0.8) / 0.2, 0, 1)))
    losses = np.empty(steps)
    for t, rate in enumerate(rates):
        losses[t] = 1 + 0.5 * (curvature @ error + beyond)
        if losses[t] > 50:
            return None
        error = error * (1 - rate * curvature) ** 2 + rate**2 * curvature * losses[t] / 4  # batch of 8
    return losses


def ladder(seed: int, corrupted: bool) -> tuple[list[SizeCurve], int]:
    """(curves, index of the one whose learning rate is wrong by x4 up or x8 down), with noise of batches and seeds.

    The flat bottom is wide: x4 down costs 0.5 to 1.5 %, which seeds of 0.2 % hide at the larger sizes.
    """
    rng = np.random.default_rng(seed)
    bad, factor = int(rng.integers(len(MODES))), (4.0, 1 / 8)[rng.integers(2)]
    curves = []
    for k, modes in enumerate(MODES):
        clean = None
        while clean is None:  # tuned to within 20 %
            clean = simulate(modes, BEST * np.exp(rng.normal(0, 0.2)) * (factor if corrupted and k == bad else 1))
        seeds = np.exp(rng.normal(0, [0.002, 0.001]))
        noisy = clean * seeds[0] * np.exp(rng.normal(0, 0.03, len(clean)))
        curves.append(SizeCurve(1000.0 * modes**2, noisy, clean[-1] * seeds.prod()))
    return curves, bad


@pytest.mark.parametrize("modes", [MODES[0], MODES[-1]])
def test_the_simulated_best_is_the_best(modes):
    """The corruption is one: neighbours on a grid of x1.4 are no better, and x8 down costs at least 1 %."""
    last = {f: simulate(modes, BEST * f)[-1] for f in (1 / 8, 0.7, 1.0, 1.4)}
    assert min(last, key=last.get) == 1.0
    assert last[1 / 8] > 1.01 * last[1.0]


def test_the_verdict_separates_corrupted_ladders_from_clean_ones():
    """Seeds that the score was not developed on (those were below 6,000)."""
    clean = [scores(ladder(10_000 + i, False)[0])["score"].max() for i in range(20)]
    found, right = [], 0
    for i in range(20):
        curves, bad = ladder(20_000 + i, True)
        table = scores(curves)
        found.append(table["score"].max())
        right += int(table["score"].idxmax()) == bad
    auc = np.mean([(b > a) + 0.5 * (b == a) for a in clean for b in found])
    print(f"AUC {auc:.3f}, the wrong size named in {right} of 20")
    assert auc >= 0.95, f"AUC {auc:.3f}: a wrong learning rate at one size is no longer seen"
    assert right >= 18
    assert np.mean([verdict(s) == "tuned" for s in clean]) >= 0.8
    assert np.mean([verdict(s) != "tuned" for s in found]) >= 0.8


def test_curves_that_collapse_score_nothing():
    t = np.linspace(0.01, 1, 400)
    curves = [SizeCurve(n, 1.2 + (n / 1e5) ** -0.3 * t**-0.4, 1.2 + (n / 1e5) ** -0.3) for n in (1e4, 3e4, 9e4, 27e4)]
    assert scores(curves)["score"].max() < 0.5
    with pytest.raises(InputError, match="3 sizes"):
        scores(curves[:3])


def as_table(curves: list[SizeCurve]) -> pd.DataFrame:
    rows = [{"params": c.n, "tokens": 1e6, "lr": 0.01, "loss": c.final, "run": f"r{i}"} for i, c in enumerate(curves)]
    return tuning_table(pd.DataFrame(rows))


def test_the_health_of_a_table_names_the_size_that_is_out_of_line():
    """With its curves, and by the last losses alone where a table has none."""
    curves, bad = ladder(30_001, True)
    by_run = {f"r{i}": c.loss for i, c in enumerate(curves)}
    for judged in (health(as_table(curves), by_run.get), health(as_table(curves))):
        assert len(judged) == 6
        assert int(judged["score"].idxmax()) == bad
        assert judged["verdict"][bad] == "untuned"
        assert "out of line" in health_text(judged)
        assert "untuned: N" in health_line(judged)
    assert judged["collapse"].isna().all()


def test_a_loss_curve_that_is_missing_is_named():
    curves, _ = ladder(30_001, False)
    by_run = {f"r{i}": c.loss for i, c in enumerate(curves) if i != 3}
    judged = health(as_table(curves), by_run.get)
    assert judged["reason"].str.contains("missing or damaged").tolist() == [False, False, False, True, False, False]


def test_curves_of_the_last_losses_alone_need_four_sizes():
    curves, _ = ladder(30_001, False)
    without = [dataclasses.replace(c, loss=None) for c in curves]
    assert scores(without)["collapse"].isna().all()
    with pytest.raises(InputError, match="3 sizes"):
        scores(without[:3])
