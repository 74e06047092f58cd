"""Sinks: they get what the curve holds, survive a stop, and never end a run."""

import dataclasses
import json
import sys
import time
from contextlib import nullcontext
from typing import ClassVar

import pyarrow.parquet as pq
import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine import loop as train_module
from scaling.engine.lease import Lost
from scaling.engine.loop import Preempted, train
from scaling.engine.swarm import Member, train_swarm
from scaling.engine.tracking import SINKS, check_sinks
from scaling.execution import Execution


@pytest.fixture(scope="module")
def config(corpus):
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    model = ModelConfig(d_model=16, n_layers=1, n_heads=1)
    return RunConfig(model=model, data=data, tokens=20 * 8 * 32, optim=OptimConfig(lr=0.02))


class Broken:
    def __init__(self, config, folder, start_step):
        self.left = 3

    def log(self, step, metrics):
        self.left -= 1
        if not self.left:
            raise ConnectionError("no route to the dashboard\nand more")

    def finish(self, status, metrics):
        raise AssertionError("a dropped sink is not used again")


def scalars(folder, name):
    """{step: value} of the events that a viewer would show: a restart hides what lies after it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    values = {}
    for file in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                values = {step: value for step, value in values.items() if step < event.step}
            for v in event.summary.value:
                if v.tag == name:
                    values[event.step] = v.simple_value
    return values


def test_tensorboard_holds_the_curve_of_a_stopped_and_resumed_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)
    calls = iter(range(100))
    with pytest.raises(Preempted):
        train(config, tmp_path, Execution(track="tensorboard"), should_stop=lambda: next(calls) == 6)
    result = train(config, tmp_path, Execution(track="tensorboard"))
    curve = pq.read_table(tmp_path / "curve.parquet")
    losses = scalars(tmp_path / "tensorboard", "train/loss")
    assert sorted(losses) == curve["step"].to_pylist()
    assert [losses[step] for step in sorted(losses)] == curve["loss"].to_pylist()
    assert scalars(tmp_path / "tensorboard", "valid/loss")[config.steps] == pytest.approx(result.loss, rel=1e-6)


def test_two_starts_within_one_second_write_two_files(config, tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for _ in range(2):
        SINKS["tensorboard"][1](config, tmp_path, 0).finish("finished", {})
    assert len(list(tmp_path.glob("tensorboard/events.*"))) == 2


def test_wandb_offline(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    lines = []
    train(config, tmp_path, Execution(track="wandb"), report=lines.append)
    assert lines == []
    [file] = tmp_path.glob(f"wandb/offline-run-*{config.run_id}/run-{config.run_id}.wandb")
    assert b"train/loss" in file.read_bytes()


def test_a_sink_that_fails_is_named_once_and_the_run_ends_well(config, tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "broken", ("json", Broken))
    lines = []
    assert train(config, tmp_path, Execution(track="broken"), report=lines.append).status == "finished"
    assert lines == ["broken: no route to the dashboard; the run goes on without it"]


def test_a_sink_that_does_not_open_is_named_and_the_run_ends_well(config, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setitem(SINKS, "broken", ("json", refuse))
    lines = []
    assert train(config, tmp_path, Execution(track="broken"), report=lines.append).status == "finished"
    assert lines == ["broken: disk full; the run goes on without it"]


class Kept:
    """Keeps how it was ended."""

    endings: ClassVar[list[str]] = []

    def __init__(self, config, folder, start_step):
        pass

    def log(self, step, metrics):
        pass

    def finish(self, status, metrics):
        self.endings.append(status)


class TakenOver:
    """A lease that another process has taken over."""

    def check(self):
        raise Lost("taken over")


def full_disk(state):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("status", "changes", "more", "raises"),
    [
        ("finished", {}, {}, None),
        ("diverged", {"optim": OptimConfig(lr=1e30, clip=0.0)}, {}, None),
        ("preempted", {}, {"should_stop": lambda: True}, Preempted),
        ("failed", {}, {"progress": full_disk}, OSError),
        ("lost", {}, {"held": TakenOver()}, Lost),
    ],
)
def test_sinks_are_closed_once_on_every_way_out(config, tmp_path, monkeypatch, status, changes, more, raises):
    """A sink left open loses its last metrics, and a dashboard shows the run as running for ever."""
    monkeypatch.setitem(SINKS, "kept", ("json", Kept))
    monkeypatch.setattr(Kept, "endings", [])
    monkeypatch.setattr(train_module, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)
    with pytest.raises(raises) if raises else nullcontext():
        train(dataclasses.replace(config, **changes), tmp_path, Execution(track="kept"), **more)
    assert Kept.endings == [status]


def test_the_members_of_a_swarm_are_tracked_apart(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    members = [Member(dataclasses.replace(config, seed=seed), tmp_path / str(seed)) for seed in range(2)]
    lines = []
    train_swarm(members, Execution(track="wandb"), report=lambda run, line: lines.append(line))
    assert lines == []
    for member in members:
        run = member.config.run_id
        [file] = member.folder.glob(f"wandb/offline-run-*{run}/run-{run}.wandb")
        other = {m.config.run_id for m in members} - {run}
        assert b"train/loss" in file.read_bytes()
        assert not any(o.encode() in file.read_bytes() for o in other), "two members share a run"


def test_off_by_default(config, tmp_path):
    train(config, tmp_path)
    assert not {"tensorboard", "wandb"} & {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "finished"


def test_unknown_or_missing_sinks_are_refused_before_anything_is_made(config, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'mlflow' is not one of tensorboard, wandb"):
        train(config, tmp_path / "run", Execution(track="tensorboard,mlflow"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb needs wandb; pip install 'scaling-laws\[tracking\]'"):
        check_sinks("wandb")
