"""Published constants give the papers' own numbers, say where they stop holding, and answer a misspelt name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.laws.published import PUBLISHED, published_law, summary

PUBLIC = Path(os.environ.get("SCALING_PUBLIC_DATA", Path(__file__).parents[2] / "../shared/data"))


def table(name):
    path = PUBLIC / name
    if not path.exists():
        pytest.skip("public runs are absent: set SCALING_PUBLIC_DATA to their folder")
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def chinchilla_residuals(name):
    """Log residuals of the record on the 240 runs of the published fit."""
    runs = table("chinchilla/runs.csv").query("loss < 3.44")
    n, c = runs["Model Size"].to_numpy(), runs["Training FLOP"].to_numpy()
    return np.log(published_law(name).loss(n, c / (6 * n)) / runs["loss"].to_numpy())


def test_hoffmann_allocation_exponent():
    """The paper prints a = 0.46, b = 0.54; its rounded exponents give 0.45."""
    for name, wanted in (("hoffmann", 0.4516), ("hoffmann_unrounded", 0.4565)):
        p = published_law(name).params
        assert p["beta"] / (p["alpha"] + p["beta"]) == pytest.approx(wanted, abs=1e-4)


def test_rounding_of_hoffmann_is_as_large_as_said():
    """Failure would mean: the caution that comes with every prediction is not true."""
    assert chinchilla_residuals("hoffmann").mean() == pytest.approx(0.0167, abs=5e-4)
    assert chinchilla_residuals("hoffmann_unrounded").mean() == pytest.approx(-0.0031, abs=5e-4)
    assert "1.7 % high" in published_law("hoffmann").predict(1e9, 2e10).notes[0]


def test_besiroglu_is_the_least_absolute_deviations_fit():
    """The optimum is 0.00470622772; the four printed digits of the exponents cost half a per cent of it."""
    objective = np.abs(chinchilla_residuals("besiroglu")).mean()
    assert objective == pytest.approx(0.00472899, abs=1e-8)
    assert 1 < objective / 0.00470622772342 < 1.005
    assert objective < np.abs(chinchilla_residuals("hoffmann_unrounded")).mean()


def test_muennighoff_objective():
    """Published: Huber 1e-3 on log loss, summed over 182 runs, 0.01582593; and U_N = 0.051 U_D."""
    runs, record = table("data_constrained/runs.csv"), published_law("muennighoff")
    r = np.log(record.loss(runs["params"], runs["tokens"], runs["unique_tokens"]) / runs["loss"].to_numpy())
    huber = np.where(np.abs(r) <= 1e-3, r**2 / 2, 1e-3 * (np.abs(r) - 5e-4))
    assert huber.sum() == pytest.approx(0.01582593, abs=1e-8)
    p = record.params
    assert (p["A"] / p["B"]) ** (1 / p["alpha"]) == pytest.approx(0.051, abs=5e-4)


def test_repeated_tokens_are_worth_less():
    record, n, unique = published_law("muennighoff"), 1e8, 2e9
    once, fresh = record.loss(n, unique), record.loss(n, 10 * unique)
    assert record.loss(n, unique, unique) == pytest.approx(once)
    assert fresh < record.loss(n, 10 * unique, unique) < once
    assert record.loss(n, 10 * unique, 1e12) == pytest.approx(fresh)


# Loss on C4 of 10.6M, 78.9M, 154M and 412M parameters at D = 20 N, then of 10.6M at 320 N: the five runs of each fit,
# from the repository mlfoundations/scaling.
GADRE_N = np.array([10569312, 78914048, 153677376, 411616256, 10569312])
GADRE_RUNS = {
    "c4": (5.220676, 3.800284, 3.432646, 3.041737, 4.506404),
    "redpajama": (5.387021, 3.899943, 3.531147, 3.149769, 4.572293),
    "refinedweb": (5.271892, 3.860916, 3.517894, 3.130516, 4.516045),
}


@pytest.mark.parametrize("suffix", GADRE_RUNS)
def test_gadre_meets_the_runs_it_was_fitted_on(suffix):
    losses = np.array(GADRE_RUNS[suffix])
    predicted = published_law(f"gadre_{suffix}").loss(GADRE_N, GADRE_N * np.array([20, 20, 20, 20, 320.0]))
    assert np.abs(predicted / losses - 1).max() < 0.005
    assert np.sum((predicted - losses) ** 2) < 4.4e-4


def test_gadre_predicts_the_dearest_runs_as_printed():
    """The authors print 0.7103 % for 1.4B at M = 640 and 0.7320 % for 6.9B at M = 20, both on RedPajama."""
    record = published_law("gadre_redpajama")
    for n, m, loss, printed in ((1439795200, 640, 2.502053562, 0.7103), (6889410560, 20, 2.424993099, 0.7320)):
        assert 100 * abs(record.loss(n, n * m) / loss - 1) == pytest.approx(printed, abs=2e-3)
    assert "D/N = 640 is 2x above 320" in record.outside(1439795200, 1439795200 * 640)


def test_kaplan_overfitting_rule():
    """The paper: D of about 5e3 N^0.74 keeps the loss within 2 % of that of unlimited data; and no floor."""
    record = published_law("kaplan")
    n = np.geomspace(1e7, 1e9, 5)
    excess = record.loss(n, 5e3 * n**0.74) / record.loss(n, 1e30) - 1
    assert np.all((excess > 0.015) & (excess < 0.025)), excess
    assert record.loss(1e30, 1e30) < 0.1
    assert published_law("kaplan_n").loss(1e9, 1e9) == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert published_law("kaplan_d").loss(1e9, 1e9) == pytest.approx((5.4e13 / 1e9) ** 0.095)


def test_farseer_meets_the_public_runs_as_said():
    """Its nine rounded constants are 2.4 % low; a point within their rounding meets the runs to 0.2 %."""
    runs, record = table("farseer/train.parquet"), published_law("farseer")
    error = record.loss(runs["N"], runs["D"]) / runs["loss"].to_numpy() - 1
    assert error.mean() == pytest.approx(-0.024, abs=5e-4)
    assert np.abs(error).max() < 0.062
    inside = {"s": -0.02098431, "q": 0.1695, "S": -0.0905, "B": 88.015, "b": -0.09954486, "Q": -6.2865}
    inside |= {"A": -0.12423684, "a": 0.12323917, "E": 0.4235}
    for name, value in inside.items():
        half_unit = 0.005 if name == "B" else 0.0005
        assert abs(value - record.params[name]) <= half_unit * 1.0001
    near = type(record)(**{**vars(record), "params": inside})
    assert np.abs(near.loss(runs["N"], runs["D"]) / runs["loss"].to_numpy() - 1).mean() < 0.0025
    assert "not verified" in record.predict(1e9, 1e11).notes[-1]


def test_out_of_range_is_one_line():
    record = published_law("besiroglu")
    assert record.outside(1e9, 2e10) is None
    assert record.predict(1e9, 2e10).notes == ()
    line = record.predict(1e12, 2e13).notes[0]
    assert line.startswith("besiroglu: outside the fitted range: N = 1e+12 is 61.7x above 1.62e+10, D = 2e+13")
    assert "\n" not in line
    assert "N = 1e+06 is 57x below" in record.outside(np.array([1e6, 1e9]), 2e10)


def test_wrong_input_is_answered():
    with pytest.raises(InputError, match=r"no published law 'hofmann', did you mean 'hoffmann'\?"):
        published_law("hofmann")
    with pytest.raises(InputError, match=r"D = -1: expected positive numbers"):
        published_law("besiroglu").loss(1e9, -1)


def test_every_record_is_complete():
    for name, record in PUBLISHED.items():
        assert record.name == name
        assert record.n_counts in ("non-embedding", "with head", "total")
        assert "arXiv" in record.source
        assert record.checked
        assert np.isfinite(record.loss(1e8, 2e9))
        assert np.all(np.diff(record.loss(1e8, np.array([1e9, 1e10, 1e11]))) <= 0)
    assert summary().count("checked:") == len(PUBLISHED)
