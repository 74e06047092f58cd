"""The library: every sweep whole, pure, trainable, documented, and turned by its dial."""

import dataclasses
import importlib
import math

import numpy as np
import pandas as pd
import pytest

from models.errors import InputError
from models.sizing import counts
from scaling.engine.schedules import learning_rates
from sweeps.define import Sweep, load_sweep
from sweeps.definition import names_in
from sweeps.launch.prepare import check_sweep
from sweeps.library import _family, critical_batch
from sweeps.plan import ledger, plan

DIALLED = [name for name in names_in("sweeps.library") if not name.startswith(("quickstart", "assistant"))]


def flops(sweep: Sweep) -> float:
    return sum(config.flops for config in sweep.runs)


@pytest.mark.parametrize("name", names_in("sweeps.library"))
def test_sweeps_are_pure_whole_and_documented(name):
    short, sweep = load_sweep(name)
    assert short == name
    assert load_sweep(name)[1] == sweep
    assert len({config.run_id for config in sweep.runs}) == len(sweep.runs)
    documentation = importlib.import_module(f"sweeps.library.{name}").__doc__
    assert f"scaling sweep {name} && " in documentation or name == "quickstart"
    assert "Cost: " in documentation
    assert "esult: " in documentation or "not yet run" in documentation


@pytest.mark.parametrize("name", names_in("sweeps.library"))
def test_sweeps_can_be_trained_on_the_default_corpus(name):
    assert len(check_sweep(load_sweep(name)[1])) == len(load_sweep(name)[1].runs)


@pytest.mark.parametrize("name", DIALLED)
def test_the_dial_multiplies_compute(name):
    """About: widths come in steps, and attention is a smaller share of larger models."""
    assert load_sweep(name, 1)[1] == load_sweep(name)[1]
    one = flops(load_sweep(name)[1])
    spent = ledger(plan(load_sweep(name)[1].runs))["flops_spent"]
    assert 9e11 < spent < 4e12, "no longer minutes on a laptop"
    for dial in (4, 100, 1e6):
        assert 0.65 < flops(load_sweep(name, dial)[1]) / one / dial < 1.2


def test_a_dial_beyond_the_corpus_says_what_to_do():
    with pytest.raises(InputError, match=r"holds .* training tokens; .*--repeat .*, or take a larger corpus"):
        check_sweep(load_sweep("kaplan_n", 1000)[1])
    with pytest.raises(InputError, match="take another dial"):
        load_sweep("chinchilla_3", 0.01)


@pytest.mark.parametrize("name", ["chinchilla_1", "chinchilla_3", "kaplan_d", "data_constrained", "critical_batch"])
def test_horizons_can_share_their_trunk(name):
    """Runs that differ in D alone have one peak and one warm-up, so their learning rates begin alike."""
    groups = {}
    for config in load_sweep(name)[1].runs:
        groups.setdefault(dataclasses.replace(config, tokens=1), []).append(config)
    shared = [group for group in groups.values() if len(group) > 1]
    assert shared
    for group in shared:
        shortest, longest = (learning_rates(f(group, key=lambda c: c.tokens)) for f in (min, max))
        stable = int(0.8 * len(shortest)) - 1
        assert (shortest[:stable] == longest[:stable]).all()


def test_isoflop_slices_hold_enough_sizes_about_their_optimum():
    runs = load_sweep("chinchilla_2")[1].runs
    slices = [
        [c for c in runs if abs(c.flops / C - 1) < 0.01]
        for C in importlib.import_module("sweeps.library.chinchilla_2").C
    ]
    assert sum(map(len, slices)) == len(runs)
    assert all(len(one) >= 5 for one in slices), "analysis.forecast.isoflop refuses a slice of fewer"


def test_rungs_are_near_and_rise_smoothly():
    sizes = np.geomspace(4e3, 1e10, 60)
    models = [_family.rung(n) for n in sizes]
    for n, model in zip(sizes, models, strict=True):
        assert abs(math.log(counts(model).n_compute / n)) < math.log(1.3 if model.d_model < 128 else 1.05)
    for field in ("d_model", "n_layers"):
        values = [getattr(model, field) for model in models]
        assert values == sorted(values)


def test_epochs_are_what_data_constrained_says():
    runs = load_sweep("data_constrained")[1].runs
    epochs = {round(c.trained_tokens / c.data.unique_tokens) for c in runs}
    assert epochs == {1, 2, 4, 8, 16}


def planted(critical: float, least: float) -> pd.DataFrame:
    """Runs whose steps to any loss are least * (1 + critical / batch), up to a factor of the loss alone."""
    rows = []
    for B in (1, 2, 4, 8, 16, 32):
        for D in (2e5, 4e5, 8e5, 1.6e6, 3.2e6):
            reached = (D / (B * 128)) / (least * (1 + critical / (B * 128)))
            rows.append({"batch_size": B, "seq_len": 128, "tokens": D, "loss": 2 * reached**-0.2, "status": "finished"})
    return pd.DataFrame(rows)


def test_a_planted_critical_batch_is_found():
    text = critical_batch.critical_batch(planted(1500.0, 1000.0), target=2.0)
    steps, batch = (line for line in text.splitlines() if line.startswith(("S_min", "B_crit")))
    assert float(steps.split()[2]) == pytest.approx(1000, rel=0.01)
    assert float(batch.split()[2]) == pytest.approx(1500, rel=0.01)
    assert critical_batch.main([]) == 2
    assert critical_batch.main(["no such folder"]) == 2
    with pytest.raises(InputError, match="0 batch sizes reach it"):
        critical_batch.critical_batch(planted(1500.0, 1000.0), target=0.1)
