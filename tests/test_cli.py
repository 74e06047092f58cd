"""The command line as a user meets it: examples, files, one clear line for each mistake, exit code 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sweeps.cli.main import COMMANDS, main
from sweeps.define import load_sweep


def fails_with(capsys, *argv) -> str:
    """Runs the command, expects exit code 2 and one line, and returns it."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  scaling {name} " in text


def test_help_imports_nothing_heavy():
    """What keeps --help fast; the time itself is not tested."""
    code = "import sys; from sweeps.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in text for name in COMMANDS)
    loaded = text.splitlines()[-1]
    for heavy in ("'jax'", "'numpy'", "'pandas'", "'scipy'", "'matplotlib'", "'rich'"):
        assert heavy not in loaded


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'?"),
        (["sweep", "quickstrat"], "did you mean 'quickstart'"),
        (["sweep", "quickstart", "--wrokers", "2"], "unknown option --wrokers, did you mean '--workers'?"),
        (["sweep", "nowhere.py"], "not found"),
        (["sweep", "quickstart", "--workers", "0", "--out", "x"], "--workers 0: expected at least 1"),
        (["train", "--tokens", "many"], "'many' is not a number"),
        (["train", "--tokens", "1.5"], "'1.5' is not a whole number"),
        (["train", "--tokens", "-3"], "tokens = -3"),
        (["train", "--model.n-layers", "0"], "model.n_layers = 0"),
        (["train", "--model.n-heads", "5"], "model.n_heads = 5 does not divide model.d_model = 64"),
        (["train", "--model.d-modle", "5"], "did you mean '--model.d-model'?"),
        (["train", "--n", "10"], "model size n = 10"),
        (["train", "--data.tokenizer", "byte"], "did you mean 'bytes'"),
        (["train", "--data.source", "sotuu"], "did you mean 'sotu'"),
        (["train", "--data.source", "text:/nowhere/*.txt"], "/nowhere/*.txt"),
        (["status", "/nowhere"], "no such folder"),
        (["report", "runs.csv"], "runs.csv: no such file"),
        (["sweep", "quickstart", "--eval-every", "-5"], "eval_every = -5"),
        (["train", "--checkpoint-seconds", "nan"], "checkpoint_seconds = nan"),
        (["sweep", "quickstart", "--wait"], "--wait is for --on slurm"),
        (["bench", "analysis", "--seconds", "3"], "--seconds and --profile are for bench train"),
        (["health", ".", "--allow-hook", "a:b"], "--allow-hook is for --coordinates"),
        (["train", "--n", "1e5", "--model.d-model", "64"], "n sets the model's width"),
        (["fit", "/nowhere.csv"], "/nowhere.csv"),
        (["predict", "/nowhere.json", "--n", "1e9", "--d", "1e10"], "/nowhere.json"),
        (["predict", "fit.json", "--n", "-1", "--d", "1e10"], "--n -1: expected a number above 0"),
        (["predict", "fit.json", "--n", "1e9"], "--d"),
        (["allocate", "fit.json", "--flops", "0"], "--flops 0: expected a number above 0"),
        (["allocate", "fit.json", "--flops", "1e300"], "below 1e40"),
    ],
)
def test_mistakes_get_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails_with(capsys, *argv)
    assert list(tmp_path.iterdir()) == [], "something half-made was left behind"


def test_what_does_not_fit_the_corpus_is_refused(corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = ["train", "--data.source", corpus, "--data.valid-fraction", "0.1"]
    assert "allow repeats with --repeat" in fails_with(capsys, *source, "--tokens", "1e9")
    assert "set model.vocab_size to that" in fails_with(capsys, *source, "--model.vocab-size", "300")
    assert list(tmp_path.iterdir()) == []


def planted_csv(path: Path) -> Path:
    """Runs of a Chinchilla law with 0.3 % noise."""
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    loss = (1.7 + 400 * n**-0.34 + 400 * d**-0.28) * np.exp(0.003 * np.random.default_rng(0).standard_normal(n.size))
    pd.DataFrame({"params": n, "tokens seen": d, "loss": loss}).to_csv(path, index=False)
    return path


COLUMNS = ("--n-column", "params", "--d-column", "tokens seen")


def test_fit_predict_allocate_from_a_csv(tmp_path, capsys):
    runs, fit = planted_csv(tmp_path / "runs.csv"), tmp_path / "fit.json"
    assert main(["fit", str(runs), *COLUMNS, "--law", "chinchilla", "--out", str(fit), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"law", "params", "intervals", "objective", "n_runs"} <= set(found)
    assert (found["law"], found["n_runs"]) == ("chinchilla", 36)
    for name, truth in {"E": 1.7, "alpha": 0.34, "beta": 0.28}.items():
        low, high = found["intervals"][name]
        assert low < high
        assert found["params"][name] == pytest.approx(truth, rel=0.15)
    assert main(["predict", str(fit), "--n", "4e9", "--d", "8e10", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["low"] < predicted["predicted"] < predicted["high"]
    assert predicted["predicted"] == pytest.approx(1.7 + 400 * 4e9**-0.34 + 400 * 8e10**-0.28, rel=0.01)
    assert main(["allocate", str(fit), "--flops", "1e21", "--json"]) == 0
    allocated = json.loads(capsys.readouterr().out)
    assert 6 * allocated["n"] * allocated["d"] == pytest.approx(1e21)
    assert main(["predict", str(fit), "--n", "4e9", "--d", "8e10"]) == 0
    text = capsys.readouterr().out
    assert "90 % interval" in text
    assert "warning: outside the fitted range: C = 1.92e+21" in text
    assert main(["predict", str(fit), "--n", "1e8", "--d", "1e10"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["allocate", str(fit), "--flops", "1e21"]) == 0
    assert "tokens" in capsys.readouterr().out


def test_fit_says_what_is_wrong_with_a_table(tmp_path, capsys):
    runs = planted_csv(tmp_path / "runs.csv")
    frame = pd.read_csv(runs)
    assert "parms" in fails_with(capsys, "fit", runs, "--n-column", "parms", "--d-column", "tokens seen")
    assert "did you mean 'params'" in fails_with(
        capsys, "fit", runs, "--n-column", "parms", "--d-column", "tokens seen"
    )
    assert "chinchila" in fails_with(capsys, "fit", runs, *COLUMNS, "--law", "chinchila")
    bad = {
        "runs": frame.head(4),
        "params": frame.assign(params=1e8),
        "loss": frame.assign(loss=[float("nan")] + [2.0] * 35),
        "no positive finite value": frame.assign(loss=[-1.0] + [2.0] * 35),
        "loss ": frame.drop(columns="loss"),
    }
    for named, table in bad.items():
        table.to_csv(tmp_path / "bad.csv", index=False)
        assert named.strip() in fails_with(capsys, "fit", tmp_path / "bad.csv", *COLUMNS).replace("bad.csv", "")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    fails_with(capsys, "fit", tmp_path / "binary.csv", *COLUMNS)
    (tmp_path / "fit.json").write_text('{"law": "chinchilla"')
    fails_with(capsys, "predict", tmp_path / "fit.json", "--n", "1e9", "--d", "1e10")


def test_dry_run_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweeps.measure.representatives", lambda runs: [])  # measuring has its own test
    assert main(["sweep", "quickstart", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"total: {len(load_sweep('quickstart')[1].runs)} runs" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_stops_on_sigterm_with_a_code_of_its_own(corpus, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sweeps.cli", "train", "--data.source", corpus, "--data.valid-fraction", "0.1"]
    command += ["--data.seq-len", "32", "--n", "1e4", "--tokens", "4e6", "--repeat", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not (out / "progress.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert "the same command continues" in text
    assert any(p.name.isdigit() for p in (out / "checkpoints").iterdir())
    assert not (out / "result.json").exists()
    assert main(["status", str(out)]) == 0
