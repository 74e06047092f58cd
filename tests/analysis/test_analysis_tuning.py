"""Planted rules are recovered from the losses of a tuning sweep."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.errors import InputError
from analysis.tuning.rule import LEVEL, ellipse, ellipses, fit_rule, optimum, save, tune
from analysis.tuning.table import tuning_table


def planted(lrs, best_batch=4, p=-0.4, q=-0.3):
    rows = []
    for n in (1e4, 3e4, 9e4):
        for d in (2.5e5, 1e6):
            for batch in (2, 4, 8):
                best = 0.01 * (n / 1e5) ** p * (d / 1e6) ** q
                for lr in lrs:
                    loss = 1.5 + 0.05 * np.log(lr / best) ** 2 + 0.02 * np.log2(batch / best_batch) ** 2
                    row = {"n_compute": n, "tokens": d + batch, "batch_size": batch, "lr": lr, "loss": loss}
                    rows.append(row | {"status": "finished"})
    return pd.DataFrame(rows)


def test_planted_rule_is_recovered():
    rule, found, scatter = fit_rule(planted([0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]))
    assert rule["batch_size"] == 4
    assert (rule["c"], rule["p"], rule["q"]) == pytest.approx((0.01, -0.4, -0.3), rel=1e-3)
    assert scatter < 1e-3
    assert found["inside"].all()


def test_the_batch_is_compared_where_it_was_varied():
    """Further horizons at one batch size say nothing about the others: they must not make it win."""
    frame = planted([0.005, 0.01, 0.02, 0.04, 0.08])
    more = frame[(frame["batch_size"] == 8) & (frame["tokens"] < 5e5)].assign(tokens=5e5)
    rule, _, _ = fit_rule(pd.concat([frame, more]))
    assert rule["batch_size"] == 4


def test_optima_at_the_edge_are_not_used():
    rule, found, _ = fit_rule(planted([0.01, 0.02, 0.04, 0.08]))
    assert not found["inside"].all()
    assert (rule["c"], rule["p"], rule["q"]) == pytest.approx((0.01, -0.4, -0.3), rel=1e-3)
    with pytest.raises(InputError, match="widen the grid"):
        fit_rule(planted([0.1, 0.2, 0.4]))


def test_optimum_of_a_parabola():
    lr = np.array([0.01, 0.02, 0.04, 0.08])
    at, loss, inside = optimum(lr, 2 + 0.3 * np.log(lr / 0.025) ** 2)
    assert (at, loss, inside) == (pytest.approx(0.025), pytest.approx(2.0), True)
    with pytest.raises(InputError, match="at least three"):
        optimum(lr[:2], lr[:2])


def test_tune_prints_a_rule_to_paste():
    assert "PowerRule(c=0.01, p=-0.400, q=-0.300, batch_size=4" in tune(planted([0.005, 0.01, 0.02, 0.04, 0.08])).text


def test_unfinished_runs_are_no_optimum():
    frame = planted([0.005, 0.01, 0.02]).assign(status="diverged")
    with pytest.raises(InputError, match="no finished runs"):
        tune(frame)


RATES, BATCHES = 0.01 * 2.0 ** np.arange(-3, 4), 2.0 ** np.arange(0, 7)


def grid(noise=0.0, seed=0, sizes=(1e4, 3e4, 9e4), rates=RATES, c=0.01):
    """A tilted bowl for each (N, D): best lr c (N/1e5)^-0.4 (D/1e6)^-0.3, best batch 8 (D/1e6)^0.5 windows."""
    rng, rows = np.random.default_rng(seed), []
    for n in sizes:
        for d in (1e6, 4e6):
            for lr in rates:
                for batch in BATCHES:
                    u = np.log(lr / (c * (n / 1e5) ** -0.4 * (d / 1e6) ** -0.3))
                    v = np.log(batch / (8 * (d / 1e6) ** 0.5))
                    loss = 2 * np.exp(0.02 * u**2 - 0.015 * u * v + 0.01 * v**2 + noise * rng.normal())
                    row = {
                        "n_compute": n,
                        "tokens": d,
                        "batch_size": int(batch),
                        "lr": lr,
                        "loss": loss,
                        "seq_len": 100,
                    }
                    rows.append(row | {"status": "finished", "run": f"r{len(rows)}"})
    return pd.DataFrame(rows)


def test_a_rule_over_learning_rate_and_batch_is_recovered_and_comes_back_from_its_file(tmp_path):
    tuned = tune(grid(), "bowls")
    rule = tuned.rule
    assert rule["rule"] == "grid"
    assert (rule["c"], rule["p"], rule["q"]) == pytest.approx((0.01, -0.4, -0.3), rel=1e-3)
    assert (rule["b"], rule["r"]) == pytest.approx((800, 0.5), rel=1e-3)  # windows of 100 tokens
    save(tuned, tmp_path / "rule.json")
    kept = json.loads((tmp_path / "rule.json").read_text())
    provenance = kept.pop("provenance")
    assert kept == rule
    assert (provenance["sweep"], len(provenance["runs"])) == ("bowls", len(grid()))
    assert provenance["scatter_log_lr"] < 1e-6
    assert {"python", "jax", "numpy"} <= provenance["versions"].keys()


def test_the_ellipse_holds_the_truth_as_often_as_it_says():
    """Over 300 noisy grids: the region's share of hits is its level, within four standard errors."""
    truth, hits = np.log([0.01 * 0.1**-0.4, 800]), 0
    for seed in range(300):
        cell = grid(noise=0.003, seed=seed, sizes=(1e4,)).query("tokens == 1e6")
        found = ellipse(cell["lr"].to_numpy(), cell["batch_size"].to_numpy() * 100, cell["loss"].to_numpy())
        off = np.log([found.lr, found.batch]) - truth
        hits += off @ np.linalg.solve(found.covariance, off) / 2 <= stats.f.ppf(LEVEL, 2, found.freedom)
    assert hits / 300 == pytest.approx(LEVEL, abs=4 * np.sqrt(LEVEL * (1 - LEVEL) / 300))


def test_a_size_whose_optimum_lies_at_the_edge_is_named_and_not_used():
    frame = grid(rates=RATES[:5], sizes=(1e4, 6e4, 9e4))
    found = ellipses(frame)
    bad = [e for e in found if e.problem]
    assert {e.n for e in bad} == {1e4}
    assert all("edge of the grid in lr" in e.problem for e in bad)
    tuned = tune(frame)
    assert "edge of the grid in lr: not used" in tuned.text
    assert tuned.rule["p"] == pytest.approx(-0.4, rel=1e-3)
    with pytest.raises(InputError):
        tune(grid(c=1.0))


def test_a_rule_of_learning_rates_alone_is_of_one_batch():
    tuned = tune(planted([0.005, 0.01, 0.02, 0.04, 0.08]).query("batch_size == 4"))
    assert (tuned.rule["rule"], tuned.rule["batch_size"]) == ("power", 4)


def test_a_table_from_elsewhere_is_tuned():
    """Other names, no status, a batch in thousands separators: the planted rule comes back."""
    frame = planted([0.005, 0.01, 0.02, 0.04, 0.08]).query("batch_size == 4")
    foreign = frame.drop(columns=["status", "batch_size"]).rename(
        columns={"n_compute": "params", "lr": "Learning Rate"}
    )
    rule = tune(tuning_table(foreign.assign(**{"Batch Size": "1,024"}))).rule
    assert rule["batch_size"] == 1024
    assert (rule["c"], rule["p"], rule["q"]) == pytest.approx((0.01, -0.4, -0.3), rel=1e-3)
    with pytest.raises(InputError, match="--lr-column"):
        tuning_table(foreign.drop(columns="Learning Rate"))
