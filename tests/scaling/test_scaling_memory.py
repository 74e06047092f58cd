"""Bytes per device: the count against XLA's report, a 7B model on 256 virtual devices, refusals that help."""

import json
import subprocess
import sys

import pytest

from models.config import ModelConfig
from models.errors import InputError
from models.sizing import counts
from scaling.config import DataConfig, RunConfig
from scaling.engine.memory import check_memory, least_bytes, needed_bytes, plan
from scaling.execution import Execution, mesh_sizes

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=512, d_model=256, n_layers=4, n_heads=8), data=DataConfig(seq_len=64), batch_size=8
)


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=8",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("", "data=8", "fsdp=4,tensor=2", "fsdp=2,tensor=2,sequence=2")
        ),
    ],
)
def test_the_count_of_the_state_is_xlas(mesh):
    result = plan(CONFIG, Execution(mesh=mesh, layers="scanned", remat="full"), compiled=True)
    state = result["parameter_bytes"] + result["optimizer_bytes"]
    tokens = 32 * 8 * 65 * 4
    assert state <= result["argument_bytes"] <= state + tokens + 4096
    assert result["least_bytes"] <= result["total_bytes"]  # a least that is none would refuse what fits
    if mesh == "fsdp=8":
        assert result["parameter_bytes"] == pytest.approx(4 * counts(CONFIG.model).n_total / 8, rel=0.01)


def test_what_will_not_fit_is_refused_with_what_would():
    sizes = mesh_sizes("")
    needs = needed_bytes(CONFIG, Execution(), sizes)
    assert needs > sum(least_bytes(CONFIG, Execution(), sizes).values()), "the logits of a validation are not counted"
    check_memory(CONFIG, Execution(), sizes, needs)
    with pytest.raises(InputError, match=r"will not fit.*would fit: --mesh fsdp=\d+ on \d+ devices") as said:
        check_memory(CONFIG, Execution(), sizes, needs // 3)
    line = str(said.value).split("--mesh ")[1].split(" on ")[0]
    check_memory(CONFIG, Execution(mesh=line), mesh_sizes(line), needs // 3)  # the advice holds
    with pytest.raises(InputError, match="would fit: --mesh fsdp=8"):
        check_memory(CONFIG, Execution(mesh="data=8"), mesh_sizes("data=8"), needs // 2)


def test_a_run_that_cannot_fit_leaves_nothing_behind(monkeypatch, tmp_path):
    from scaling.engine import loop as training

    monkeypatch.setattr(training, "device_limit", lambda device: 2**20)
    with pytest.raises(InputError, match="will not fit"):
        training.train(RunConfig(tokens=10_000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_seven_billion_on_256_devices():
    """Lowered, partitioned and compiled ahead of time, on virtual devices; within what a device of 16 GiB has."""
    command = [sys.executable, "-m", "sweeps.cli", "plan-memory", "--json", "--device-memory", "16"]
    command += ["--model.d-model", "4096", "--model.n-layers", "32", "--model.n-heads", "32"]
    command += ["--model.vocab-size", "32768", "--data.seq-len", "2048", "--batch-size", "256"]
    command += ["--mesh", "fsdp=256", "--layers", "scanned", "--remat", "full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["n_total"] > 6.5e9
    assert result["devices"] == 256
    # 12 bytes a parameter of state over 256 devices, and every device alike.
    assert result["argument_bytes"] == pytest.approx(12 * result["n_total"] / 256, rel=0.02)
    assert result["total_bytes"] < 16 * 2**30


def test_bad_input_is_one_line(capsys):
    from sweeps.cli.main import main

    for options, message in {
        ("--mesh", "fsdp=3"): "batch_size = 8: not divisible",
        ("--mesh", "tensor=3"): "does not divide model.n_kv_heads",
        ("--device-memory", "0.001"): "will not fit",
    }.items():
        with pytest.raises(SystemExit) as end:
            main(["plan-memory", "--no-compile", "--here", *options])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
