"""The verdict on simulated ladders, clean and corrupted, and on the files of a sweep.

The ladders are SGD on a quadratic with a power-law spectrum, its expected loss step by step: larger models have more
modes and train longer, the best learning rate is the one a grid finds, and a wrong one costs what it costs there.
"""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import OptimConfig, RunConfig
from scaling.result import result_of
from sweeps.health import LossCurve, coordinates, coordinates_text, health, health_line, health_text, scores, verdict
from sweeps.table import table
from sweeps.tuning import optima, parts, tune

MODES = (32, 48, 72, 108, 162, 243)
BEST = 2**-1.5  # at every size; test_the_simulated_best_is_the_best


def simulate(modes: int, lr: float) -> np.ndarray | None:
    """Loss of every step under warm-up-free WSD; None where it diverges."""
    steps, i = 12 * modes, np.arange(1, modes + 1.0)
    curvature, error = i**-1.5, i**-0.2
    beyond = np.sum(np.arange(modes + 1.0, 20_000) ** -1.7)  # what a model of this size cannot learn
    rates = lr * (1 - np.sqrt(np.clip(((np.arange(steps) + 0.5) / steps - 0.8) / 0.2, 0, 1)))
    losses = np.empty(steps)
    for t, rate in enumerate(rates):
        losses[t] = 1 + 0.5 * (curvature @ error + beyond)
        if losses[t] > 50:
            return None
        error = error * (1 - rate * curvature) ** 2 + rate**2 * curvature * losses[t] / 4  # batch of 8
    return losses


def ladder(seed: int, corrupted: bool) -> tuple[list[LossCurve], int]:
    """(curves, index of the one whose learning rate is wrong by x4 up or x8 down), with noise of batches and seeds.

    The flat bottom is wide: x4 down costs 0.5 to 1.5 %, which seeds of 0.2 % hide at the larger sizes.
    """
    rng = np.random.default_rng(seed)
    bad, factor = int(rng.integers(len(MODES))), (4.0, 1 / 8)[rng.integers(2)]
    curves = []
    for k, modes in enumerate(MODES):
        clean = None
        while clean is None:  # tuned to within 20 %
            clean = simulate(modes, BEST * np.exp(rng.normal(0, 0.2)) * (factor if corrupted and k == bad else 1))
        seeds = np.exp(rng.normal(0, [0.002, 0.001]))
        noisy = clean * seeds[0] * np.exp(rng.normal(0, 0.03, len(clean)))
        curves.append(LossCurve(1000.0 * modes**2, noisy, clean[-1] * seeds.prod()))
    return curves, bad


@pytest.mark.parametrize("modes", [MODES[0], MODES[-1]])
def test_the_simulated_best_is_the_best(modes):
    """The corruption is one: neighbours on a grid of x1.4 are no better, and x8 down costs at least 1 %."""
    last = {f: simulate(modes, BEST * f)[-1] for f in (1 / 8, 0.7, 1.0, 1.4)}
    assert min(last, key=last.get) == 1.0
    assert last[1 / 8] > 1.01 * last[1.0]


def test_the_verdict_separates_corrupted_ladders_from_clean_ones():
    """Seeds that the score was not developed on (those were below 6,000)."""
    clean = [scores(ladder(10_000 + i, False)[0])["score"].max() for i in range(20)]
    found, right = [], 0
    for i in range(20):
        curves, bad = ladder(20_000 + i, True)
        table = scores(curves)
        found.append(table["score"].max())
        right += int(table["score"].idxmax()) == bad
    auc = np.mean([(b > a) + 0.5 * (b == a) for a in clean for b in found])
    print(f"AUC {auc:.3f}, the wrong size named in {right} of 20")
    assert auc >= 0.95, f"AUC {auc:.3f}: a wrong learning rate at one size is no longer seen"
    assert right >= 18
    assert np.mean([verdict(s) == "tuned" for s in clean]) >= 0.8
    assert np.mean([verdict(s) != "tuned" for s in found]) >= 0.8


def test_curves_that_collapse_score_nothing():
    t = np.linspace(0.01, 1, 400)
    curves = [LossCurve(n, 1.2 + (n / 1e5) ** -0.3 * t**-0.4, 1.2 + (n / 1e5) ** -0.3) for n in (1e4, 3e4, 9e4, 27e4)]
    assert scores(curves)["score"].max() < 0.5
    with pytest.raises(InputError, match="3 sizes"):
        scores(curves[:3])


def write_run(folder, config: RunConfig, loss: np.ndarray, final: float) -> None:
    run = folder / "runs" / config.run_id
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "result.json").write_text(json.dumps(result_of(config, float(final), corpus="c").to_dict()))
    pd.DataFrame({"loss": loss.astype(np.float32)}).to_parquet(run / "curve.parquet")


def config_of(d_model: int, lr: float = 0.01) -> RunConfig:
    return RunConfig(model=ModelConfig(d_model=d_model, n_heads=2), optim=OptimConfig(lr=lr))


def test_health_of_a_folder_names_the_size_that_is_out_of_line(tmp_path):
    curves, bad = ladder(30_001, True)
    for curve, d_model in zip(curves, (16, 24, 36, 56, 84, 128), strict=True):
        write_run(tmp_path, config_of(d_model), curve.loss, curve.final)
    found = health(tmp_path)
    assert len(found) == 6
    assert int(found["score"].idxmax()) == bad
    assert found["verdict"][bad] == "untuned"
    assert "out of line" in health_text(found)
    assert "untuned: N" in health_line(found)


def test_a_loss_curve_that_is_damaged_is_named(tmp_path):
    curves, _ = ladder(30_001, False)
    for curve, d_model in zip(curves, (16, 24, 36, 56, 84, 128), strict=True):
        write_run(tmp_path, config_of(d_model), curve.loss, curve.final)
    (tmp_path / "runs" / config_of(56).run_id / "curve.parquet").write_bytes(b"no parquet")
    found = health(tmp_path)
    assert found["reason"].str.contains("missing or damaged").tolist() == [False, False, False, True, False, False]


def test_an_optimum_at_the_edge_of_the_grid_is_untuned(tmp_path):
    for d_model, best in ((16, 0.02), (32, 0.0025)):
        for lr in (0.005, 0.01, 0.02, 0.04):
            write_run(tmp_path, config_of(d_model, lr), np.full(100, 2.0), 2 + 0.1 * np.log(lr / best) ** 2)
    assert health(tmp_path)["verdict"].tolist() == ["tuned", "untuned"]


def test_each_parametrisation_has_its_own_verdicts(tmp_path):
    """The best rate of one is at its edge, and does not hide that of the other."""
    for name, best in (("standard", 0.01), ("mup", 0.16)):
        for d_model in (16, 32):
            for lr in (0.005, 0.01, 0.02, 0.04):
                config = config_of(d_model, lr)
                model = dataclasses.replace(config.model, parametrization=name)
                loss = 2 + 0.1 * np.log(lr / best) ** 2
                write_run(tmp_path, dataclasses.replace(config, model=model), np.full(100, 2.0), loss)
    found = health(tmp_path)
    assert found["verdict"].tolist() == ["untuned", "untuned", "tuned", "tuned"]
    assert " mup" in health_line(found)
    frame = table(tmp_path)
    with pytest.raises(InputError, match="2 parametrisations"):
        tune(frame)
    assert optima(parts(frame)["standard"])["lr"].to_numpy() == pytest.approx(0.01, rel=1e-6)


def test_nothing_vouches_for_two_sizes_with_one_learning_rate(tmp_path):
    for d_model in (16, 32):
        write_run(tmp_path, config_of(d_model), np.full(100, 2.0), 2.0)
    assert health(tmp_path)["verdict"].tolist() == ["doubtful", "doubtful"]


@pytest.mark.slow
def test_the_coordinate_check_of_a_sweep_of_standard_models_says_so(tmp_path):
    for d_model in (16, 32, 64):
        write_run(tmp_path, config_of(d_model), np.full(100, 2.0), 2.0)
    assert coordinates_text(tmp_path) == ""
    found = coordinates(tmp_path)
    assert found["standard"]["axis"] == "d_model"
    assert found["standard"]["slopes"]["logits"] > 0.1
    assert "does not carry over" in coordinates_text(tmp_path)
