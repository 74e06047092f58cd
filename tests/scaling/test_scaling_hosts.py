"""Several processes over loopback: the same run as one, read and written in parts, and the loss of a host survived."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine.hosts import Hosts, by_first_host, detected
from scaling.engine.lease import Busy, lease
from scaling.engine.loop import train

MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2)


@pytest.fixture
def config(corpus):
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    return RunConfig(model=MODEL, data=data, tokens=40 * 8 * 32, optim=OptimConfig(lr=0.02))


def options(config: RunConfig) -> list[str]:
    """The command line that names this run."""
    fields = {
        "model.d-model": config.model.d_model,
        "model.n-layers": config.model.n_layers,
        "model.n-heads": config.model.n_heads,
        "data.source": config.data.source,
        "data.seq-len": config.data.seq_len,
        "data.valid-fraction": config.data.valid_fraction,
        "optim.lr": config.optim.lr,
        "tokens": config.tokens,
    }
    return [x for name, value in fields.items() for x in (f"--{name}", str(value))]


def start(config: RunConfig, folder, port: int, process: int, *more: str, processes: int = 2, devices: int = 4):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "sweeps.cli", "train", *options(config), "--out", str(folder)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(process), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ends(processes, seconds: float = 120):
    """(exit code, stdout, stderr) of each; kills what does not end in time."""
    try:
        return [(p.wait(seconds), p.stdout.read(), p.stderr.read()) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
            p.stdout.close()
            p.stderr.close()


def until(condition, seconds: float = 90):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.05)


def child_of(pid: int) -> int:
    """The process that trains, under its supervisor."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return int(file.read().split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_two_processes_train_the_run_that_one_trains(config, tmp_path, mesh):
    alone = train(config, tmp_path / "alone")
    port = free_port()
    hosts = [start(config, tmp_path / "run", port, i, "--mesh", mesh) for i in range(2)]
    for code, _, errors in ends(hosts):
        assert code == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["where"]["processes"], result["where"]["devices"]) == (2, 8)
    assert result["loss"] == pytest.approx(alone.loss, rel=1e-5)
    curves = [pq.read_table(tmp_path / name / "curve.parquet")["loss"].to_numpy() for name in ("run", "alone")]
    np.testing.assert_allclose(*curves, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_processes_start_from_a_parent_that_one_trained(config, tmp_path, rank):
    """Each reads its part of the parent's parameters: all of them to train, or, frozen, below adapters."""
    train(config, tmp_path / config.run_id)
    child = dataclasses.replace(config, parent=config.run_id, lora=LoraConfig(rank=rank))
    alone = train(child, tmp_path / "alone")
    port = free_port()
    more = ("--mesh", "fsdp=8", "--parent", str(tmp_path / config.run_id), "--lora.rank", str(rank))
    for code, _, errors in ends([start(config, tmp_path / "run", port, i, *more) for i in range(2)]):
        assert code == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["run"] == alone.run
    assert result["loss"] == pytest.approx(alone.loss, rel=1e-5)
    assert result["flops_parents"] == alone.flops_parents == config.flops


@pytest.mark.parametrize("error", [Busy("held by another"), InputError("lr = 0"), OSError(28, "full"), KeyError("x")])
def test_what_the_first_host_raises_all_raise(error, monkeypatch):
    """Otherwise the others wait for it in their next work together, until they count as lost."""

    def fails():
        raise error

    told = []

    def agree(*values):
        told.append(values)
        return np.array([values, [0] * len(values)])

    monkeypatch.setattr("scaling.engine.hosts.agree", agree)
    with pytest.raises(type(error)):
        by_first_host(fails)
    assert told, "the others were not told"
    answers = iter(told)
    monkeypatch.setattr("scaling.engine.hosts.agree", lambda *values: np.array([next(answers), values]))
    monkeypatch.setattr("scaling.engine.hosts.first_host", lambda: False)
    with pytest.raises(Exception) as raised:
        by_first_host(fails)
    assert str(raised.value) == str(error)
    assert isinstance(error, raised.type), "the same is done about it on all hosts"


def test_a_folder_that_is_held_ends_all_hosts(config, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("scaling.engine.hosts.agree", lambda *values: told.append(values) or np.array([values]))
    with lease(tmp_path / "run"), pytest.raises(Busy):
        train(config, tmp_path / "run")
    assert told[-1][0], "the first host left without a word"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_host_ends_the_others_with_one_line_and_the_run_goes_on(config, tmp_path, victim, how):
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, repeat=True), tokens=20_000 * 8 * 32)
    folder, port = tmp_path / "run", free_port()
    more = ["--repeat", "--mesh", "fsdp=8", "--host-timeout", "10", "--checkpoint-seconds", "0.5"]
    hosts = [start(long, folder, port, i, *more) for i in range(2)]
    stopped = 0
    try:
        until(lambda: any(p.name.isdigit() for p in (folder / "checkpoints").glob("*")))
        stopped = child_of(hosts[victim].pid)
        os.kill(stopped, how)
        code = hosts[1 - victim].wait(60)
    finally:
        if how == signal.SIGSTOP and stopped:
            os.kill(stopped, signal.SIGKILL)
        said = ends(hosts)
    assert code == 75
    error = said[1 - victim][2].strip()
    assert error.startswith(f"error: host {1 - victim} stopped"), error
    assert "the newest checkpoint is of step" in error
    assert len(error.splitlines()) == 1
    assert "stopped" in json.loads((folder / "failed.json").read_text())["reason"]
    # Once more, on one host alone, and stopped there at once: it continues from the checkpoint.
    again = start(long, folder, free_port(), 0, "--repeat", processes=1, devices=1)
    until(lambda: (folder / "progress.json").exists() and not (folder / "failed.json").exists())
    again.terminate()
    code, out, errors = ends([again])[0]
    assert code == 75, errors
    assert "continuing from step" in out


@pytest.mark.slow
def test_one_host_asked_to_stop_stops_all_at_one_step(config, tmp_path):
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, repeat=True), tokens=20_000 * 8 * 32)
    folder, port = tmp_path / "run", free_port()
    hosts = [start(long, folder, port, i, "--repeat", "--mesh", "fsdp=8") for i in range(2)]
    until(lambda: (folder / "progress.json").exists())
    hosts[1].terminate()
    said = ends(hosts)
    assert [code for code, _, _ in said] == [75, 75], said
    lines = [[line for line in out.splitlines() if line.startswith("stopped after step")] for _, out, _ in said]
    assert lines[0] == lines[1] != []


@pytest.mark.slow
def test_a_missing_coordinator_is_said(config, tmp_path):
    lonely = start(config, tmp_path / "run", free_port(), 1, "--host-timeout", "5")
    code, _, errors = ends([lonely], 60)[0]
    assert code == 2
    assert errors.startswith("error: --coordinator: ")
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "no coordinator; give --coordinator HOST:PORT"),
        (("nowhere", 2, 0), "--coordinator 'nowhere': expected HOST:PORT"),
        (("a:1", None, 0), "give --processes"),
        (("a:1", 2, 2), "--process 2 of --processes 2"),
        (("a:1", 2, 0, 1), "--host-timeout 1: expected at least 5"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError) as caught:
        Hosts(*arguments)
    assert message in str(caught.value)


def test_clusters_are_detected():
    assert not detected({})
    assert not detected({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert detected({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"})
    assert detected({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not detected({"TPU_WORKER_HOSTNAMES": "localhost"})
