"""The fitter finds the optimum: published rows to the digit, planted truths, derivatives, round trips."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fitting.fit import fit
from analysis.fitting.saved import load_fit
from analysis.laws.forms import JOINT, LAWS
from analysis.runs import read_runs
from analysis.uncertainty.bootstrap import bootstrap
from analysis.uncertainty.coverage import TRUTHS
from analysis.uncertainty.predict import predict

PUBLIC = Path(os.environ.get("SCALING_PUBLIC_DATA", Path(__file__).parents[2] / "../shared/data"))


def chinchilla_runs(where="`loss` < 3.44", holdout=None):
    path = PUBLIC / "chinchilla/runs.csv"
    if not path.exists():
        pytest.skip("public runs are absent: set SCALING_PUBLIC_DATA to their folder")
    return read_runs(path, n_column="Model Size", c_column="Training FLOP", where=where, holdout=holdout)


def planted(law, noise=0.0, shape=(6, 6), seed=0):
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, shape[0]), np.geomspace(5e5, 5e7, shape[1])))
    loss = LAWS[law].loss(TRUTHS[law], n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(n.size))
    return read_runs(pd.DataFrame({"N": n, "D": d, "loss": loss}))


# Rows, options, objective, and E, A, B, alpha, beta of the converged fit.
ROWS = [
    ("`loss` < 3.44", None, {}, 0.0010182740178, (1.81722, 477.826, 2143.417, 0.34731, 0.36717)),
    ("`loss` < 3.44", None, {"objective": "lad"}, 0.00470622772342, (1.81686, 482.006, 2085.436, 0.34781, 0.36585)),
    ("`loss` < 3.44", None, {"objective": "lsq"}, 4.77578624654e-05, (1.86455, 593.322, 4875.638, 0.36025, 0.40588)),
    ("`loss` < 3.44", None, {"delta": 0.03}, 0.00572778263996, (1.86359, 592.795, 4762.695, 0.36020, 0.40477)),
    (None, None, {}, 0.00182601052307, (1.89134, 495.726, 12845.614, 0.34931, 0.45305)),
    ("`loss` < 3.44", "C >= 1e21", {}, 0.000814072667504, (1.82054, 342.812, 3820.072, 0.32713, 0.39609)),
]


@pytest.mark.parametrize(("where", "holdout", "options", "objective", "params"), ROWS)
def test_chinchilla_rows(where, holdout, options, objective, params):
    """Failure would mean: the optimum is not reached, so every number downstream is the optimiser's, not the data's."""
    one = fit(chinchilla_runs(where, holdout), "chinchilla", **options)
    assert one.objective == pytest.approx(objective, rel=1e-11)
    for found, wanted, unit in zip(one.params.values(), params, (1e-5, 1e-3, 1e-3, 1e-5, 1e-5), strict=True):
        assert abs(found - wanted) <= unit, f"{one.params} against {params}"
    assert one.diagnostics["converged"]
    assert one.diagnostics["starts_agree"] == one.diagnostics["starts"]


def test_chinchilla_held_out_error():
    runs = chinchilla_runs(holdout="C >= 1e21")
    held = runs.take(runs.holdout)
    error = np.abs(fit(runs, "chinchilla").predict(held.n, held.d) / held.loss - 1)
    assert len(error) == 23
    assert 100 * error.mean() == pytest.approx(1.051, abs=5e-4)
    assert 100 * error.max() == pytest.approx(2.78, abs=5e-3)


def test_chinchilla_standard_errors():
    """Published: 4,000 bootstraps. 1,000 draws here, so their own scatter (B has a long tail) sets the tolerance."""
    runs = chinchilla_runs()
    one = bootstrap(fit(runs, "chinchilla"), runs, n=1000, seed=1)
    published = {"A": 124.52, "B": 1293.28, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    spread = {k: np.std(v) for k, v in one.params_of(one.draws).items()}
    for name, value in published.items():
        assert spread[name] == pytest.approx(value, rel=0.2 if name in "AB" else 0.1), spread


@pytest.mark.parametrize("law", JOINT)
def test_planted_truth_is_recovered(law):
    exact = fit(planted(law), law)
    for name, value in TRUTHS[law].items():
        assert exact.params[name] == pytest.approx(value, rel=1e-4), exact.params
    inside, noise = [], []
    for seed in range(12):
        runs = planted(law, noise=0.004, seed=seed)
        noisy = bootstrap(fit(runs, law), runs, n=200)
        inside += [noisy.intervals[k][0] <= v <= noisy.intervals[k][1] for k, v in TRUTHS[law].items()]
        noise.append(noisy.noise["sigma"])
    assert np.mean(inside) >= 0.8, "the 90 % intervals of the parameters are too narrow"
    assert np.mean(noise) == pytest.approx(0.004, rel=0.15)


@pytest.mark.parametrize("law", JOINT)
def test_gradients_match_finite_differences(law):
    rng = np.random.default_rng(0)
    form = LAWS[law]
    x, y = rng.normal(size=(2, 20))
    z = np.array([1.2, -0.5, 0.3, 0.4, 0.6, 0.7][: form.size])
    _, jacobian = form.log_value(z, (x, y))
    for i in range(form.size):
        step = np.zeros(form.size)
        step[i] = 1e-6
        numeric = (form.log_value(z + step, (x, y))[0] - form.log_value(z - step, (x, y))[0]) / 2e-6
        np.testing.assert_allclose(jacobian[i], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("law", JOINT)
def test_law_matches_its_formula_and_fit_predicts_it(law):
    p, n, d = TRUTHS[law], 3e5, 4e6
    if law == "kaplan":
        term = ((p["N_c"] / n) ** (p["alpha_N"] / p["alpha_D"]) + p["D_c"] / d) ** p["alpha_D"]
    else:
        term = (p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]) ** p.get("gamma", 1.0)
    assert LAWS[law].loss(p, n, d) == pytest.approx(p["E"] + term, rel=1e-12)
    one = fit(planted(law, noise=0.003), law)
    assert one.predict(n, d) == pytest.approx(LAWS[law].loss(one.params, n, d), rel=1e-9)
    assert one.predict([n, n], d).shape == (2,)


def test_a_perturbation_never_lowers_the_objective():
    """Failure would mean: the certificate (zero gradient, starts agree) is not worth its name."""
    runs = planted("coupled", noise=0.004, shape=(5, 4))
    x, y = np.log(runs.n), np.log(runs.d)
    rng = np.random.default_rng(0)
    for law in JOINT:
        one = fit(runs, law, delta=1e-3)
        assert one.diagnostics["converged"], one.diagnostics
        for scale in (1e-3, 1e-2, 1e-1):
            z = one.z + scale * rng.standard_normal((200, len(one.z)))
            low, high = np.array(LAWS[law].bounds).T
            z = np.clip(z, low, high)
            r = np.abs(LAWS[law].log_value(z, (x - one.centre["N"], y - one.centre["D"]))[0] - np.log(runs.loss))
            cost = np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum(axis=1)
            assert cost.min() >= one.objective * (1 - 1e-9)


def test_weights_act_like_repeats():
    runs = planted("chinchilla", noise=0.01, shape=(4, 4))
    twice = read_runs(pd.concat([runs.frame, runs.frame.head(5)]))
    weights = np.where(np.arange(16) < 5, 2.0, 1.0)
    a, b = fit(runs, "chinchilla", weights=weights), fit(twice, "chinchilla")
    assert a.objective == pytest.approx(b.objective, rel=1e-9)


def test_round_trip_gives_identical_predictions(tmp_path):
    runs = planted("coupled", noise=0.004, shape=(5, 5))
    one = bootstrap(fit(runs, "coupled"), runs, n=50, seed=3)
    again = load_fit(one.save(tmp_path / "deep" / "fit.json"))
    n, d = np.array([1e5, 3e6]), np.array([1e7, 3e8])
    assert np.array_equal(one.predict(n, d), again.predict(n, d))
    a, b = predict(one, n, d), predict(again, n, d)
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("value", "low", "high"))
    assert (again.params, again.intervals, again.summary()) == (one.params, one.intervals, one.summary())


def test_summary_says_what_a_reader_needs():
    runs = planted("chinchilla", noise=0.004)
    text = bootstrap(fit(runs, "chinchilla"), runs, n=20).summary()
    assert all(word in text for word in ("alpha", "90 %", "starts agree", "condition number", "delta 0.001", "assumed"))
