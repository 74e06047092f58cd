"""Real launchers and workers as processes: killed, stopped, broken, and in the end the same table bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
from processes import DEFINITION, assert_same_runs, finish, start, wait_for, workers_of

from models.errors import InputError
from scaling.config import RunConfig
from scaling.folder import read_config, write_atomically
from scaling.result import result_of
from sweeps.cli.main import main
from sweeps.define import load_sweep
from sweeps.launch import local
from sweeps.launch.prepare import check_sweep, prepare
from sweeps.launch.queue import mark
from sweeps.plan import plan, write_plan
from sweeps.table import table


@pytest.mark.slow
def test_workers_and_launches_do_not_matter(definition, undisturbed, tmp_path):
    assert set(undisturbed["status"]) == {"finished"}
    finish(definition, tmp_path / "one", "--workers", "1")
    assert_same_runs(table(tmp_path / "one"), undisturbed)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("result.json")}
    assert "4 finished" in finish(definition, tmp_path / "one")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("result.json")}


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(definition, undisturbed, tmp_path):
    out = tmp_path / "sweep"
    process = start(definition, out)
    wait_for(lambda: len(workers_of(process.pid)) == 2 and list(out.glob("runs/*/config.json")))
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert_same_runs(table(out), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_saves_and_a_second_launch_continues(definition, undisturbed, tmp_path, number):
    out = tmp_path / "sweep"
    process = start(definition, out)
    wait_for(lambda: len(list(out.glob("runs/*/config.json"))) == 2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "launch again to continue" in text
    finish(definition, out)
    assert_same_runs(table(out), undisturbed)


def test_failures_are_told_and_leave_the_others_alone(definition, tmp_path):
    """A run folder that is not a run fails that run alone, with its reason; diverged runs are counted apart."""
    out = tmp_path / "sweep"
    _, sweep = load_sweep(str(definition))
    prepare("tiny", sweep, out)
    broken = out / "runs" / sweep.runs[0].run_id
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(sweep.runs[1].to_dict()))
    lines = []
    state = local.launch(sweep, out, workers=1, show=lambda state, line: lines.append(line))
    assert (state.finished, list(state.failed)) == (3, [broken.name])
    assert f"holds another run ({sweep.runs[1].run_id}" in state.failed[broken.name]
    assert sum("trying again" in line for line in lines) == 0, "bad input does not mend by trying again"


def test_a_run_whose_folder_cannot_be_used_leaves_the_others_alone(definition, tmp_path):
    """A file stands where the run's folder should be: nothing can be leased, nor a failure kept."""
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    dearest = max(sweep.runs, key=lambda config: config.flops).run_id
    (out / "runs" / dearest).write_text("in the way")
    state = local.launch(sweep, out, workers=1)
    assert (state.finished, list(state.failed)) == (3, [dearest])
    assert "its folder cannot be used: [Errno 20]" in state.failed[dearest]


@pytest.mark.slow
def test_what_can_be_made_again_is_set_aside_and_made_again(definition, undisturbed, tmp_path):
    """Each damage would stop its run, or every launch, for ever; the content is that of a run begun and of one over."""
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    lost, unreadable, no_result, leased = (out / "runs" / config.run_id for config in sweep.runs)
    for run in (lost, unreadable, no_result, leased):
        run.mkdir()
    (lost / "curve.parquet").write_bytes(b"")  # a run that had begun
    (unreadable / "config.json").write_text("[" * 100_000)
    (no_result / "result.json").write_text('{"status": "fin')
    (leased / "lease-000001").mkdir()
    prepare("tiny", sweep, out)
    state = local.launch(sweep, out, workers=1)
    assert (state.finished, state.failed) == (4, {})
    assert_same_runs(table(out), undisturbed)
    aside = sorted(path.name.rpartition("-")[0] for path in out.glob("runs/*/damaged-*"))
    assert aside == ["damaged-config.json", "damaged-lease-000001", "damaged-result.json"]


def test_a_result_without_its_configuration_is_kept(definition, tmp_path):
    """A lost config.json follows from the folder's name; until now no later launch got past it."""
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    config = sweep.runs[0]
    run = out / "runs" / config.run_id
    run.mkdir()
    result = result_of(config, 2.0, corpus=check_sweep(sweep)[config.run_id])
    (run / "result.json").write_text(json.dumps(result.to_dict()))
    prepare("tiny", sweep, out)
    assert read_config(run) == config
    assert list(table(out)["loss"]) == [2.0]


def test_marks_follow_the_results(definition, tmp_path):
    """A result that was removed, to have its run trained again, is not over for the workers."""
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    mark(out, [sweep.runs[0].run_id])
    prepare("tiny", sweep, out)
    assert os.listdir(out / "over") == []


def test_a_sweep_with_diverged_runs_ends_with_1(definition, tmp_path, capsys):
    """As the README says: what a script would go on with is not all there."""
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    corpora = check_sweep(sweep)
    for i, config in enumerate(sweep.runs):
        run = out / "runs" / config.run_id
        run.mkdir()
        (run / "config.json").write_text(json.dumps(config.to_dict()))
        result = result_of(config, None if i == 0 else 2.0, corpus=corpora[config.run_id])
        (run / "result.json").write_text(json.dumps(result.to_dict()))
    assert main(["sweep", str(definition), "--out", str(out)]) == 1
    assert "3 finished, 1 diverged, 0 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_takes_what_another_launch_adds(definition, undisturbed, tmp_path):
    """And keeps what that one leaves out; so runs added while Slurm's jobs run are trained by them."""
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    units = plan(sweep.runs)
    write_atomically(out / "execution.json", "{}")
    first, left_out = sorted((unit for unit in units if unit.after is None), key=lambda unit: -unit.flops)
    write_plan(out, [first, left_out], "one")
    worker = subprocess.Popen([sys.executable, "-m", "sweeps.launch.worker", str(out), "--cores", "0"])
    try:
        wait_for((out / "runs" / first.run_id / "config.json").exists)
        write_plan(out, [unit for unit in units if unit is not left_out], "two")
        assert worker.wait(120) == 0
    finally:
        worker.kill()
    assert_same_runs(table(out), undisturbed)


def test_a_sweep_is_checked_before_anything_is_made(definition, tmp_path, corpus):
    path = tmp_path / "large.py"
    path.write_text(DEFINITION.format(source=corpus).replace("repeat=True", "repeat=False"))
    _, sweep = load_sweep(str(path))
    with pytest.raises(InputError, match="allow repeats with --repeat"):
        prepare("large", sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(InputError, match="not the folder of a sweep"):
        prepare("tiny", load_sweep(str(definition))[1], tmp_path / "mine")
    with pytest.raises(InputError, match="--workers 0"):
        local.placements(0, 1)
    text = definition.read_text().rstrip()
    for wrong, message in {"law='chinchila'": "chinchilla", "holdout='flop > 1'": "flop"}.items():
        path.write_text(f"{text[:-1]}, {wrong})")
        with pytest.raises(ValueError, match=message):
            prepare("wrong", load_sweep(str(path))[1], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_a_killed_prepare_left_is_no_obstacle(definition, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".sweep.json.123.tmp").write_text('{"na')
    prepare("tiny", load_sweep(str(definition))[1], out)
    assert (out / "sweep.json").exists()


def test_workers_that_cannot_begin_are_told(definition, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    _, sweep = load_sweep(str(definition))
    prepare("tiny", sweep, tmp_path / "out")
    with pytest.raises(InputError, match="workers end before they can begin"):
        local.launch(sweep, tmp_path / "out", workers=1)


def test_runs_on_two_versions_of_a_corpus_are_not_mixed(definition, tmp_path):
    _, sweep = load_sweep(str(definition))
    out = tmp_path / "out"
    prepare("tiny", sweep, out)
    for config, corpus in zip(sweep.runs, "aabb", strict=True):
        folder = out / "runs" / config.run_id
        folder.mkdir()
        write_atomically(folder / "config.json", json.dumps(config.to_dict()))
        write_atomically(folder / "result.json", json.dumps(result_of(config, 2.0, corpus=corpus).to_dict()))
    with pytest.raises(InputError, match="2 versions of the corpus"):
        table(out)
    with pytest.raises(InputError, match="was trained on another version"):
        prepare("tiny", sweep, out)


def test_table_of_begun_runs(tmp_path):
    """Waiting runs have no row; a begun one has a row without a loss; damage is named."""
    config = RunConfig()
    folder = tmp_path / "runs" / config.run_id
    write_atomically(tmp_path / "sweep.json", json.dumps({"runs": [config.run_id, "000000000000"]}))
    assert table(tmp_path).empty
    folder.mkdir(parents=True)
    write_atomically(folder / "config.json", json.dumps(config.to_dict()))
    frame = table(tmp_path)
    assert list(frame["status"]) == ["unfinished"]
    assert frame["loss"].isna().all()
    (folder / "result.json").write_text('{"run": "x", "status"')
    with pytest.raises(InputError, match=r"result.json: not readable"):
        table(tmp_path)
    (folder / "result.json").write_text('{"run": "x", "status": "finished", "loss": null}')
    with pytest.raises(InputError, match=r"lacks bits_per_byte.*; remove it"):
        table(tmp_path)
    (folder / "result.json").write_text(json.dumps(result_of(config, 2.0, run="x").to_dict()))
    with pytest.raises(InputError, match=r"result.json is not of this config"):
        table(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        table(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no runs"):
        table(tmp_path / "empty")


@pytest.mark.slow
def test_sharing_changes_the_cost_and_not_the_table(definition, undisturbed, tmp_path):
    finish(definition, tmp_path / "alone", "--no-sharing")
    assert_same_runs(table(tmp_path / "alone"), undisturbed)
    spent = {}
    for name in ("shared", "alone"):
        finish(definition, tmp_path / name, *(["--no-sharing"] if name == "alone" else []))
        results = [json.loads(p.read_text()) for p in (tmp_path / name).glob("runs/*/result.json")]
        spent[name] = sum(r["flops_spent"] for r in results) / sum(r["flops"] for r in results)
        assert sum(r["branched_from"] is not None for r in results) == (2 if name == "shared" else 0)
    assert spent["alone"] == 1.0
    # Two doubling horizons and a fifth of cooldown: (0.8 x 2 + 0.2 x 3) of 3, to the rounding of whole steps.
    assert spent["shared"] == pytest.approx(2.2 / 3, rel=0.01)


@pytest.mark.slow
def test_swarms_train_the_same_sweep(corpus, tmp_path):
    """Switched on, on a CPU: the runs of one shape go together, and losses are those of solo runs to 1e-5.

    One worker: of two, each may take a part of those that are ready. Short runs: at a high rate rounding grows tenfold
    every 50 steps or so, whatever it came from.
    """
    path = tmp_path / "rates.py"
    text = DEFINITION.format(source=corpus).replace('"tokens": [100_000, 200_000]', '"optim.lr": [0.01, 0.02, 0.04]')
    text = text.replace("for d in (8, 16)", "for d in (16,)")
    path.write_text(text.replace("batch_size=2", "batch_size=2, tokens=10_000"))
    frames = []
    for swarm in ("on", "off"):
        finish(path, tmp_path / swarm, "--swarm", swarm, "--workers", "1")
        frames.append(table(tmp_path / swarm))
    timings = [json.loads(p.read_text())["timing"] for p in (tmp_path / "on").glob("runs/*/result.json")]
    assert [t.get("swarm") for t in timings] == [3] * 3
    assert list(frames[0]["run"]) == list(frames[1]["run"])
    pd.testing.assert_series_equal(frames[0]["loss"], frames[1]["loss"], rtol=1e-5)


HOOKED = """
from scaling.config import OptimConfig, RunConfig
from sweeps.define import Sweep

def sweep():
    return Sweep((RunConfig(tokens=10_000, optim=OptimConfig(name={name!r}, options={options!r})),))
"""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("optax:scale_by_adamm", "", "has no attribute 'scale_by_adamm'"),
        ("otpax:scale_by_adam", "", "No module named 'otpax'"),
        ("optax:scale_by_adam", '{"beta": 1}', "unexpected keyword argument 'beta'"),
    ],
)
def test_a_misspelt_hook_is_found_before_anything_is_written(tmp_path, name, options, message):
    (tmp_path / "hooked.py").write_text(HOOKED.format(name=name, options=options))
    _, sweep = load_sweep(str(tmp_path / "hooked.py"))
    with pytest.raises(InputError, match=f"optim.name = '{name}': .*{message}"):
        prepare("hooked", sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()
