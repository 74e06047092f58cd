"""The verdicts on the files of a sweep, and the coordinate check of its models."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.tuning.health import health_line
from analysis.tuning.rule import by_parametrization, optima, tune
from analysis.tuning.table import tuning_table
from models.config import ModelConfig
from scaling.config import OptimConfig, RunConfig
from scaling.result import result_of
from sweeps.health import coordinates, coordinates_text, health
from sweeps.table import table


def write_run(folder, config: RunConfig, loss: np.ndarray, final: float) -> None:
    run = folder / "runs" / config.run_id
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "result.json").write_text(json.dumps(result_of(config, float(final), corpus="c").to_dict()))
    pd.DataFrame({"loss": loss.astype(np.float32)}).to_parquet(run / "curve.parquet")


def config_of(d_model: int, lr: float = 0.01) -> RunConfig:
    return RunConfig(model=ModelConfig(d_model=d_model, n_heads=2), optim=OptimConfig(lr=lr))


def test_health_of_a_folder_reads_its_curves_and_names_a_damaged_one(tmp_path):
    sizes, t = (16, 24, 36, 56, 84, 128), np.linspace(0.01, 1, 400)
    for d_model in sizes:
        write_run(tmp_path, config_of(d_model), 1.2 + 3 / d_model * t**-0.4, 1.2 + 3 / d_model)
    (tmp_path / "runs" / config_of(56).run_id / "curve.parquet").write_bytes(b"no parquet")
    judged = health(tmp_path)
    assert judged["reason"].str.contains("missing or damaged").tolist() == [size == 56 for size in sizes]
    assert judged["collapse"].notna().tolist() == [size != 56 for size in sizes]


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
    frame = tuning_table(table(tmp_path))
    with pytest.raises(InputError, match="2 parametrisations"):
        tune(frame)
    assert optima(by_parametrization(frame)["standard"])["lr"].to_numpy() == pytest.approx(0.01, rel=1e-6)


def test_nothing_vouches_for_two_sizes_with_one_learning_rate(tmp_path):
    for d_model in (16, 32):
        write_run(tmp_path, config_of(d_model), np.full(100, 2.0), 2.0)
    assert health(tmp_path)["verdict"].tolist() == ["doubtful", "doubtful"]


@pytest.mark.parametrize(
    "kept",
    [
        *("text", None, {}, {"axis": "d_model"}, {"slopes": {"logits": 0.1}}, {"axis": "d_model", "slopes": [0.1]}),
        *({"axis": "d_model", "slopes": {"logits": slope}} for slope in ("0.1", None, True, 10**400)),
    ],
)
def test_a_coordinate_check_that_is_none_is_one_line(tmp_path, kept):
    (tmp_path / "coordinates.json").write_text(json.dumps({"standard": kept}))
    assert coordinates_text(tmp_path).endswith("scaling health DIR --coordinates writes it")


@pytest.mark.slow
def test_the_coordinate_check_of_a_sweep_of_standard_models_says_so(tmp_path):
    for d_model in (16, 32, 64):
        shallow = dataclasses.replace(config_of(d_model), model=ModelConfig(d_model=d_model, n_layers=1, n_heads=2))
        write_run(tmp_path, shallow, np.full(100, 2.0), 2.0)
    assert coordinates_text(tmp_path) == ""
    found = coordinates(tmp_path)
    assert found["standard"]["axis"] == "d_model"
    assert found["standard"]["slopes"]["logits"] > 0.1
    assert "no learning rate carries over" in coordinates_text(tmp_path)
