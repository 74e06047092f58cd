"""Identity, folders and files of a run."""

import dataclasses
import json

import numpy as np
import pytest

from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.engine.schedules import learning_rates
from scaling.folder import open_run, read_json, write_atomically


def test_identity_survives_the_round_trip_through_json():
    config = RunConfig(model=ModelConfig(d_model=48, n_heads=3), optim=OptimConfig(lr=0.0123), tokens=123_456)
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.run_id == config.run_id


def test_every_field_of_a_run_enters_its_identity():
    """A field outside the hash would let two different runs share a folder."""
    base = RunConfig()
    changes = {
        "model": ModelConfig(n_layers=5),
        "data": DataConfig(seed=1),
        "optim": OptimConfig(b2=0.9),
        "schedule": ScheduleConfig(decay_fraction=0.1),
        "tokens": 2_000_000,
        "batch_size": 16,
        "seed": 1,
        "dtype": "bfloat16",
        "objective": ObjectiveConfig(name="answers"),
        "parent": "0123456789ab",
        "lora": LoraConfig(rank=2),
    }
    assert set(changes) == {f.name for f in dataclasses.fields(RunConfig)}
    ids = {dataclasses.replace(base, **{k: v}).run_id for k, v in changes.items()} | {base.run_id}
    assert len(ids) == len(changes) + 1


def test_fields_added_later_enter_identity_without_moving_old_ones():
    """At its default such a field is as if it were not there; config.json files from before it are still read."""
    changes = {"decay": "independent", "momentum": 0.9, "options": '{"b1":0.8}'}
    hook = OptimConfig(name="optax:scale_by_adam")
    added = {f.name for f in dataclasses.fields(OptimConfig) if "added" in f.metadata}
    assert set(changes) == added
    assert not added & RunConfig(optim=hook).to_dict()["optim"].keys()
    runs = [RunConfig(optim=dataclasses.replace(hook, **{k: v})) for k, v in changes.items()]
    assert len({run.run_id for run in [RunConfig(optim=hook), *runs]}) == len(changes) + 1
    for run, (name, value) in zip(runs, changes.items(), strict=True):
        assert run.to_dict()["optim"][name] == value
        assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_field_from_the_first_format_may_not_be_missing():
    fields = RunConfig().to_dict()
    del fields["optim"]["b2"]
    with pytest.raises(InputError, match="optim lacks b2"):
        RunConfig.from_dict(fields)


def test_equal_options_are_the_same_run():
    def run(options: str) -> RunConfig:
        return RunConfig(optim=OptimConfig(name="optax:scale_by_adam", options=options))

    assert run('{"b2": 0.9,  "b1": 0.8}').run_id == run('{"b1":0.8,"b2":0.9}').run_id
    assert run("{}") == run("")
    assert run('{"b1": 0.8}').run_id != run('{"b1": 0.9}').run_id


def test_whole_floats_and_ints_are_the_same_run():
    assert RunConfig(optim=OptimConfig(clip=1)).run_id == RunConfig(optim=OptimConfig(clip=1.0)).run_id


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(tokens=0), "tokens = 0: expected a whole number of at least 1"),
        (lambda: RunConfig(tokens=-5), "tokens = -5"),
        (lambda: RunConfig(batch_size=2.5), "batch_size = 2.5"),
        (lambda: RunConfig(dtype="float16"), "dtype = 'float16': expected one of float32, bfloat16"),
        (lambda: RunConfig(optim=OptimConfig(lr=0.0)), "optim.lr = 0.0: expected a number above 0"),
        (lambda: RunConfig(optim=OptimConfig(lr=float("nan"))), "optim.lr = nan"),
        (
            lambda: RunConfig(optim=OptimConfig(name="adam")),
            "optim.name = 'adam': expected one of adafactor, adamw, lion, muon, or a hook module:function",
        ),
        (lambda: RunConfig(optim=OptimConfig(name="optax:")), "optim.name = 'optax:'"),
        (lambda: RunConfig(optim=OptimConfig(decay="l2")), "optim.decay = 'l2': expected one of coupled, independent"),
        (lambda: RunConfig(optim=OptimConfig(momentum=1.0)), "optim.momentum = 1.0: expected a number at least 0 and"),
        (lambda: RunConfig(optim=OptimConfig(momentum=-0.1)), "optim.momentum = -0.1"),
        (lambda: OptimConfig(options="{b1: 1}"), "optim.options = '{b1: 1}': expected a JSON object of arguments"),
        (lambda: OptimConfig(options="[0.9]"), "optim.options = '[0.9]': expected a JSON object"),
        (lambda: OptimConfig(options='{"b1": NaN}'), "NaN"),
        (lambda: RunConfig(optim=OptimConfig(options='{"b1": 0.9}')), "only for a hook module:function, not adamw"),
        (lambda: RunConfig(schedule=ScheduleConfig(decay_fraction=1.5)), "schedule.decay_fraction = 1.5"),
        (lambda: RunConfig(data=DataConfig(seq_len=-1)), "data.seq_len = -1"),
        (lambda: RunConfig(seed=-1), "seed = -1"),
    ],
)
def test_bad_values_name_the_field(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wsd_schedule_in_closed_form():
    schedule = ScheduleConfig(warmup_tokens=10 * 1024, decay_fraction=0.2)
    config = RunConfig(schedule=schedule, optim=OptimConfig(lr=0.5), tokens=100 * 1024)
    lr = learning_rates(config)
    assert lr.shape == (100,)
    np.testing.assert_allclose(lr[:10], 0.5 * (np.arange(10) + 0.5) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:80], 0.5, rtol=1e-6)
    np.testing.assert_allclose(lr[80:], 0.5 * (1 - np.sqrt((np.arange(20) + 0.5) / 20)), rtol=1e-5)
    assert lr[-1] > 0


def test_runs_that_differ_in_tokens_share_their_beginning():
    """Warm-up counts tokens and decay comes last: what a trunk is made of."""
    short, long = (learning_rates(RunConfig(tokens=t)) for t in (500_000, 1_000_000))
    np.testing.assert_array_equal(short[:390], long[:390])


def test_cosine_falls_to_its_final_share():
    config = RunConfig(schedule=ScheduleConfig("cosine", warmup_tokens=0, final=0.1), tokens=1_024_000)
    lr = learning_rates(config)
    assert np.all(np.diff(lr) <= 0)
    assert lr[0] == pytest.approx(0.01, rel=1e-4)
    assert lr[-1] == pytest.approx(0.001, rel=1e-2)


def test_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    open_run(tmp_path / "a", RunConfig())
    open_run(tmp_path / "a", RunConfig())
    with pytest.raises(InputError, match="holds another run"):
        open_run(tmp_path / "a", RunConfig(seed=1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"not empty and without a config\.json"):
        open_run(tmp_path / "b", RunConfig())


def test_half_written_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 1, "tokens": 1')
    with pytest.raises(InputError, match=r"config.json: not readable as JSON .* move the folder away"):
        open_run(tmp_path, RunConfig())
    (tmp_path / "config.json").write_text(json.dumps(RunConfig().to_dict() | {"colour": "red"}))
    with pytest.raises(InputError, match="colour"):
        open_run(tmp_path, RunConfig())
    (tmp_path / "config.json").write_text('{"format": 1, "tokens": 5}')
    with pytest.raises(InputError, match="lacks batch_size, data, dtype"):
        open_run(tmp_path, RunConfig())


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text('{"form')
    (tmp_path / "failed.json").write_text("{}")
    open_run(tmp_path, RunConfig())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "failed.json"]


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, "{}")
    with pytest.raises(TypeError):
        write_atomically(path, None)
    assert read_json(path) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
