"""A folder from someone else: nothing in it runs, nothing outside it is read or written, no escape code is shown.

Each test is an attack by a folder that was downloaded; where it fails, that attack works.
"""

import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError as AnalysisInputError
from analysis.report.findings import analyse
from analysis.runs import read_runs
from analysis.text import printable, text_table
from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine.loop import train
from scaling.execution import Execution
from scaling.folder import write_atomically
from scaling.result import read_result
from scaling.trust import check_links, check_run_id, open_log
from sweeps.cli.main import main
from sweeps.define import Sweep
from sweeps.health import coordinates
from sweeps.launch.prepare import prepare
from sweeps.launch.worker import work
from sweeps.plan import plan, read_plan, write_plan
from sweeps.status import status_text, sweep_status
from sweeps.summary import report
from sweeps.table import table

ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture
def tiny(corpus) -> RunConfig:
    data = DataConfig(source=corpus, valid_fraction=0.1, seq_len=32)
    return RunConfig(model=ModelConfig(d_model=16, n_layers=1, n_heads=2), data=data, tokens=2_000, batch_size=4)


@pytest.fixture
def hooked(tiny, tmp_path, monkeypatch) -> RunConfig:
    """A run whose optimiser, imported, leaves a mark."""
    (tmp_path / "evil_hook.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nimport optax\nmake = optax.identity\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield dataclasses.replace(tiny, optim=OptimConfig(name="evil_hook:make"))
    sys.modules.pop("evil_hook", None)


@pytest.mark.parametrize("run", ["../../secret", "/etc", "", "abc", "0123456789AB", "0123456789ab/..", 5, None, ["x"]])
def test_an_id_that_is_none_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="no run id"):
        check_run_id(run, tmp_path / "sweep.json")


def test_ids_do_not_read_outside_the_folder(tiny, tmp_path):
    outside = tmp_path / "secret"
    outside.mkdir()
    write_atomically(outside / "config.json", json.dumps(tiny.to_dict()))
    sweep = tmp_path / "sweep"
    (sweep / "runs").mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"name": "x", "runs": ["../../secret"]}))
    with pytest.raises(InputError, match=r"'\.\./\.\./secret' is no run id"):
        table(sweep)
    write_plan(sweep, plan([tiny]), "launch")
    record = json.loads((sweep / "plan.json").read_text())
    record["units"][0]["after"] = "../../secret"
    (sweep / "plan.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="no run id"):
        read_plan(sweep)


def test_a_worker_calls_no_hook_that_only_the_folder_names(hooked, tmp_path):
    sweep = tmp_path / "sweep"
    write_plan_and_execution(sweep, hooked)
    events = []
    work(sweep, Execution(), lambda event, **fields: events.append((event, fields)), lambda: False)
    assert not (tmp_path / "ran").exists()
    failure = [fields for event, fields in events if event == "failed"]
    assert len(failure) == 1
    assert "--allow-hook evil_hook:make" in failure[0]["reason"]
    assert not failure[0]["again"]


def test_a_worker_calls_the_hook_of_its_definition(hooked, tmp_path):
    sweep = tmp_path / "sweep"
    write_plan_and_execution(sweep, hooked)
    work(sweep, Execution(), lambda event, **fields: None, lambda: False, ["evil_hook:make"])
    assert (tmp_path / "ran").exists()


def write_plan_and_execution(sweep, config) -> None:
    sweep.mkdir()
    write_plan(sweep, plan([config]), "launch")
    (sweep / "execution.json").write_text(json.dumps(dataclasses.asdict(Execution())))


def test_of_a_run_that_is_refused_no_configuration_is_written(tiny, tmp_path):
    """Else a run that never began stands in tables as one that did."""
    config = dataclasses.replace(tiny, tokens=10**9)  # more than the corpus holds
    write_plan_and_execution(tmp_path / "sweep", config)
    work(tmp_path / "sweep", Execution(), lambda event, **fields: None, lambda: False)
    run = tmp_path / "sweep" / "runs" / config.run_id
    assert "repeat" in json.loads((run / "failed.json").read_text())["reason"]
    assert not (run / "config.json").exists()


def test_the_coordinate_check_calls_no_hook_unless_told(hooked, tmp_path):
    sweep = tmp_path / "sweep"
    for d_model in (16, 32, 64):
        config = dataclasses.replace(hooked, model=ModelConfig(d_model=d_model, n_layers=1, n_heads=2))
        (sweep / config.run_id).mkdir(parents=True)
        write_atomically(sweep / config.run_id / "config.json", json.dumps(config.to_dict()))
    with pytest.raises(InputError, match="--allow-hook evil_hook:make"):
        coordinates(sweep)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["checkpoints", "branches", "tensorboard", "wandb"])
def test_a_run_writes_through_no_link_out_of_its_folder(tiny, tmp_path, name):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    write_atomically(run / "config.json", json.dumps(tiny.to_dict()))
    (run / name).symlink_to(outside)
    with pytest.raises(InputError, match="a link out of"):
        train(tiny, run)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("name", ["runs", "logs", "figures"])
def test_a_sweep_writes_through_no_link_out_of_its_folder(tiny, tmp_path, name):
    outside, sweep = tmp_path / "outside", tmp_path / "sweep"
    outside.mkdir()
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"name": "x", "runs": []}))
    (sweep / name).symlink_to(outside)
    with pytest.raises(InputError, match="a link out of"):
        prepare("x", Sweep((tiny,)), sweep)
    with pytest.raises(InputError, match="a link out of"):
        table(sweep)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("name", ["worker-0.log", "slurm"])
def test_status_shows_no_file_that_a_log_leads_to(tiny, tmp_path, name):
    """Else the reader's own files end up in what they paste into an issue."""
    outside, sweep = tmp_path / "secret", tmp_path / "sweep"
    outside.mkdir()
    (outside / "x.log").write_text(f"run {tiny.run_id}: a secret\n")
    run = sweep / "runs" / tiny.run_id
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(tiny.to_dict()))
    (run / "failed.json").write_text(json.dumps({"reason": "x", "attempts": 1}))
    (sweep / "logs").mkdir()
    (sweep / "logs" / name).symlink_to(outside if name == "slurm" else outside / "x.log")
    assert "secret" not in json.dumps(sweep_status(sweep)["runs"]), "a folder of runs without a sweep.json"
    (sweep / "sweep.json").write_text(json.dumps({"name": "x", "runs": [tiny.run_id]}))
    with pytest.raises(InputError, match="a link out of"):
        sweep_status(sweep)


def test_a_link_within_the_folder_is_no_way_out(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nowhere")
    check_links(tmp_path)


def test_what_is_written_replaces_a_link(tmp_path):
    outside, link = tmp_path / "outside.json", tmp_path / "result.json"
    outside.write_text("precious")
    link.symlink_to(outside)
    write_atomically(link, "{}")
    assert outside.read_text() == "precious"
    assert link.read_text() == "{}"


def test_a_log_follows_no_link(tmp_path):
    outside, link = tmp_path / "outside", tmp_path / "worker-0.log"
    outside.write_text("precious")
    link.symlink_to(outside)
    for mode in ("ab", "wb"):
        with pytest.raises(OSError):
            open_log(link, mode)
    assert outside.read_text() == "precious"


def test_escapes_in_a_reason_do_not_reach_the_terminal(tiny, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    run = sweep / "runs" / tiny.run_id
    run.mkdir(parents=True)
    write_plan(sweep, plan([tiny]), "launch")
    (sweep / "sweep.json").write_text(json.dumps({"name": "x", "runs": [tiny.run_id]}))
    (run / "failed.json").write_text(json.dumps({"reason": f"lost {ESCAPE}", "attempts": 1}))
    assert main(["status", str(sweep)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "lost" in status_text(sweep_status(sweep))
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / f"no{ESCAPE}")])
    assert "\x1b" not in capsys.readouterr().err


def test_escapes_in_a_report_do_not_reach_the_terminal(tmp_path, capsys, monkeypatch):
    """Who left a run is read from its lease: a file of the folder."""
    from scaling.config import RunConfig
    from scaling.result import result_of
    from sweeps.cli.main import main, print_progress

    def train(config, folder, execution, should_stop, report, progress):
        report("left by process 1 on \x1b[2Jelsewhere")
        return result_of(RunConfig(), 2.0, bits_per_byte=1.0)

    monkeypatch.setattr("scaling.engine.loop.train", train)
    assert main(["train", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "elsewhere" in text
    print_progress({"step": 1, "steps": 2, "loss": None, "tokens_per_second": 3.0, "seconds_left": 4.0})
    assert "loss -  3 tokens/s" in capsys.readouterr().out, "an objective need not have a metric named loss"


def test_tables_show_no_control_characters():
    assert printable("a\nb\x1b[31m\u202ec\x00") == "a b�[31m�c�"
    shown = text_table([["run", "loss"], [f"x{ESCAPE}", "1.0"]])
    assert "\x1b" not in shown
    assert shown.splitlines()[0].startswith("run")


def test_the_report_writes_inside_its_folder(tmp_path):
    """What it writes replaces a link to a file elsewhere; a folder of figures that leads elsewhere is refused."""
    n, d = (v.ravel() for v in np.meshgrid([1e7, 2e7, 4e7, 8e7], [1e9, 2e9, 4e9, 8e9]))
    noise = np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(n)))
    runs = read_runs(
        pd.DataFrame({"n_compute": n, "tokens": d, "loss": (1.7 + 400 * n**-0.34 + 400 * d**-0.28) * noise})
    )
    table, elsewhere, out = tmp_path / "runs.csv", tmp_path / "elsewhere", tmp_path / "out"
    for folder in (elsewhere, out / "figures"):
        folder.mkdir(parents=True)
    names = ("report.html", "summary.json", "figures/compute.png")
    for name in names:
        (elsewhere / name.split("/")[-1]).write_bytes(b"precious")
        (out / name).symlink_to(elsewhere / name.split("/")[-1])
    findings = analyse(runs, law="chinchilla", draws=20)
    report(findings, [table], out, [], 0.0)
    assert {path.read_bytes() for path in elsewhere.iterdir()} == {b"precious"}
    assert not any((out / name).is_symlink() for name in names)
    assert (out / "figures" / "compute.png").read_bytes().startswith(b"\x89PNG")

    shutil.rmtree(out / "figures")
    (out / "figures").symlink_to(elsewhere)
    with pytest.raises(AnalysisInputError, match="is a link out of"):
        report(findings, [table], out, [], 0.0)
    assert {path.read_bytes() for path in elsewhere.iterdir()} == {b"precious"}


def test_a_link_among_the_checkpoints_is_set_aside(tiny, tmp_path):
    """Orbax clears what a killed save left, and cannot clear a link: the run would fail at every launch."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "kept").mkdir(parents=True)
    (run / "checkpoints").mkdir(parents=True)
    (run / "failed.json").mkdir()
    write_atomically(run / "config.json", json.dumps(tiny.to_dict()))
    (run / "checkpoints" / "31.orbax-checkpoint-tmp").symlink_to(outside)
    assert train(tiny, run).finished
    assert (outside / "kept").is_dir()
    assert len(list(run.glob("damaged-*"))) == 2


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(InputError, match="not readable"):
        read_result(tmp_path)
