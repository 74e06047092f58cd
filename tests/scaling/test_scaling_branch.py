"""A run that branches from another's trunk is the run from scratch, bit for bit, whatever happened to the trunk."""

import dataclasses
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.config import ModelConfig
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine import loop as train_module
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.loop import Preempted, Sharing, train
from scaling.engine.program import program_for
from scaling.engine.sharding import make_mesh
from scaling.execution import Execution
from scaling.folder import read_json

MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2)
PARTED = 32  # of 40 steps, where the short run cools down


@pytest.fixture(scope="module")
def configs(corpus):
    """(long, short): 80 and 40 steps of 8 x 32 tokens; the same until the short one's last fifth."""
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    long = RunConfig(model=MODEL, data=data, tokens=80 * 8 * 32, optim=OptimConfig(lr=0.02))
    return long, dataclasses.replace(long, tokens=40 * 8 * 32)


@pytest.fixture(scope="module")
def trunk(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk") / "long"
    train(configs[0], folder, sharing=Sharing(saves=(16, PARTED)))
    return folder


@pytest.fixture(scope="module")
def scratch(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch") / "short"
    return train(configs[1], folder), folder


def record(folder):
    """The curve, and the trained parameters."""
    config = RunConfig.from_dict(read_json(folder / "config.json"))
    program = program_for(config, Execution(), make_mesh())
    step, state = Checkpointer(folder / "checkpoints", 2).restore(program.abstract_state, print)
    assert step == config.steps
    return pq.read_table(folder / "curve.parquet").to_pydict(), jax.tree.leaves(jax.device_get(state))


def same_run(result, folder, scratch):
    apart = {"timing": {}, "where": {}, "branched_from": None, "branched_at_step": 0}
    assert dataclasses.replace(result, **apart) == dataclasses.replace(scratch[0], **apart)
    (curve, state), (curve_too, state_too) = record(folder), record(scratch[1])
    assert curve == curve_too
    for a, b in zip(state, state_too, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_branch_is_the_run_from_scratch(configs, trunk, scratch, tmp_path):
    result = train(configs[1], tmp_path / "run", sharing=Sharing(sources=((trunk, PARTED),)))
    assert (result.branched_from, result.branched_at_step) == ("long", PARTED)
    assert result.flops_spent == configs[1].flops / 40 * 8
    same_run(result, tmp_path / "run", scratch)


def test_a_trunk_is_the_run_without_branches(configs, trunk, tmp_path):
    result = train(configs[0], tmp_path / "run")
    same_run(train(configs[0], trunk), trunk, (result, tmp_path / "run"))


def test_a_branch_too_late_is_not_the_same_run(configs, trunk, scratch, tmp_path):
    """The comparison can fail: one step past the parting the trunk's rate was another."""
    folder = tmp_path / "long"
    train(configs[0], folder, sharing=Sharing(saves=(36,)))
    result = train(configs[1], tmp_path / "run", sharing=Sharing(sources=((folder, 36),)))
    assert result.branched_at_step == 36
    assert result.loss != scratch[0].loss


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # orbax's, of a damaged read
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["state", "curve", "all"])
def test_damaged_trunks_are_done_without(configs, trunk, scratch, tmp_path, damage):
    folder = tmp_path / "long"
    shutil.copytree(trunk, folder)
    if damage == "curve":
        (folder / "curve.parquet").write_bytes(b"no parquet")
    else:
        for step in (PARTED,) if damage == "state" else (16, PARTED):
            for path in (folder / "branches" / str(step)).rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = []
    result = train(configs[1], tmp_path / "run", report=said.append, sharing=Sharing(sources=((folder, PARTED),)))
    assert result.branched_at_step == (16 if damage == "state" else 0)
    assert damage == "curve" or any("damaged" in line for line in said)
    same_run(result, tmp_path / "run", scratch)


def test_stopped_within_the_branch_it_continues_and_keeps_its_ledger(configs, trunk, scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)
    calls = iter([False, False, True])
    sharing = Sharing(sources=((trunk, PARTED),))
    with pytest.raises(Preempted):
        train(configs[1], tmp_path / "run", should_stop=lambda: next(calls), sharing=sharing)
    result = train(configs[1], tmp_path / "run", sharing=sharing)
    assert result.timing["resumed_at_step"] > PARTED
    assert result.branched_at_step == PARTED
    same_run(result, tmp_path / "run", scratch)


def test_killed_between_its_model_and_its_result_a_branch_ends_as_it_would_have(configs, trunk, scratch, tmp_path):
    sharing = Sharing(sources=((trunk, PARTED),))
    train(configs[1], tmp_path / "run", sharing=sharing)
    (tmp_path / "run" / "result.json").unlink()
    result = train(configs[1], tmp_path / "run", sharing=sharing)
    assert (result.timing["resumed_at_step"], result.branched_at_step) == (configs[1].steps, PARTED)
    same_run(result, tmp_path / "run", scratch)


def test_a_trunk_stopped_anywhere_leaves_whole_branches(configs, scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)
    long, short = configs
    for stop_at in (15, 16, 17, 32, 33):
        folder = tmp_path / str(stop_at)
        calls = iter(range(1, 1000))
        with pytest.raises(Preempted):
            train(
                long,
                folder,
                should_stop=lambda calls=calls, stop_at=stop_at: next(calls) == stop_at,
                sharing=Sharing(saves=(16, PARTED)),
            )
        assert Checkpointer(folder / "branches", None).steps() == [s for s in (16, PARTED) if s < stop_at]
    train(long, folder, sharing=Sharing(saves=(16, PARTED)))
    result = train(short, tmp_path / "run", sharing=Sharing(sources=((folder, PARTED),)))
    same_run(result, tmp_path / "run", scratch)


def test_a_branch_on_another_mesh(configs, trunk, scratch, tmp_path):
    sharing = Sharing(sources=((trunk, PARTED),))
    result = train(configs[1], tmp_path / "run", Execution(mesh="fsdp=4,tensor=2"), sharing=sharing)
    assert result.branched_at_step == PARTED
    assert result.loss == pytest.approx(scratch[0].loss, rel=1e-5)
