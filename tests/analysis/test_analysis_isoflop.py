"""Compute-optimal allocation without a law: exact on a planted law, refusing where the runs show no optimum."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.forecast.isoflop import METHODS, envelope, isoflop
from analysis.runs import read_runs

PUBLIC = Path(os.environ.get("SCALING_PUBLIC_DATA", Path(__file__).parents[2] / "../shared/data"))
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # approach 3 of Hoffmann et al.: exponents that differ
TRUE_A = BETA / (ALPHA + BETA)
BUDGETS = np.geomspace(1e18, 1e21, 6)


def best_n(c):
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (c / 6) ** TRUE_A


def law(n, d):
    return E + A * n**-ALPHA + B * d**-BETA


def slices(ratio=4.0, points=7, noise=0.0, seed=0, budgets=BUDGETS, centre=lambda c: 1.0, grid=None):
    """Runs at each budget, their N log-spaced over a factor `ratio` about `centre` times the optimum, or on `grid`."""
    rows = []
    for c in budgets:
        sizes = best_n(c) * centre(c) * np.geomspace(ratio**-0.5, ratio**0.5, points) if grid is None else grid
        rows += [(n, c / (6 * n), c, law(n, c / (6 * n))) for n in sizes]
    frame = pd.DataFrame(rows, columns=["N", "D", "C", "loss"])
    frame["loss"] *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(frame)))
    return read_runs(frame, c_column="C")


def chinchilla_runs():
    path = PUBLIC / "chinchilla/runs.csv"
    if not path.exists():
        pytest.skip("public runs are absent: set SCALING_PUBLIC_DATA to their folder")
    return read_runs(path, n_column="Model Size", c_column="Training FLOP", where="`loss` < 3.44")


@pytest.mark.parametrize("method", METHODS)
def test_narrow_centred_slices_give_the_truth(method):
    found = isoflop(slices(), method)
    assert found.a == pytest.approx(TRUE_A, abs=1e-3)
    assert found.b == pytest.approx(1 - TRUE_A, abs=1e-3)
    n, d = found.at(1e20).N, found.at(1e20).D
    assert n == pytest.approx(best_n(1e20), rel=0.005)
    assert d == pytest.approx(1e20 / (6 * n), rel=1e-3)
    assert all(s.accepted and not s.reason for s in found.slices)
    assert not found.notes


def test_wide_slices_bias_the_parabola_and_say_so():
    """Failure would mean: a grid that misleads even without noise passes unremarked."""
    narrow, wide = isoflop(slices(points=12)), isoflop(slices(ratio=300, points=12))
    miss = [np.log(f.at(3e19).N / best_n(3e19)) for f in (narrow, wide)]
    assert abs(miss[0]) < 0.005
    assert miss[1] > 0.04
    assert {s.reason for s in wide.slices} == {"wide: N spans a factor 300 (N* is biased)"}
    spline = isoflop(slices(ratio=300, points=12), "akima")
    assert abs(np.log(spline.at(3e19).N / best_n(3e19))) < 0.3 * miss[1]


def test_one_grid_for_all_budgets_biases_the_exponent_and_says_so():
    """The optimum wanders through the grid, so the bias of N* changes with C and enters a."""
    runs = slices(grid=np.geomspace(2e7, 3e10, 12))
    found = isoflop(runs)
    assert found.a - TRUE_A > 0.005
    assert "off-centre" in found.slices[0].reason
    assert "the optimum moves from -0.66 to +0.25 half widths" in found.notes[0]
    assert abs(isoflop(runs, width=4).a - TRUE_A) < 0.6 * (found.a - TRUE_A)


def test_slices_are_found_named_or_listed():
    """The same slices from a column, from a list of budgets, and from C itself with 3 % of scatter."""
    runs = slices()
    runs.frame["budget"] = runs.flops
    assert isoflop(runs, by="budget").a == isoflop(runs).a == isoflop(runs, by=BUDGETS, tolerance=0.05).a
    rng = np.random.default_rng(0)
    c = runs.flops * np.exp(0.03 * rng.uniform(-1, 1, len(runs)))
    d = c / (6 * runs.n)
    scattered = isoflop(read_runs(pd.DataFrame({"N": runs.n, "D": d, "loss": law(runs.n, d)})))
    assert [s.runs for s in scattered.slices] == [7] * 6
    assert scattered.a == pytest.approx(TRUE_A, abs=0.005), "the scatter of C was not taken off"


def one_bad(change):
    """Six slices, the third changed."""
    runs = slices()
    frame = runs.frame.copy()
    rows = np.flatnonzero(np.isclose(frame["C"], BUDGETS[2]))
    return read_runs(change(frame, rows), c_column="C")


def test_slices_without_a_minimum_are_refused():
    def concave(frame, rows):
        frame.loc[rows, "loss"] = 6.0 - frame.loc[rows, "loss"]
        return frame

    def few(frame, rows):
        return frame.drop(rows[:3])

    def outside(frame, rows):
        frame.loc[rows, "loss"] = frame.loc[rows, "N"] ** -0.05 + 1e-3 * np.linspace(-1, 1, len(rows)) ** 2
        return frame

    def flat(frame, rows):
        frame.loc[rows, "loss"] = 3.0 + 0.01 * np.array([0, 1, -1, 1.5, -1.5, 1, 0.3])
        return frame

    for change, words in (
        (concave, "concave"),
        (few, "4 sizes"),
        (outside, "outside the data, at larger N"),
        (flat, "flat"),
    ):
        found = isoflop(one_bad(change), tolerance=0.01, by=BUDGETS)
        bad = found.slices[2]
        assert not bad.accepted, change.__name__
        assert words in bad.reason
        assert bad.N is None
        assert found.a == pytest.approx(TRUE_A, abs=1e-3), "a refused slice was used"
    assert "outside the data" in isoflop(one_bad(outside), "akima").slices[2].reason


@pytest.mark.parametrize(("method", "points"), [("parabola", 7), ("parabola", 14), ("akima", 9)])
def test_intervals_cover_the_truth(method, points):
    """Noise of 0.3 %: 90 % intervals of a over 40 draws; under 80 % would mean that they are too narrow."""
    covered = []
    for seed in range(40):
        found = isoflop(slices(ratio=10, points=points, noise=0.003, seed=seed), method, n=200, seed=seed)
        low, high = found.intervals["a"]
        covered.append(low <= TRUE_A <= high)
    assert np.mean(covered) >= 0.8


def test_envelope_follows_the_best_runs():
    rng = np.random.default_rng(3)
    c = np.exp(rng.uniform(np.log(1e18), np.log(1e21), 600))
    n = best_n(c) * np.exp(rng.uniform(-2, 2, 600))
    found = envelope(read_runs(pd.DataFrame({"N": n, "D": c / (6 * n), "loss": law(n, c / (6 * n))})))
    assert found.a == pytest.approx(TRUE_A, abs=0.05)
    assert found.intervals["a"][0] < TRUE_A < found.intervals["a"][1]
    small = n < 0.7 * best_n(c)
    with pytest.raises(InputError, match="the best run is the largest of the bin"):
        envelope(read_runs(pd.DataFrame({"N": n, "D": c / (6 * n), "loss": law(n, c / (6 * n))})[small]), bins=2)


def test_public_chinchilla_runs():
    """Hoffmann et al. print a = 0.50 (0.488, 0.502) for approach 1, 0.49 (0.462, 0.534) for approach 2."""
    runs = chinchilla_runs()
    parabola, spline, best = isoflop(runs), isoflop(runs, "akima"), envelope(runs)
    for found in (parabola, spline, best):
        assert 0.45 < found.a < 0.55
        assert found.intervals["a"][0] < 0.50 < found.intervals["a"][1]
    assert sum(s.accepted for s in parabola.slices) == 12
    assert 10 < parabola.at(1e21).D / parabola.at(1e21).N < 40, "tokens per parameter are about 20"
    assert "194x above the slices" in parabola.at(5.76e23).warning
    assert parabola.at(1e20).warning is None


def test_allocation_is_reported_whole():
    found = isoflop(slices(noise=0.002))
    one = found.at(1e19)
    assert one.N_interval[0] < one.N < one.N_interval[1]
    assert one.D_interval[0] < one.D < one.D_interval[1]
    assert len(found.table()) == 6
    assert found.summary().startswith("Compute-optimal allocation by isoFLOP parabola: 6 of 6 slices accepted")
    again = json.loads(json.dumps(found.to_json()))
    assert again["a"] == found.a
    assert len(again["slices"]) == 6
    assert isoflop(slices(noise=0.002)).to_json() == found.to_json(), "the same seed gives another answer"


def test_held_out_runs_are_not_seen():
    frame = slices().frame
    runs = read_runs(frame, c_column="C", holdout=f"C > {BUDGETS[-1] * 0.9}")
    assert len(isoflop(runs).slices) == 5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: isoflop(r, "parabla"), "did you mean 'parabola'"),
        (lambda r: isoflop(r, by="budgt"), "no column 'budgt' to slice by"),
        (lambda r: isoflop(r, by=[1e18, -1.0]), "by = [1e+18, -1.0]: expected positive budgets"),
        (lambda r: isoflop(r, tolerance=-1), "tolerance = -1: expected a number from"),
        (lambda r: isoflop(r.take(np.arange(len(r)) % 7 == 0)), "use the envelope"),
        (lambda r: isoflop(r.take(r.flops < 2e18)), "1 of 1 slices show an optimum, 2 are needed"),
        (lambda r: isoflop(r).at(-1), "C = -1: give the compute"),
        (lambda r: envelope(r.take(r.flops < 2e18)), "span less than a factor 2 in C"),
        (lambda r: envelope(r, bins=1), "bins = 1: expected a number from 2"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call(slices())
    assert words in str(error.value)
    assert "\n" not in str(error.value)
