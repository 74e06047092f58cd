"""The study of finetuning: its rules on planted data, and its tiny form."""

import contextlib
import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest

from sweeps.cli.main import main
from sweeps.studies import _stored as stored
from sweeps.studies import _transferred as transferred
from sweeps.studies._study import load_study

HORIZON = 2**21
SIZES = (7_000, 27_000, 101_000)


def scratch_loss(D, n):
    return 0.65 + 20 * D**-0.35 + 8 * n**-0.5


def planted_transfer(k, alpha, beta, noise=0.0):
    """(measurements, cells) of runs from scratch and of finetuned ones whose D_T is k D_F^alpha N^beta."""
    rng, rows, cells = np.random.default_rng(0), [], {}

    def add(arm, n, seed, D, loss, parent=""):
        run = f"run{len(rows)}"
        values = {"run": run, "evaluation": "result", "metric": "loss", "value": loss, "parent": parent}
        rows.append(values | {"n_compute": n, "seed": seed, "tokens": D, "flops": 6.0 * n * D, "trunk": run})
        cells[run] = {"arm": arm} | ({"D_p": 2e6, "main": True} if parent else {})

    for n, seed in itertools.product(SIZES, range(2)):
        for D in 2 ** np.arange(12, 22):
            add("scratch", n, seed, int(D), scratch_loss(D, n))
        for D, (arm, share) in itertools.product(
            2 ** np.arange(12, 19, 2), {"1": 1.0, "0.5": 0.5, "0": 0.2, "permuted": 0.2}.items()
        ):
            D_T = share * k * D**alpha * n**beta * np.exp(noise * rng.normal())
            add(arm, n, seed, int(D), scratch_loss(D + D_T, n), parent=f"parent-{n}-{seed}")
    return pd.DataFrame(rows), cells


def test_data_transferred_is_recovered_and_its_law_forecasts_the_largest():
    """The arithmetic of D_T: the scratch curve, turned around, gives what was planted."""
    frame, cells = planted_transfer(k=3.0, alpha=0.6, beta=0.4)
    rows = transferred.main_arm(frame, cells, transferred.ALL)
    truth = 3.0 * rows["tokens"] ** 0.6 * rows["n_compute"] ** 0.4
    assert (rows["side"] == 0).all()
    assert np.allclose(np.log(rows["D_T"]), np.log(truth), atol=0.1), "the curve is interpolated, no more"
    verdict = transferred.held_out(frame, cells)
    assert verdict.verdict == "upheld", verdict.note
    assert transferred.larger_gain_more(frame, cells).verdict == "upheld"
    assert transferred.sharing_pays(frame, cells).verdict == "upheld"
    assert transferred.symbols_do_not_matter(frame, cells).verdict == "upheld"
    assert transferred.nothing_from_another_world(frame, cells).verdict == "refuted"  # a fifth is no tenth


def test_what_lies_beyond_the_horizon_is_kept_as_at_least_that():
    """Dropped, or taken at the horizon, the points that transfer most would flatten the law."""
    frame, cells = planted_transfer(k=4.0, alpha=0.75, beta=0.4, noise=0.1)
    rows = transferred.main_arm(frame, cells, transferred.ALL).assign(held=False)
    truth = 4.0 * rows["tokens"] ** 0.75 * rows["n_compute"] ** 0.4
    beyond = rows["side"] == 1
    assert 3 <= beyond.sum() <= 10
    assert np.allclose(rows["D_T"][beyond] + rows["tokens"][beyond], HORIZON)
    assert (truth + rows["tokens"])[beyond].min() > 0.7 * HORIZON
    found = transferred.law(rows)
    assert found.n_right == beyond.sum()
    assert abs(found.params["alpha"] - 0.75) < 0.05
    assert abs(found.params["beta"] - 0.4) < 0.08
    taken = transferred.law(rows.assign(side=0))
    assert taken.params["alpha"] < found.params["alpha"] - 0.03
    note = transferred.held_out(frame, cells).note
    assert "beyond the horizon" in note


def test_forecasts_beyond_the_horizon_alone_uphold_nothing():
    """Of what is only known to be at least so much, a law that says a thousand times more is never wrong."""
    frame, cells = planted_transfer(k=3.0, alpha=0.6, beta=0.4)
    rows = transferred.main_arm(frame, cells, transferred.ALL)
    frame.loc[frame["run"].isin(rows.loc[rows["held"], "run"]), "value"] = 0.1  # below any loss from scratch
    verdict = transferred.held_out(frame, cells)
    assert verdict.verdict != "upheld"
    assert "too few are measured" in verdict.note


def test_ratios_that_are_only_bounds_do_not_uphold_what_they_lean_to():
    frame, cells = planted_transfer(k=3.0, alpha=0.6, beta=0.4)
    arm = frame["run"].map(pd.Series(cells).map(lambda cell: cell["arm"]))
    nothing = (arm == "1") & (frame["tokens"] == 2**12) & (frame["seed"] == 0)
    frame.loc[nothing, "value"] = scratch_loss(2**12, frame["n_compute"])[nothing] + 0.5  # worse than from scratch
    gaps = transferred.paired(frame, cells, transferred.ALL, transferred.HALF)
    assert sorted(set(gaps["side"])) == [-1, 0]
    verdict = transferred.sharing_pays(frame, cells)
    assert verdict.verdict == "undecided"
    assert "3 of 24 pairs left out" in verdict.note


def test_noise_between_seeds_leaves_every_claim_of_transfer_open():
    frame, cells = planted_transfer(k=3.0, alpha=0.6, beta=0.4, noise=2.0)
    for rule in (
        transferred.sharing_pays,
        transferred.larger_gain_more,
        transferred.symbols_do_not_matter,
        transferred.nothing_from_another_world,
    ):
        verdict = rule(frame, cells)
        assert verdict.verdict == "undecided", (rule, verdict)


def test_a_law_that_bends_is_refuted_by_its_held_out_runs():
    frame, cells = planted_transfer(k=3.0, alpha=0.6, beta=0.4)
    arm = pd.Series(cells).map(lambda cell: cell["arm"])
    most = (frame["tokens"] == 2**18) & (frame["run"].map(arm) == "1")
    nothing_more = scratch_loss(2**18 + 3.0 * 2 ** (16 * 0.6) * frame["n_compute"] ** 0.4, frame["n_compute"])
    frame.loc[most, "value"] = nothing_more[most]  # as much as at 2^16
    assert transferred.held_out(frame, cells).verdict == "refuted"


def planted_storage(c=1.2, s=3.0, sag=0.0, told=0.0, noise=0.02, unsure=0.0):
    """(measurements, cells) of adapters that store as the law says; `sag` makes c fall with M, `told` is the share of
    values that can be told without storing them, as by a leak. noise: of log bits; unsure: of losses, nats.
    """
    rng, rows, cells = np.random.default_rng(1), [], {}

    def forgotten(more):
        return 5.0 + more + unsure * rng.normal()

    for seed, M, rank in itertools.product(range(3), (125, 250, 500, 1000, 2000), (1, 2, 4, 8, 16, stored.FULL)):
        run, F, P = f"run{len(rows)}", 10.0 * M, 1200 * rank
        room = c * P * (M / 500) ** -sag
        bits = F * (1 + (room / F) ** -s) ** (-1 / s) if rank else 0.999 * F
        bits *= np.exp(noise * rng.normal() * bool(rank))
        logprob = (bits / M - 10) * np.log(2)
        values = {"run": run, "seed": seed, "n_trained": P or 27_000, "rank": rank, "trunk": run, "tokens": 500 * M}
        rows.append(values | {"evaluation": "answers", "metric": "answer_logprob", "value": logprob, "stderr": 0.0})
        rows.append(
            values | {"evaluation": "forgetting", "metric": "loss", "value": forgotten(rank / 100), "stderr": 0.0}
        )
        cells[run] = {"arm": "grid", "asked": "", "M": M, "rank": rank, "share": 0.0}
    for seed in range(3):
        values = rows[0] | {"run": f"redrawn{seed}", "seed": seed, "rank": 16}
        rows.append(values | {"value": (told * 10 - 10) * np.log(2) + 1e-4 * rng.normal()})
        cells[values["run"]] = {"arm": "redrawn", "asked": "", "M": 500, "rank": 16, "share": 0.0}
    arms = {("replay", p): 4 / (1 + 600 * p) ** 0.6 for p in (0.005, 0.01, 0.05, 0.2, 0.5)}
    arms |= {("untouched", 0.0): 0.0, ("marker", 0.0): 2.0, ("slow", 0.0): 2.0}
    for seed, ((arm, share), risen) in itertools.product(range(3), arms.items()):
        run = f"{arm}{share}{seed}"
        values = rows[0] | {"run": run, "seed": seed, "rank": stored.FULL}
        bits = 0.999 * np.exp(noise * rng.normal() * (arm != "untouched")) if noise > 0.1 else 0.999
        rows.append(values | {"value": (10 * bits - 10) * np.log(2)})
        loss = {"evaluation": "forgetting", "metric": "loss", "value": forgotten(risen - 4)}
        rows.append(values | loss)
        cells[run] = {"arm": arm, "asked": "", "M": 500, "rank": stored.FULL, "share": share}
    return pd.DataFrame(rows), cells


RULES_OF_STORAGE = {
    "capacity": stored.capacity,
    "knee": stored.knee,
    "runs_out": lambda frame, cells: stored.runs_out(frame, cells, 500),
    "forgets_no_less": lambda frame, cells: stored.forgets_no_less(frame, cells, 500),
    "one_percent": lambda frame, cells: stored.one_percent(frame, cells, 500),
    "replay": lambda frame, cells: stored.replay(frame, cells, 500),
    "marker": lambda frame, cells: stored.saved(frame, cells, 500, "marker"),
    "slow": lambda frame, cells: stored.saved(frame, cells, 500, "slow"),
}


def test_seeds_that_agree_decide_and_seeds_that_do_not_leave_every_claim_of_storage_open():
    """The same truths with and without noise: only seeds that agree may uphold them."""
    clear, loud, uneasy = planted_storage(), planted_storage(noise=0.5, unsure=1.0), planted_storage(unsure=0.05)
    for name, rule in RULES_OF_STORAGE.items():
        if name != "runs_out":  # the largest rank of the planted law stores too much
            assert rule(*clear).verdict == "upheld", (name, rule(*clear))
        found = rule(*(uneasy if name == "replay" else loud))  # whose rise must be above 0
        assert found.verdict == "undecided", (name, found)
    frame, cells = clear
    redrawn = frame["run"].str.startswith("redrawn")
    frame.loc[redrawn, "value"] += np.linspace(-0.5, 0.5, redrawn.sum())
    assert stored.nothing(frame, cells).verdict == "undecided"


def test_bits_are_ten_a_fact_none_for_a_guess_and_less_for_a_sure_mistake():
    assert stored.bits_stored(500, 0.0) == 5000
    assert stored.bits_stored(500, -2 * np.log(32)) == pytest.approx(0)
    assert stored.bits_stored(500, -20.0) < -9000


def test_the_law_of_capacity_and_its_knee_are_recovered():
    frame, cells = planted_storage()
    verdict = stored.capacity(frame, cells)
    assert verdict.verdict == "upheld"
    assert "c 1.2" in verdict.note or "c 1.1" in verdict.note
    knee = stored.knee(frame, cells)
    assert knee.verdict == "upheld"
    assert abs(knee.measured - 1) < 0.1
    assert stored.forgets_no_less(frame, cells, 500).verdict == "upheld"


def test_a_capacity_that_falls_with_the_facts_is_refuted():
    frame, cells = planted_storage(sag=0.5)
    assert stored.capacity(frame, cells).verdict == "refuted"
    assert stored.knee(frame, cells).measured > 1.25


def test_where_values_can_be_told_without_storing_them_no_capacity_is_claimed():
    frame, cells = planted_storage(told=0.1)
    assert stored.nothing(frame, cells).verdict == "refuted"
    for rule in (stored.capacity, stored.knee):
        verdict = rule(frame, cells)
        assert verdict.verdict == "undecided"
        assert "control redrawn refuted" in verdict.note


def test_a_knee_beyond_the_ranks_is_censored():
    frame, cells = planted_storage(c=0.7)
    found = stored.knees(stored.adapters(frame, cells))
    assert set(found.loc[found["M"] == 2000, "side"]) == {1}
    assert stored.knee(frame, cells).measured == pytest.approx(1, abs=0.1)


def test_the_law_of_replay_is_recovered():
    share = np.array([0, 0.005, 0.01, 0.05, 0.2])
    log_F, log_B, alpha = stored.replay_law(share, 7.0 / (1 + 600 * share) ** 0.6)
    assert np.exp([log_F, log_B]) == pytest.approx([7.0, 600], rel=1e-3)
    assert alpha == pytest.approx(0.6, rel=1e-3)


def test_every_run_that_stores_is_asked_and_parents_are_there():
    _, study = load_study("finetuning")
    ids = {run.run_id for run in study.runs}
    assert {run.parent for run in study.runs if run.parent} <= ids
    for run in study.runs:
        asked = [spec.label for spec in study.evaluations if spec.asks(run) and spec.name == "answers"]
        assert len(asked) == ("uniform" in run.data.source), run.data.source
    assert all("seed=109" not in run.data.source for run in study.runs), "rates were tuned on that seed"


@pytest.mark.slow
def test_the_tiny_form_runs_and_gives_every_claim(tmp_path):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["study", "finetuning", "--dial", "tiny", "--out", str(tmp_path / "out"), "--json"])
    result = json.loads(printed.getvalue())
    assert code == 0
    _, study = load_study("finetuning")
    assert [claim["name"] for claim in result["claims"]] == [claim.name for claim in study.claims]
    notes = " ".join(claim["note"] for claim in result["claims"])
    assert "its rule failed" not in notes
    assert "lacking" not in notes
    assert len(pd.read_csv(tmp_path / "out" / "measurements.csv")) > 60
