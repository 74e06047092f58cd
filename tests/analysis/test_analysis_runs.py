"""Tables of runs in, one clear line out where they are wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import analysis.errors
import models.errors
from analysis.errors import InputError
from analysis.files import inside, write_text
from analysis.fitting.fit import fit
from analysis.fitting.saved import load_fit
from analysis.report.findings import analyse
from analysis.runs import read_runs
from analysis.tables import pool


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


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", "n_compute,tokens,loss\n"),
        (".csv", "n_compute;tokens;loss\n"),
        (".txt", "n_compute\ttokens\tloss\n"),
        (".tsv", "n_compute\ttokens\tloss\n"),
        (".csv", "\ufeffn_compute , tokens, loss\n"),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, suffix, text):
    """Semicolons, tabs, a byte-order mark, blanks in the head, thousands separators, decimal commas."""
    separator = next(mark for mark in ";\t," if mark in text)
    rows = [("1,000,000", "20,000,000", "3.5"), ("2,000,000", "40,000,000", "3.1"), ("500,000", "10,000,000", "3.9")]
    quote = '"' if separator == "," else ""
    for n, d, loss in rows:
        loss = loss.replace(".", ",") if separator == ";" else loss
        text += separator.join((f"{quote}{n}{quote}", f"{quote}{d}{quote}", loss)) + "\n"
    path = tmp_path / f"runs{suffix}"
    path.write_text(text)
    runs = read_runs(path)
    assert runs.n.tolist() == [1e6, 2e6, 5e5]
    assert runs.d.tolist() == [2e7, 4e7, 1e7]
    assert runs.loss.tolist() == [3.5, 3.1, 3.9]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, "three", ""])
@pytest.mark.parametrize("column", ["loss", "n_compute", "tokens"])
def test_the_remedy_that_an_error_names_works(column, value):
    """Failure would mean: a user who does as told meets the next error."""
    frame = table().astype({column: object})
    frame.loc[5, column] = value
    remedy = re.search(r"--where '(.*)'", message(lambda: read_runs(frame))).group(1)
    assert len(read_runs(frame, where=remedy)) == 15


def test_where_on_a_column_of_words():
    frame = table(optim=["adamw", "muon"] * 8)
    assert len(read_runs(frame, where="optim == 'muon'")) == 8
    assert len(read_runs(frame, where="optim in ['muon', 'lion'] and loss < 99")) == 8


def test_a_blank_status_is_not_finished():
    frame = table(status=["finished"] * 8 + [None, "", " ", "failed", "Finished ", np.nan, "x", "finished"])
    runs = read_runs(frame)
    assert len(runs) == 10
    assert "blank" in message(lambda: read_runs(table(status=[None] * 16)))


def test_flops_far_from_6nd_are_asked_about():
    """A wrong unit and permuted rows; counted FLOPs within a factor of ten pass."""
    honest = table()["flops"]
    assert read_runs(table(flops=1.4 * honest)).notes == ()
    assert "1e-18 times 6ND" in " ".join(read_runs(table(flops=honest / 1e18)).notes)
    shuffled = honest.sample(frac=1, random_state=0).to_numpy()
    assert "permuted" in " ".join(read_runs(table(flops=shuffled)).notes)


def test_tables_are_pooled(tmp_path):
    both = pool({"a": table(run=[f"a{i}" for i in range(16)]), "b": table(run=[f"b{i}" for i in range(16)])})
    assert len(both) == 32
    assert both["sweep"].tolist() == ["a"] * 16 + ["b"] * 16
    begun, done = both.assign(status="running"), both.assign(status="finished")
    once = pool({"a": begun, "b": done})
    assert len(once) == 32, "the same run counts once"
    assert set(once["status"]) == {"finished"}
    plain = pool({"ours": table(status=["finished"] * 15 + [""]), "theirs": table()})
    assert len(read_runs(plain)) == 31, "a table without `status` counts as finished, pooled or alone; a blank cell not"
    text = message(lambda: pool({"a": table(tokenizer="bytes"), "b": table(tokenizer="bpe")}))
    assert "do not compare" in text
    assert "twice" in message(lambda: read_runs(pd.concat([table(), table()[["loss"]]], axis=1)))


def test_no_suggestion_is_the_word_itself():
    for did_you_mean in (analysis.errors.did_you_mean, models.errors.did_you_mean):
        assert did_you_mean("loss", ["loss", "los"]) == ", did you mean 'los'?"
        assert did_you_mean("loss", ["loss"]) == ""
        assert did_you_mean("Lose", ["loss", "tokens"]) == ", did you mean 'loss'?"


def test_a_write_replaces_a_link_and_stays_inside(tmp_path):
    """Failure would mean: a report on a folder from someone else overwrites a file elsewhere."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "a.txt").write_text("precious")
    (folder / "a.txt").symlink_to(outside / "a.txt")
    write_text(inside(folder, "a.txt"), "new")
    assert (outside / "a.txt").read_text() == "precious"
    assert (folder / "a.txt").read_text() == "new"
    assert not (folder / "a.txt").is_symlink()
    for target in (outside, tmp_path / "nowhere", folder / "loop"):
        (folder / "loop").unlink(missing_ok=True)
        (folder / "loop").symlink_to(target)
        assert "loop" in message(lambda: write_text(inside(folder, "loop", "b.txt"), "new"))
    assert sorted(path.name for path in outside.iterdir()) == ["a.txt"]
    assert not (tmp_path / "nowhere").exists()


def test_runs_of_several_objectives_are_no_one_law():
    frame = pd.DataFrame({"n_compute": [1e4, 2e4], "tokens": [1e6, 1e6], "loss": [3.0, 2.9]})
    frame["objective"] = ["next_token", "answers_only"]
    with pytest.raises(InputError, match="column 'objective' differs among the runs"):
        read_runs(frame)
    assert len(read_runs(frame, where="objective == 'next_token'")) == 1


def test_runs_that_start_from_others_are_not_pooled_with_those_that_do_not():
    """Their D and C begin where the parent's end: one law of both would be of nothing. Also from a CSV, where no parent
    is a missing value; children alone, of several parents, may be fitted.
    """
    frame = pd.DataFrame({"n_compute": [1e6, 1e6, 2e6], "tokens": [1e7, 2e7, 3e7], "loss": [3.0, 2.9, 2.8]})
    frame["objective"] = "next_token"
    for none in ("", None):
        frame["parent"] = [none, "0123456789ab", "0123456789ac"]
        frame["flops_parents"] = [0.0, 1e9, 1e9]
        with pytest.raises(InputError, match="column 'parent': some of the runs start from what another run ended"):
            read_runs(frame)
        assert len(read_runs(frame, where="flops_parents == 0")) == 1
        assert len(read_runs(frame, where="flops_parents > 0")) == 2
