"""Study 1: floors that are planted are found, controls see what is planted, and the tiny form ends."""

import json

import numpy as np
import pandas as pd
import pytest

from sweeps.cli.main import main
from sweeps.studies import entropy
from sweeps.studies._study import load_study


def planted(source: str, more: float = 0.0, noise: float = 0.001, beta: float = 0.5, seed: int = 0) -> pd.DataFrame:
    """Measurements of the study's runs of a source: an excess of a law, and `more` that no run gets below."""
    rng = np.random.default_rng(seed)
    _, study = load_study("entropy")
    rows = []
    for config in study.runs:
        if config.data.source == source:
            n, d = config.counts.n_compute, config.trained_tokens
            excess = more + 30.0 * n**-0.6 + 60.0 * d**-beta
            excess += noise * rng.normal()
            own = {"run": config.run_id, "trunk": f"{source}{n}-{config.seed}", "seed": config.seed, "source": source}
            size = {"n_compute": n, "tokens": d, "flops": config.flops, "status": "finished"}
            rows.append(own | size | {"metric": "excess", "value": excess, "stderr": 0.001})
    return pd.DataFrame(rows)


def test_a_floor_at_the_entropy_upholds_and_one_above_it_refutes():
    assert entropy.floor(planted(entropy.MAIN), entropy.MAIN).verdict == "upheld"
    wrong = entropy.floor(planted(entropy.MAIN, more=0.1), entropy.MAIN)
    assert wrong.verdict == "refuted"
    assert wrong.predicted - wrong.measured == pytest.approx(0.1, abs=0.03)


def test_a_floor_that_the_runs_do_not_pin_down_is_undecided():
    """With noise of 5 %, an interval that holds the entropy is too wide to mean anything."""
    assert entropy.floor(planted(entropy.MAIN, noise=0.05), entropy.MAIN).verdict != "upheld"


def test_a_steeper_world_is_seen_and_an_equal_one_is_not():
    same = pd.concat([planted(entropy.MAIN), planted(entropy.STEEP, seed=1)], ignore_index=True)
    assert entropy.steeper(same).verdict != "upheld"


def test_a_slope_without_anything_to_learn_is_told_from_none():
    flat = planted(entropy.REDRAWN)
    flat["value"] = 0.001 + 0.0001 * np.arange(len(flat)) % 2
    assert entropy.flat(flat).verdict == "upheld"
    flat["value"] = 0.3 * (flat["n_compute"] / 1e4) ** -1.0
    assert entropy.flat(flat).verdict != "upheld"


@pytest.mark.slow
def test_the_tiny_form_gives_every_claim_a_verdict(tmp_path, capsys):
    assert main(["study", "entropy", "--dial", "tiny", "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [claim["name"] for claim in result["claims"]] == [claim.name for claim in load_study("entropy")[1].claims]
