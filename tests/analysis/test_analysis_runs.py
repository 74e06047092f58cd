"""Tables of runs in, one clear line out where they are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.fitting.fit import fit
from analysis.fitting.saved import load_fit
from analysis.report.findings import analyse
from analysis.runs import read_runs


def table(**changes) -> pd.DataFrame:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e5, 4), np.geomspace(1e6, 8e6, 4)))
    columns = {"n_compute": n, "tokens": d, "flops": 6 * n * d, "loss": 0.9 + 28 * n**-0.4 + 70 * d**-0.36}
    return pd.DataFrame(columns | changes)


def message(call) -> str:
    with pytest.raises(InputError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text, f"an error must be one line: {text!r}"
    return text


def test_defaults_and_status(tmp_path):
    frame = table(status="finished", n_total=1.0)
    frame.loc[3, ["status", "loss"]] = ["diverged", np.nan]
    for path, write in ((tmp_path / "a.csv", "to_csv"), (tmp_path / "a.parquet", "to_parquet")):
        getattr(frame, write)(path, index=False)
        runs = read_runs(path, holdout="flops > 1e12")
        assert (runs.n_column, runs.d_column, len(runs)) == ("n_compute", "tokens", 15)
        assert "1 of 16" in runs.notes[0]
        assert np.array_equal(runs.holdout, runs.flops > 1e12)
        assert len(runs.fitted) == (~runs.holdout).sum()


def test_tokens_from_compute_and_quoted_columns():
    frame = table().rename(columns={"n_compute": "Model Size", "flops": "Training FLOP"}).drop(columns="tokens")
    runs = read_runs(
        frame,
        n_column="Model Size",
        c_column="Training FLOP",
        where="`loss` < 3 and `Model Size` > 1.1e4",
        holdout="C > 1e12",
    )
    assert len(runs) == 12
    np.testing.assert_allclose(6 * runs.n * runs.d, runs.flops)
    assert runs.holdout.any()


def test_foreign_names_are_found_when_there_is_one_candidate():
    frame = table().rename(columns={"n_compute": "params"})
    assert read_runs(frame).n_column == "params"
    assert "--n-column" in message(lambda: read_runs(frame.assign(N=1.0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_column": "n_comptue"}, ["n_comptue", "n_compute"]),
        ({"loss_column": "los"}, ["'los'", "'loss'"]),
        ({"d_column": "tokns"}, ["tokns", "tokens"]),
        ({"where": "flosp > 1"}, ["--where", "flosp", "flops"]),
        ({"where": "loss <"}, ["--where", "loss <"]),
        ({"where": "loss < 0"}, ["keeps none"]),
        ({"where": "loss + 1"}, ["true or false"]),
        ({"where": "3 > 2"}, ["names no column"]),
        ({"where": "loss < 'a'"}, ["--where"]),
        ({"where": "@loss > 1"}, ["--where"]),
        ({"where": "loss.__class__ == 1"}, ["only comparisons"]),
        ({"where": "loss.to_csv('stolen')"}, ["only comparisons"]),
        ({"where": "__import__('os')"}, ["only comparisons"]),
        ({"holdout": "flops > 1e99"}, ["--holdout", "none of the 16"]),
        ({"holdout": "flops > 0"}, ["--holdout", "all 16"]),
    ],
)
def test_bad_options(options, words):
    text = message(lambda: read_runs(table(), **options))
    assert all(word in text for word in words), text


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0, "three"])
@pytest.mark.parametrize("column", ["loss", "n_compute", "tokens"])
def test_bad_values_are_counted(column, value):
    frame = table().astype({column: object})
    frame.loc[5, column] = value
    text = message(lambda: read_runs(frame))
    assert f"'{column}'" in text
    assert "1 of 16" in text
    assert "row 5" in text


def test_bad_files(tmp_path):
    assert "no such file" in message(lambda: read_runs(tmp_path / "absent.csv"))
    assert "folder" in message(lambda: read_runs(tmp_path))
    (tmp_path / "empty.csv").write_text("")
    assert "cannot be read" in message(lambda: read_runs(tmp_path / "empty.csv"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    assert "cannot be read" in message(lambda: read_runs(tmp_path / "torn.parquet"))
    (tmp_path / "runs.xyz").write_text("a,b\n1,2\n")
    assert ".parquet" in message(lambda: read_runs(tmp_path / "runs.xyz"))
    (tmp_path / "words.csv").write_text("alpha,beta\n1,2\n")
    assert "loss" in message(lambda: read_runs(tmp_path / "words.csv"))
    assert "no rows" in message(lambda: read_runs(table().head(0)))
    assert "status" in message(lambda: read_runs(table(status="running")))


def test_runs_that_cannot_identify_a_law():
    text = message(lambda: fit(read_runs(table().head(5)), "chinchilla"))
    assert "5 runs" in text
    assert "at least 6" in text
    one_n = read_runs(table(n_compute=1e5))
    assert "same value" in message(lambda: fit(one_n, "chinchilla"))
    assert "same value" in message(lambda: analyse(read_runs(table(tokens=1e6))))
    assert "did you mean 'chinchilla'" in message(lambda: analyse(read_runs(table()), law="chinchila"))
    assert "at least 6" in message(lambda: analyse(read_runs(table().head(4))))


def test_damaged_fit_file(tmp_path):
    path = fit(read_runs(table()), "chinchilla").save(tmp_path / "fit.json")
    assert load_fit(path).law == "chinchilla"
    whole = path.read_text()
    assert "no such" in message(lambda: load_fit(tmp_path / "absent.json")).lower()
    for text in (
        whole[:200],
        "[]",
        "{}",
        json.dumps(json.loads(whole) | {"z": [1.0]}),
        json.dumps({"law": "chinchilla"}),
    ):
        path.write_text(text)
        assert "scaling fit" in message(lambda: load_fit(path))
    path.write_text(json.dumps(json.loads(whole) | {"law": "chinchila"}))
    assert "chinchilla" in message(lambda: load_fit(path))
    assert [p.name for p in tmp_path.iterdir()] == ["fit.json"], "a write left something half-made behind"


def test_nothing_here_imports_jax_or_other_rooms():
    """Failure would mean: a PyTorch user with a CSV has to install and start JAX."""
    code = (
        "import sys, pkgutil, importlib, analysis\n"
        "assert not {'pandas', 'scipy', 'matplotlib'} & set(sys.modules), 'importing analysis alone must stay light'\n"
        "[importlib.import_module('analysis.' + m.name) for m in pkgutil.iter_modules(analysis.__path__)]\n"
        "print(sorted({'jax', 'flax', 'models', 'scaling', 'sweeps', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
