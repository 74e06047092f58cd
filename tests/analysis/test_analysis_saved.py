"""A saved fit may come from anyone: whatever is in the file, reading it ends in one line or in a fit that predicts."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.fitting.fit import fit
from analysis.fitting.saved import load_fit
from analysis.fitting.target import fit_for_target
from analysis.forecast.allocate import allocate, excess_loss
from analysis.laws.forms import LAWS
from analysis.runs import read_runs
from analysis.uncertainty.bootstrap import bootstrap
from analysis.uncertainty.coverage import sweep
from analysis.uncertainty.predict import predict, predict_runs
from analysis.uncertainty.profile import profile

HUGE = "\0HUGE"  # stands for 1e400, which JSON can hold and Python reads as infinite
DEEP = "\0DEEP"
WRONG = (None, "x", [], {}, -1, 0, 1e300, True, HUGE, DEEP, "\0GONE")


def places(node, path=()):
    """The path of every leaf and container."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(record, path, value) -> str:
    """The JSON with one place replaced, or taken out."""
    record = copy.deepcopy(record)
    node = record
    for key in path[:-1]:
        node = node[key]
    if value == "\0GONE":
        del node[path[-1]]
    else:
        node[path[-1]] = value
    text = json.dumps(record)
    return text.replace(json.dumps(HUGE), "1e400").replace(json.dumps(DEEP), "[" * 10_000 + "]" * 10_000)


@pytest.mark.parametrize("targeted", [False, True])
def test_a_changed_file_is_refused_or_still_predicts(tmp_path, targeted):
    """Failure would mean: a fit from someone else ends in a traceback, or predicts what is not a number."""
    runs = sweep("coupled", (5, 5), np.random.default_rng(0))
    made = fit_for_target(runs, 1e13).fit if targeted else fit(runs, "coupled", fixed={"gamma": 0.45})
    made = bootstrap(made, runs, 3)
    record = json.loads(made.save(tmp_path / "fit.json").read_text())
    path, refused = tmp_path / "changed.json", 0
    for place in places(record):
        for value in WRONG:
            path.write_text(changed(record, place, value))
            try:
                again = load_fit(path)
            except InputError:
                refused += 1
                continue
            p = predict(again, 1e5, 1e6)
            assert np.isfinite(p.value), (place, value)
            assert p.low is None or p.low <= p.value <= p.high, (place, value)
            again.summary()
            if again.draws is not None:
                assert np.isfinite(allocate(again, 1e12).n), (place, value)
    assert refused > 300
    for text in ("", "[]", "3", "[" * 100_000, '{"format": 2}', "NaN", json.dumps(record).replace("2", "NaN", 1)):
        path.write_text(text)
        with pytest.raises(InputError):
            load_fit(path)


def test_a_fit_without_intervals_predicts_a_value(tmp_path):
    """The documented Python API saves a fit before any bootstrap: what reads it must not need the draws."""
    runs = sweep("chinchilla", (5, 5), np.random.default_rng(0))
    again = load_fit(fit(runs, "chinchilla").save(tmp_path / "fit.json"))
    p = predict(again, 1e5, 1e6)
    assert p.low is None
    assert "not bootstrapped" in p.notes[-1]
    assert "no interval" in str(p)
    best = allocate(again, 1e12)
    assert best.n == pytest.approx(allocate(bootstrap(again, runs, 20), 1e12).n)
    assert "no interval" in best.summary()
    assert excess_loss(again, 1e5, 1e6)["excess"] >= 0
    json.dumps(best.to_json(), allow_nan=False)


def test_a_saved_targeted_fit_keeps_its_weights(tmp_path):
    """Failure would mean: a profile or a bootstrap of the saved fit is one of another problem."""
    runs = sweep("coupled", (6, 5), np.random.default_rng(1))
    aimed = fit_for_target(runs, 2e13, {"chinchilla": LAWS["chinchilla"]}, kappas=(3.0,), objective="lsq").fit
    again = load_fit(aimed.save(tmp_path / "fit.json"))
    a, b = again.problem(runs), aimed.problem(runs)
    np.testing.assert_array_equal(a.weights, b.weights)
    assert a.weights.min() < 0.5, "the weights of this test must matter"
    assert (a.objective, a.delta) == ("lsq", aimed.delta)
    # The weighted optimum is the bottom of its own profile, and not of that of equal weights.
    assert profile(again, runs, "alpha").estimate == pytest.approx(aimed.params["alpha"], rel=1e-6)
    assert fit(runs, "chinchilla", objective="lsq").params["alpha"] != pytest.approx(aimed.params["alpha"], rel=1e-3)
    with pytest.raises(InputError, match="not the 25 that were fitted"):
        again.problem(read_runs(runs.frame.iloc[:-1]))


def test_fixed_weights_come_back(tmp_path):
    runs = sweep("chinchilla", (5, 5), np.random.default_rng(2))
    weights = np.linspace(0.2, 1.0, len(runs))
    weighted = fit(runs, "chinchilla", weights=weights)
    again = load_fit(weighted.save(tmp_path / "fit.json"))
    np.testing.assert_array_equal(again.problem(runs).weights, weights[~runs.holdout])


def hetero_sweep(seed: int, target: float):
    """Chinchilla's truth with noise that grows away from the target as the weights of kappa 3 say."""
    rng = np.random.default_rng(seed)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1.6e5, 6), np.geomspace(5e5, 8e6, 6)))
    truth = {"E": 0.9, "A": 28.0, "B": 70.0, "alpha": 0.40, "beta": 0.36}
    below = np.maximum(np.log10(target / (6 * n * d)), 0.0)
    sd = 0.003 * np.sqrt(1 + (3.0 * below**2) ** 2)
    loss = LAWS["chinchilla"].loss(truth, n, d) * np.exp(sd * rng.standard_normal(n.size))
    n_held = np.array([2e5, 1.2e5, 8e4])
    frame = pd.DataFrame({"N": n, "D": d, "loss": loss})
    held = pd.DataFrame({"N": n_held, "D": target / 6 / n_held})
    held["loss"] = LAWS["chinchilla"].loss(truth, held["N"], held["D"]) * np.exp(0.003 * rng.standard_normal(3))
    return read_runs(pd.concat([frame, held]), holdout=f"C > {0.99 * target:.6g}")


def test_the_interval_of_a_target_fit_has_the_right_size():
    """Runs far below the target are noisier. Failure would mean: their noise is taken for that of the run predicted."""
    target, inside, width, noise = 2e13, [], [], []
    for seed in range(10):
        runs = hetero_sweep(seed, target)
        aimed = fit_for_target(runs, target, {"chinchilla": LAWS["chinchilla"]}, kappas=(3.0,))
        held = runs.take(runs.holdout)
        p = predict_runs(bootstrap(aimed.fit, runs, 60), held)
        inside += list(p.inside(held.loss))
        width.append(np.mean(np.log(p.high / p.low)))
        noise.append(aimed.fit.noise["sigma"])
    assert np.median(noise) == pytest.approx(0.003, rel=0.25)
    assert np.mean(inside) >= 0.8
    assert np.median(width) < 0.08, "with the noise of all runs alike it is 0.17"
