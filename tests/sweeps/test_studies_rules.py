"""The rules of verdicts: what noise leaves open is undecided, and rates of error are as stated."""

import numpy as np
import pandas as pd
import pytest

from analysis.metric import Prediction
from analysis.uncertainty.clustered import Interval
from analysis.uncertainty.equivalence import decide
from analysis.uncertainty.isotonic import isotonic
from models.errors import InputError
from sweeps.studies._rules import (
    all_of,
    chosen,
    coefficient,
    contains,
    controlled,
    curves_of,
    fitted,
    monotone,
    null,
    rows_of,
    sign,
    slope,
    within,
)
from sweeps.studies._study import Verdict


@pytest.mark.parametrize(
    ("measured", "stderr", "widest", "verdict"),
    [
        (1.1, 0, np.inf, "upheld"),
        (1.3, 0, np.inf, "refuted"),
        (1.3, 0.2, np.inf, "undecided"),
        (1.1, 0, 0.3, "undecided"),
    ],
)
def test_a_prediction_is_upheld_inside_and_refuted_beyond_the_noise(measured, stderr, widest, verdict):
    found = contains(Prediction(1.0, 0.8, 1.2), measured, stderr, widest)
    assert found.verdict == verdict
    assert (found.predicted, found.low, found.high, found.measured) == (1.0, 0.8, 1.2, measured)


def test_without_an_interval_nothing_is_decided():
    assert contains(Prediction(1.0), 1.0).verdict == "undecided"


def test_the_sample_that_is_asked_for_decides():
    found = contains(Prediction(1.0, 0.8, 1.2), 1.3, 0.2)
    times = int(found.note.split("; ")[-1].split()[0])
    assert contains(Prediction(1.0, 0.8, 1.2), 1.3, 0.2 / (times + 1) ** 0.5).verdict == "refuted"


def test_errors_within_a_share():
    assert within([1.0, 2.0], [1.005, 1.99], 0.01).verdict == "upheld"
    worst = within([1.0, 2.0], [1.005, 1.9], 0.01)
    assert (worst.verdict, worst.measured) == ("refuted", 1.9)
    assert worst.low == pytest.approx(1.881)
    assert within([1.0, 2.0], [1.005, 1.9], 0.01, [0.01, 0.1]).verdict == "undecided"
    with pytest.raises(InputError, match="no held-out values"):
        within([], [], 0.01)


def test_a_null_is_upheld_only_where_the_data_show_it():
    for estimate, stderr, verdict in ((0.0, 0.005, "upheld"), (0.01, 0.03, "undecided"), (0.08, 0.01, "refuted")):
        found = null(decide(estimate, stderr, 9, 0.03, 10))
        assert found.verdict == verdict
        assert ("more runs would decide" in found.note) == (verdict == "undecided")


def test_a_sign_needs_the_whole_interval():
    assert sign(Interval(0.5, 0.1, 0.9, 8, np.empty(0)), 1).verdict == "upheld"
    assert sign(Interval(0.5, 0.1, 0.9, 8, np.empty(0)), -1).verdict == "refuted"
    assert sign(Interval(0.5, 0.1, 0.9, 8, np.empty(0)), 1, least=0.2).verdict == "undecided"
    open_ = sign(Interval(0.3, -0.3, 0.9, 8, np.empty(0)), 1)
    assert (open_.verdict, open_.note) == ("undecided", "about 24 more runs would decide")  # four times as many
    with pytest.raises(InputError, match=r"\+1 or -1"):
        sign(Interval(0.5, 0.1, 0.9, 8, np.empty(0)), 0)


def test_a_true_zero_slope_passes_for_one_as_rarely_as_stated():
    """Runs share noise: of 400 studies without a trend at most about a twentieth uphold a rising one."""
    rng, upheld = np.random.default_rng(0), 0
    x = np.repeat(np.linspace(0, 2, 8), 10)
    for _ in range(400):
        y = np.repeat(rng.standard_normal(8), 10) + 0.2 * rng.standard_normal(80)
        upheld += sign(slope(x, y, np.repeat(np.arange(8), 10)), 1).verdict == "upheld"
    assert upheld / 400 < 0.08


def test_the_law_with_the_least_held_out_error_is_chosen():
    errors = {"power": 0.02, "beta": 0.1, "lognormal": 0.05}
    assert chosen(errors, "power", 2).verdict == "upheld"
    assert chosen(errors, "lognormal").verdict == "refuted"
    assert chosen(errors, "lognormal", 3).verdict == "undecided"
    assert chosen({"power": 0.1, "beta": 0.1001}, "power").verdict == "undecided", "a tie is no victory"
    with pytest.raises(InputError, match="above 1"):
        chosen(errors, "power", 1)
    with pytest.raises(InputError, match="and a rival"):
        chosen({"power": 1.0}, "power")


def test_parts_and_controls_of_a_claim():
    up, no, open_ = (Verdict("", v, measured=m, note=v) for v, m in (("upheld", 1), ("refuted", 2), ("undecided", 3)))
    assert all_of(up, up).verdict == "upheld"
    assert (all_of(up, open_).measured, all_of(open_, no, up).measured) == (3, 2)
    assert all_of(up, no).note == "upheld; refuted"
    assert controlled(up, null=up) == up
    held = controlled(up, null=no)
    assert (held.verdict, held.measured) == ("undecided", 1)
    assert held.note.startswith("control null refuted (refuted)")


def test_a_curve_over_problems_is_monotone_refuted_or_open():
    rng = np.random.default_rng(2)

    def rows(means, problems=400):
        p = np.array(means)
        return pd.DataFrame(
            {"run": f"r{i % 2}", "problem": i // 2, "budget": 2**j, "value": float(rng.random() < p[j])}
            for i in range(problems)
            for j in range(len(p))
        ).sample(frac=1, random_state=0)

    verdicts = {}
    for name, means in {"rises": [0.2, 0.5, 0.8], "turns": [0.2, 0.7, 0.4], "flat": [0.5, 0.5, 0.5]}.items():
        x, values = curves_of(rows(means), "budget")
        assert x.tolist() == [1, 2, 4]
        assert values.shape == (400, 3)
        verdicts[name] = monotone(isotonic(x, values, draws=400))
    assert [v.verdict for v in verdicts.values()] == ["upheld", "refuted", "undecided"]
    assert "fails at 2 to 4" in verdicts["turns"].note
    twice = pd.concat([rows([0.2, 0.5], 4)] * 2)
    with pytest.raises(InputError, match="not every problem has one value at each budget"):
        curves_of(twice, "budget")


def measurements() -> pd.DataFrame:
    """As a study has them: reward of the best of n, of pools that share noise, a column loss and trunk beside it."""
    rng, rows = np.random.default_rng(1), []
    for run in range(6):
        noise = 0.02 * rng.standard_normal()
        for kl in np.geomspace(0.05, 8, 12):
            d = kl**0.5
            value = d * (0.9 - 0.2 * d) + noise + 0.01 * rng.standard_normal()
            rows.append(
                {"run": f"r{run}", "trunk": f"r{run}", "loss": 3.0, "n_compute": 5e4, "tokens": 1e6, "kl": kl}
                | {"evaluation": "pool", "metric": "gold", "value": value, "status": "finished"}
            )
    return pd.DataFrame(rows)


def test_a_law_is_fitted_to_a_column_of_the_measurements():
    frame = rows_of(measurements(), "pool", metric="gold")
    one, runs = fitted(frame, "best_of_n", {"K": "kl"}, holdout="kl > 4", objective="lsq", draws=100)
    assert one.params["beta"] == pytest.approx(0.2, abs=0.04)
    assert one.cluster == "trunk"
    assert runs.holdout.sum() == 12
    low, high = one.intervals["alpha"]
    assert low <= 0.9 <= high


def test_a_law_of_n_alone_needs_no_tokens():
    n = np.geomspace(1e4, 1e5, 12)
    frame = pd.DataFrame({"n_compute": n, "f": np.tile([1e4, 3e4, 1e5], 4), "run": map(str, range(12)), "loss": 2.0})
    frame["value"] = 30 * frame["f"] ** 0.4 * n**0.3
    one, _ = fitted(frame, "transfer", {"F": "f", "N": "n_compute"}, draws=10)
    assert (one.params["alpha"], one.params["beta"]) == (pytest.approx(0.4, abs=1e-3), pytest.approx(0.3, abs=1e-3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: rows_of(f, "pole"), r"none with evaluation = 'pole' \(there are pool\)"),
        (lambda f: rows_of(f, metrik="gold"), "no column 'metrik', did you mean 'metric'"),
        (lambda f: slope([1, 1], [1, 2]), "all x are equal"),
    ],
)
def test_bad_questions_are_answered(call, words):
    with pytest.raises(InputError, match=words):
        call(measurements())


def test_an_error_within_the_share_but_not_beyond_its_noise_is_undecided():
    """A measurement that says nothing must uphold nothing."""
    assert within([1.05], [1.0], 0.1, [5.0]).verdict == "undecided"
    assert within([1.05], [1.0], 0.1, [0.01]).verdict == "upheld"


def test_a_change_of_slope_is_found_and_clusters_widen_it():
    """Two groups whose slopes are 0.5 and 0.8 apart from noise shared by cluster."""
    rng = np.random.default_rng(0)
    x, group = np.tile(np.arange(8.0), 12), np.repeat(np.arange(12) % 2, 8)
    cluster = np.repeat(np.arange(12), 8)
    y = (0.5 + 0.3 * group) * x + rng.normal(0, 0.1, 12)[cluster] + rng.normal(0, 0.1, 96)
    design = np.stack([group * x, x, group, np.ones(96)], axis=1)
    found = coefficient(design, y, cluster)
    assert 0.3 in found
    assert found.high - found.low < 0.1
    with pytest.raises(InputError, match="do not tell"):
        coefficient(np.stack([x, x], axis=1), y)
