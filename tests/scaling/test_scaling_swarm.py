"""Swarms: every member is its solo run, whatever becomes of the others."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.config import ModelConfig
from models.sizing import training_bytes
from scaling.alike import same_swarm
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine import loop as loop_module
from scaling.engine import swarm as swarm_module
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.loop import Preempted, Sharing, train
from scaling.engine.program import LOGIT_BYTES
from scaling.engine.swarm import Member, capacity, train_swarm
from scaling.execution import Execution
from scaling.result import read_result

MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2)


@pytest.fixture(scope="module")
def configs(corpus):
    """Learning rates, seeds, data orders, and one of other length; 40 and 60 steps."""
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    base = RunConfig(model=MODEL, data=data, tokens=40 * 8 * 32, optim=OptimConfig(lr=0.02))
    return [
        base,
        dataclasses.replace(base, optim=OptimConfig(lr=0.005, weight_decay=0.0)),
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, data=dataclasses.replace(data, seed=3)),
        dataclasses.replace(base, tokens=60 * 8 * 32),
    ]


@pytest.fixture(scope="module")
def solo(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("solo")
    return [train(c, folder / str(i)) for i, c in enumerate(configs)], folder


def curve(folder):
    return pq.read_table(folder / "curve.parquet")["loss"].to_numpy()


def members(configs, folder, **sharing):
    return [Member(c, folder / str(i), Sharing(**sharing)) for i, c in enumerate(configs)]


def same_runs(results, folder, solo):
    for i, (mine, theirs) in enumerate(zip(results, solo[0], strict=True)):
        assert mine.status == "finished"
        assert mine.run == theirs.run
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        np.testing.assert_allclose(curve(folder / str(i)), curve(solo[1] / str(i)), rtol=1e-5)


def test_a_member_is_its_solo_run(configs, solo, tmp_path):
    """On eight virtual devices, which five members do not fill; the longest goes on alone."""
    results = train_swarm(members(configs, tmp_path))
    same_runs(results, tmp_path, solo)
    assert len({r.loss for r in results}) == len(results)  # members are different runs, not copies


@pytest.mark.slow
def test_a_diverging_member_leaves_the_others_alone(configs, solo, tmp_path):
    wild = dataclasses.replace(configs[0], optim=OptimConfig(lr=1e30, clip=0.0))
    others = [dataclasses.replace(c, optim=dataclasses.replace(c.optim, clip=0.0)) for c in configs[:3]]
    results = train_swarm(members([wild, *others], tmp_path))
    assert results[0].status == "diverged"
    for i, config in enumerate(others):
        alone = train(config, tmp_path / f"alone-{i}")
        assert results[i + 1].loss == pytest.approx(alone.loss, rel=1e-5)
    alone = train(wild, tmp_path / "wild")
    assert results[0].diverged_at_step == alone.diverged_at_step


@pytest.mark.slow
def test_a_shorter_member_that_diverged_ends_no_other(configs, tmp_path):
    """Its batches have come to their end while the others still train."""
    clip = OptimConfig(lr=0.01, clip=0.0)
    wild = dataclasses.replace(configs[0], optim=OptimConfig(lr=1e30, clip=0.0), tokens=20 * 8 * 32)
    results = train_swarm(members([wild, *(dataclasses.replace(c, optim=clip) for c in configs[2:4])], tmp_path))
    assert [r.status for r in results] == ["diverged", "finished", "finished"]


def test_a_swarm_validates_on_the_way(configs, tmp_path):
    """As each member would alone, and without another result."""
    execution = Execution(eval_every=10 * 8 * 32)
    results = train_swarm(members(configs[:2], tmp_path), execution)
    for i, config in enumerate(configs[:2]):
        alone = train(config, tmp_path / f"alone-{i}", execution)
        assert results[i].flops_validation == alone.flops_validation
        columns = [pq.read_table(tmp_path / name / "curve.parquet")["valid_loss"] for name in (str(i), f"alone-{i}")]
        validated = [[(s, v) for s, v in enumerate(c.to_pylist(), 1) if v is not None] for c in columns]
        assert [step for step, _ in validated[0]] == [10, 20, 30, 40]
        np.testing.assert_allclose(*validated, rtol=1e-5)


def test_room_for_members_counts_their_validation(configs, monkeypatch):
    """A small batch needs less than the 8,192 tokens of a validation: members that fit only while they train do not."""
    small = dataclasses.replace(configs[0], batch_size=1)
    limit = 64 * training_bytes(small.model, 1, 32) + 2 * LOGIT_BYTES
    monkeypatch.setattr(swarm_module, "device_limit", lambda device: limit)
    monkeypatch.setattr(swarm_module.jax, "local_devices", lambda: [None])
    assert 1 <= capacity(small) < 51, "64 members of which 80 % would fit by what they take in training"


def test_stopped_in_a_swarm_each_continues_alone_or_together(configs, solo, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "CHUNK_SECONDS", 0.0)
    calls = iter(range(1000))
    with pytest.raises(Preempted):
        train_swarm(members(configs, tmp_path), should_stop=lambda: next(calls) == 9)
    first = train(configs[0], tmp_path / "0")
    assert first.timing["resumed_at_step"] == 10
    results = train_swarm(members(configs, tmp_path))
    assert results[0] == first == read_result(tmp_path / "0")
    same_runs(results, tmp_path, solo)


def test_killed_between_its_model_and_its_result_a_member_ends_as_it_would_have(configs, solo, tmp_path):
    train_swarm(members(configs, tmp_path))
    for i in (0, 1):
        (tmp_path / str(i) / "result.json").unlink()
    results = train_swarm(members(configs, tmp_path))
    assert "swarm" in results[0].timing
    same_runs(results, tmp_path, solo)


def test_a_swarm_keeps_states_for_branches_and_branches(configs, solo, tmp_path):
    """Two trunks in a swarm, then their two branches in another: the solo runs, once more."""
    short = [configs[0], configs[2]]
    long = [dataclasses.replace(c, tokens=60 * 8 * 32) for c in short]
    train_swarm(members(long, tmp_path / "long", saves=(32,)))
    assert Checkpointer(tmp_path / "long" / "0" / "branches", None).steps() == [32]
    branches = [
        Member(c, tmp_path / "short" / str(i), Sharing(sources=((tmp_path / "long" / str(i), 32),)))
        for i, c in enumerate(short)
    ]
    results = train_swarm(branches)
    assert [r.branched_at_step for r in results] == [32, 32]
    same_runs(results, tmp_path / "short", ([solo[0][0], solo[0][2]], renamed(solo[1], tmp_path)))


def renamed(folder, tmp_path):
    """The solo folders 0 and 2, as 0 and 1."""
    for i, name in enumerate(("0", "2")):
        (tmp_path / "solo").mkdir(exist_ok=True)
        (tmp_path / "solo" / str(i)).symlink_to(folder / name)
    return tmp_path / "solo"


def test_only_runs_of_one_shape_swarm(configs):
    assert len({same_swarm(c) for c in configs}) == 1
    for change in ({"batch_size": 4}, {"dtype": "bfloat16"}, {"optim": OptimConfig(b2=0.9)}):
        assert same_swarm(dataclasses.replace(configs[0], **change)) != same_swarm(configs[0])
