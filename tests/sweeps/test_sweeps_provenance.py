"""With what a run was made, the table of many folders, and what two runs or two sweeps differ in."""

import dataclasses
import hashlib
import json
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.runs import read_runs
from models.config import ModelConfig
from models.errors import InputError
from scaling import provenance
from scaling.config import ObjectiveConfig, OptimConfig, RunConfig
from scaling.result import result_of
from sweeps.cli.main import main
from sweeps.cost import ENDS, MOST_ROWS
from sweeps.define import Sweep, keep_definition, load_sweep, union
from sweeps.differences import HEADLINE, difference, difference_text, table_text
from sweeps.summary import checklist, describe
from sweeps.table import EXECUTED, table

BASE = RunConfig(model=ModelConfig(d_model=16, n_layers=1, n_heads=2), tokens=20_000)
RUNS = tuple(dataclasses.replace(BASE, tokens=n * 20_000, seed=seed) for n in (1, 2) for seed in (0, 1))
WHERE = {"commit": "0123456789ab", "jax": "0.10.2", "device": "cpu"}


# In use since the first version.
COLUMNS = {
    *("run", "status", "n_nonembedding", "n_compute", "n_total", "tokens", "unique_tokens", "flops", "flops_6nd"),
    *("loss", "bits_per_byte", "train_loss", "d_model", "n_layers", "n_heads", "d_ff", "vocab_size"),
    *("parametrization", "seq_len", "batch_size", "steps", "lr", "weight_decay", "b2", "schedule", "dtype", "seed"),
    *("data_seed", "source", "tokenizer", "corpus"),
}


def written(folder, configs, loss=2.0, where=WHERE, **facts):
    """A folder of finished runs, each with `loss` and its number over a thousand."""
    for i, config in enumerate(configs):
        run = folder / "runs" / config.run_id
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(config.to_dict()))
        result = result_of(config, loss + i / 1000, corpus="c", where=where, **facts)
        (run / "result.json").write_text(json.dumps(result.to_dict()))
    return folder


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    """Of a repository of its own: clean, then with a tracked file changed, then without git."""
    (tmp_path / "code.py").write_text("x = 1\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout[:12]
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == head
    (tmp_path / "code.py").write_text("x = 2\n")
    assert provenance.commit() == head + "+changes"
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "elsewhere")
    assert provenance.commit() != head, "an installed package says its version, or the commit it was built from"


def test_the_lock_is_known_by_its_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert "lock" not in provenance.software.__wrapped__()
    (tmp_path / "requirements.lock").write_text("jax==1\n")
    software = provenance.software.__wrapped__()
    assert software["lock"] == hashlib.sha256(b"jax==1\n").hexdigest()[:12]
    assert {"commit", "python", "jax", "optax"} <= set(software)


def test_the_definition_is_kept_beside_the_runs(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from sweeps.define import Sweep, grid\ndef sweep():\n    return Sweep(grid({'seed': [0, 1]}))\n")
    _, sweep = load_sweep(str(path))
    (tmp_path / "out").mkdir()
    said = keep_definition(sweep, tmp_path / "out")
    assert (tmp_path / "out" / "definition.py").read_text() == path.read_text()
    assert said == {"definition": {"file": "mine.py", "digest": hashlib.sha256(path.read_bytes()).hexdigest()[:12]}}
    assert keep_definition(Sweep(RUNS), tmp_path / "out") == {}, "a sweep made in Python has no file"
    assert load_sweep("quickstart")[1].definition.name == "quickstart.py"


def test_with_what_a_run_was_made_is_a_column_where_it_differs(tmp_path):
    written(tmp_path, RUNS[:2])
    assert not {"commit", "jax", "device"} & set(table(tmp_path))
    written(tmp_path, RUNS[2:], where=WHERE | {"commit": "ba9876543210"})
    frame = table(tmp_path)
    assert set(frame["commit"]) == {"0123456789ab", "ba9876543210"}
    assert "jax" not in frame


def test_the_names_of_the_columns_stay(tmp_path):
    """If this fails, scripts and definitions that name a column break: hold-outs, `--where`, notebooks."""
    config = dataclasses.replace(BASE, optim=OptimConfig(lr=0.5, b2=0.7, weight_decay=0.3), seed=5)
    (found,) = table(written(tmp_path, [config])).to_dict("records")
    assert set(found) >= COLUMNS
    wanted = {"lr": 0.5, "b2": 0.7, "weight_decay": 0.3, "seed": 5, "data_seed": 0, "schedule": "wsd", "loss": 2.0}
    assert {name: found[name] for name in wanted} == wanted
    assert set(EXECUTED) <= set(found)


def test_runs_of_one_trunk_are_known_by_it(tmp_path):
    """A branch of a branch shares the noise of the first."""
    long, middle, short, alone = RUNS
    written(tmp_path, [long, alone])
    written(tmp_path, [middle], branched_from=long.run_id, branched_at_step=3)
    written(tmp_path, [short], branched_from=middle.run_id, branched_at_step=2)
    trunks = table(tmp_path).set_index("run")["trunk"]
    assert trunks.to_dict() == dict.fromkeys([long.run_id, middle.run_id, short.run_id], long.run_id) | {
        alone.run_id: alone.run_id
    }


def test_folders_are_pooled_and_each_run_counts_once(tmp_path):
    a, b = written(tmp_path / "a", RUNS[:2]), written(tmp_path / "b", RUNS[2:])
    unfinished = b / "runs" / RUNS[0].run_id
    unfinished.mkdir()
    (unfinished / "config.json").write_text(json.dumps(RUNS[0].to_dict()))
    for frame in (table(a, b), table(b, a)):
        assert sorted(frame["run"]) == sorted(c.run_id for c in RUNS)
        assert set(frame["status"]) == {"finished"}
        assert frame.set_index("run")["sweep"].to_dict() == {c.run_id: "a" if c in RUNS[:2] else "b" for c in RUNS}
    written(tmp_path / "c", [dataclasses.replace(BASE, seed=9)])
    result = next((tmp_path / "c").glob("runs/*/result.json"))
    result.write_text(result.read_text().replace('"corpus": "c"', '"corpus": "d"'))
    with pytest.raises(InputError, match="2 versions of the corpus"):
        table(a, tmp_path / "c")


def test_of_a_run_in_two_folders_the_one_that_diverged_is_taken_before_one_on_its_way(tmp_path):
    a, b = written(tmp_path / "a", RUNS[:1]), written(tmp_path / "b", RUNS[:1])
    result = next(a.glob("runs/*/result.json"))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"status": "diverged", "loss": None}))
    next(b.glob("runs/*/result.json")).unlink()
    for frame in (table(a, b), table(b, a)):
        assert list(frame["status"]) == ["diverged"]


def test_folders_of_one_name_are_told_apart(tmp_path):
    """Else pooling finds nothing to compare, and losses on two corpora pass for those of one sweep."""
    folders = written(tmp_path / "old" / "mine", RUNS[:2]), written(tmp_path / "new" / "mine", RUNS[2:])
    assert set(table(*folders)["sweep"]) == set(map(str, folders))


def test_a_run_of_an_objective_that_is_not_here_is_a_row_like_others(tmp_path):
    foreign = dataclasses.replace(BASE, objective=ObjectiveConfig(name="theirs"))
    folder = written(tmp_path / "a", RUNS[:1])
    (folder / "runs" / foreign.run_id).mkdir()
    (folder / "runs" / foreign.run_id / "config.json").write_text(json.dumps(foreign.to_dict()))
    frame = table(folder).set_index("run")
    assert frame["status"].to_dict() == {RUNS[0].run_id: "finished", foreign.run_id: "unfinished"}
    assert frame.loc[foreign.run_id, "objective"] == "theirs"
    assert frame["flops"].isna().tolist() == [False, True]


def test_the_checklist_names_every_commit(tmp_path):
    """Else all runs pass for those of the commit that the last of them was made with."""
    first, later = written(tmp_path / "a", RUNS[:1]), WHERE | {"commit": "fedcba987654"}
    written(first, RUNS[1:], where=later)
    findings = SimpleNamespace(runs=SimpleNamespace(frame=table(first)))
    code = checklist(findings, describe(first))["code"]
    assert WHERE["commit"] in code
    assert later["commit"] in code
    assert code.count(WHERE["jax"]) == 1


def test_of_very_many_runs_the_table_shows_the_ends():
    """A hundred thousand rows take half a minute to lay out, and nobody reads them."""
    rows = [dict.fromkeys(HEADLINE, i) for i in range(MOST_ROWS + 1)]
    assert len(table_text(pd.DataFrame(rows)).splitlines()) < 3 * ENDS
    assert len(table_text(pd.DataFrame(rows[1:])).splitlines()) > MOST_ROWS


def test_the_table_command_writes_a_csv_that_fit_reads(tmp_path, capsys):
    tokens = (50_000, 100_000, 200_000, 400_000)
    models = [ModelConfig(d_model=d, n_layers=1, n_heads=2) for d in (8, 16, 32)]
    for i, config in enumerate(union(dataclasses.replace(BASE, model=m, tokens=D) for m in models for D in tokens)):
        n, d = config.counts.n_compute, config.trained_tokens
        written(tmp_path / "s", [config], loss=1.5 + (1e3 / n) ** 0.4 + (1e4 / d) ** 0.4 + i * 1e-4)
    out = tmp_path / "runs.csv"
    assert main(["table", str(tmp_path / "s"), "--csv", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.split()[:6] == ["run", "status", "n_compute", "tokens", "flops", "loss"]
    assert "d_model" in text
    assert "vocab_size" not in text, "a column in which no run differs is not shown"
    frame = pd.read_csv(out)
    assert len(frame) == 12
    assert {"vocab_size", "eps", "trunk", "flops_spent"} <= set(frame)
    assert len(read_runs(out, n_unit=1, d_unit=1, loss_unit="nats")) == 12
    assert main(["table", str(tmp_path / "s"), "--json"]) == 0


def test_two_runs_differ_in_what_was_changed(tmp_path, capsys):
    other = dataclasses.replace(BASE, optim=OptimConfig(lr=0.5))
    written(tmp_path, [BASE, other])
    a, b = (tmp_path / "runs" / c.run_id for c in (BASE, other))
    rows = {row["field"]: (row["a"], row["b"]) for row in difference(a, b)["rows"]}
    assert rows == {"optim.lr": (0.01, 0.5), "run": (BASE.run_id, other.run_id), "loss": (2.0, 2.001)}
    assert main(["diff", str(a), str(b)]) == 0
    assert "optim.lr" in capsys.readouterr().out
    assert difference(a, a)["rows"] == []
    with pytest.raises(InputError, match="is a run and"):
        difference(a, tmp_path)


def test_two_sweeps_differ_in_runs_fields_and_results(tmp_path, capsys):
    a = written(tmp_path / "a", RUNS[:3])
    b = written(tmp_path / "b", [*RUNS[:1], dataclasses.replace(BASE, dtype="bfloat16")])
    written(b, RUNS[1:2], loss=2.5, where=WHERE | {"jax": "0.11.0"})
    result = difference(a, b)
    assert set(result["both"]) == {c.run_id for c in RUNS[:2]}
    assert result["only_a"] == [RUNS[2].run_id]
    assert len(result["only_b"]) == 1
    fields = {row["field"]: (row["a"], row["b"]) for row in result["rows"]}
    assert fields["dtype"] == (["float32"], ["bfloat16", "float32"])
    assert [(row["run"], row["field"]) for row in result["results"] if row["field"] == "loss"] == [
        (RUNS[1].run_id, "loss")
    ]
    assert main(["diff", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "2 runs in both, 1 only in A, 1 only in B" in text
    assert main(["diff", str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "sweeps"
    assert "same results" in difference_text(difference(a, a), "a", "a")
