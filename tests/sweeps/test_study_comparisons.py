"""The study of comparisons: its tiny form to the end, and its rules on curves that are known."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from scaling.evaluation.pool import measured
from sweeps.cli.main import main
from sweeps.studies import _gao as gao
from sweeps.studies import comparisons
from sweeps.studies._study import load_study
from sweeps.studies.comparisons import Cell


@pytest.mark.slow
def test_the_tiny_form_gives_every_claim_a_verdict(tmp_path, capsys):
    """If this fails, a run, an evaluation, the second stage or a rule breaks: no claim's rule may fail of itself."""
    main(["study", "comparisons", "--dial", "tiny", "--out", str(tmp_path / "out"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    claims = [claim.name for claim in load_study("comparisons", "tiny")[1].claims]
    assert [claim["name"] for claim in printed["claims"]] == claims
    assert not [claim for claim in printed["claims"] if "its rule" in claim["note"] or "lacking" in claim["note"]]
    assert printed["flops"] > 0


def test_a_reward_model_is_asked_once_at_its_better_horizon():
    """Early stopping chooses by validation loss, within a cell: never across sizes, pairs or seeds."""
    study = load_study("comparisons", "tiny")[1]
    rng = np.random.default_rng(0)
    loss = {config.run_id: rng.random() for config in study.runs}
    frame = pd.DataFrame({"run": list(loss), "evaluation": "result", "value": list(loss.values())})
    runs, specs = study.then(frame)
    assert runs == ()
    plan = comparisons.tiny_plan()
    for spec, arm in zip(specs, ("proxy", "coin", "straight"), strict=True):
        asked = [config for config in study.runs if spec.asks(config)]
        assert {plan[config] for config in asked} == {cell for cell in plan.values() if cell.arm == arm}
        for config in asked:
            rivals = [loss[other.run_id] for other, cell in plan.items() if cell == plan[config]]
            assert loss[config.run_id] == min(rivals)


@pytest.fixture(scope="module")
def planted():
    """(cells, measurements) of a study whose proxies are z with noise, and see no curvature; of b = 0 and of labels by
    chance too; a policy of DPO stands a tenth below the optimum.
    """
    rng, M = np.random.default_rng(0), 2**15
    z = rng.normal(size=M)
    cells, rows = {"policy": Cell("policy")}, []

    def ask(run: str, label: str, proxy: np.ndarray, b: float = 0.2) -> list[dict]:
        n, kl = 2 ** np.arange(12), (0.05, 0.2, 0.5, 1.0, 1.5, 2.0) if label in ("pool-gold", "pool-proxy") else ()
        found = measured((proxy - proxy.mean()) / proxy.std(), z - b * z**2, n, kl)
        about = {"run": run, "evaluation": label, "n_compute": 24 * width(run) ** 2}
        rows.extend(about | row for row in found)
        return found

    ask("policy", "pool-gold", z - 0.2 * z**2)
    for i in range(comparisons.DRAWS):
        ask("policy", f"random-{i}", rng.normal(size=M))
    for size in comparisons.SIZES:
        for pairs in (300, 3_000, 30_000):
            for seed in range(1 if size == comparisons.HELD_SIZE else 2):
                run, r = f"{size}-{pairs}-{seed}", 1 / np.sqrt(1 + 300 / pairs)
                cells[run] = Cell("proxy", size, pairs, seed)
                found = ask(run, "pool-proxy", r * z + np.sqrt(1 - r**2) * rng.normal(size=M))
                rows.append({"run": run, "evaluation": "result", "metric": "loss", "value": 0.6, "n_compute": 1})
    for seed in range(3):
        cells |= {f"S1-coin-{seed}": Cell("coin", "S1"), f"S1-straight-{seed}": Cell("straight", "S1")}
        ask(f"S1-coin-{seed}", "pool-coin", rng.normal(size=M))
        ask(f"S1-straight-{seed}", "pool-straight", z + 0.3 * rng.normal(size=M), 0.0)
        cells[f"S3-dpo-{seed}"] = Cell("dpo", "S3", 30_000, seed, 1.0)
        optimum = next(row for row in found if row["metric"] == "optimum" and row["kl"] > 0.9)
        for metric, value in (("gold", optimum["value"] - 0.1), ("kl", optimum["kl"])):
            rows.append({"run": f"S3-dpo-{seed}", "evaluation": "gold", "metric": metric, "value": value})
    return cells, pd.DataFrame(rows)


def width(run: str) -> int:
    return comparisons.SIZES.get(run.split("-")[0], 32)


def test_a_planted_world_gets_the_verdicts_that_it_was_planted_with(planted):
    """Proxies that see no curvature turn where theory says, at d = 1 / (2 sqrt(2) b r) of the exact optimum and near it
    of best of n; more pairs help and a larger model does not; what is random is flat; b = 0 has no hump.
    """
    cells, frame = planted
    verdicts = {}
    for claim in comparisons.claims(cells):
        own = [run for run in cells if claim.runs is None or claim.runs(SimpleNamespace(run_id=run))]
        verdicts[claim.name] = claim.decide(frame[frame["run"].isin(own)])
    expected = {
        "form": "upheld",
        "peak": "upheld",
        "more-pairs-more-reward": "upheld",
        "optimum-follows-best-of-n": "upheld",
        "gold-only-rises": "upheld",
        "false-alarm": "upheld",
        "no-curvature-no-hump": "upheld",
        "dpo-below-the-optimum": "upheld",
    }
    assert {name: (verdicts[name].verdict, verdicts[name].note) for name in expected} == {
        name: (verdict, verdicts[name].note) for name, verdict in expected.items()
    }
    assert verdicts["random-is-flat"].verdict != "refuted"
    assert verdicts["larger-proxy-more-reward"].low < 0.02
    assert verdicts["dpo-below-the-optimum"].measured == pytest.approx(-0.1, abs=0.05)


def test_the_table_has_a_row_for_each_proxy_and_policy_and_the_figures_are_drawn(planted):
    cells, frame = planted
    rows = comparisons.table(cells, frame)
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 2 + sum(cell.arm in ("proxy", "dpo") for cell in cells.values())
    assert len(comparisons.figures(cells, frame)) == 2


def curve(alpha: float, beta: float, run: str = "a") -> pd.DataFrame:
    k = 2.0 ** np.arange(1, 13)
    d = np.sqrt(np.log(k) - (k - 1) / k)
    return pd.DataFrame({"run": run, "k": k, "d": d, "gain": d * (alpha - beta * d)})


def test_a_planted_law_gives_its_coefficients_its_top_and_its_forecast():
    rows = curve(1.4, 0.35)
    assert gao.coefficients(rows) == pytest.approx([1.4, 0.35])
    assert gao.top_of(rows) == pytest.approx(1.4 / 0.7)
    assert gao.rms(gao.forecast(rows, rows["k"] <= gao.FITTED)) == pytest.approx(0, abs=1e-12)
    assert gao.top_of(curve(1.4, 0.1)) == np.inf


def test_the_verdict_on_an_error_follows_its_interval_over_runs():
    """A forecast that is off by 0.2 in every run refutes a bound of 0.1; by 0.05, it upholds it."""
    for off, verdict in ((0.2, "refuted"), (0.05, "upheld")):
        rows = pd.concat([curve(1.4, 0.3, run) for run in "abcd"], ignore_index=True)
        assert gao.below(rows.assign(predicted=rows["gain"] + off), 0.1).verdict == verdict
