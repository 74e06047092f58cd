"""Status: every state is told, FLOPs add up, a planted law is forecast, and no damaged file ends it."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import ObjectiveConfig, RunConfig
from scaling.failure import Failure, write_failure
from scaling.folder import write_atomically
from scaling.result import result_of
from sweeps import status as status_module
from sweeps.cli.main import main
from sweeps.launch import slurm
from sweeps.plan import Unit, plan, write_plan
from sweeps.status import status_text, sweep_status, watch, watch_here


def law(config: RunConfig) -> float:
    return 0.9 + 40 * config.counts.n_compute**-0.4 + 300 * config.trained_tokens**-0.5


RUNS = [
    RunConfig(model=ModelConfig(d_model=d, n_layers=2, n_heads=2), tokens=tokens)
    for d in (16, 24, 32)
    for tokens in (250_000, 500_000, 1_000_000)
]


def sweep_folder(folder, configs=RUNS, planned=True):
    """A launched sweep, nothing begun: sweep.json, and plan.json with each size's shorter runs after its longest."""
    folder.mkdir(exist_ok=True)
    (folder / "runs").mkdir()
    ids = [config.run_id for config in configs]
    (folder / "sweep.json").write_text(json.dumps({"name": "mine", "holdout": None, "law": "auto", "runs": ids}))
    units = plan(configs)
    if planned:
        write_plan(folder, units, "launch")
    return folder, {unit.run_id: unit for unit in units}


def begin(folder, config):
    run = folder / "runs" / config.run_id
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    return run


def finish(folder, config, at=0, **fields):
    run = begin(folder, config)
    timing = {"seconds": 6.0, "seconds_per_step": 0.01, "resumed_at_step": at}
    result = result_of(config, law(config), branched_at_step=at, timing=timing)
    (run / "result.json").write_text(json.dumps(result.to_dict() | fields))
    return run


def entry(status, config):
    (found,) = [run for run in status["runs"] if run["run"] == config.run_id]
    return found


@pytest.fixture
def held(monkeypatch):
    """Run ids that a worker holds."""
    ids = set()
    monkeypatch.setattr(status_module, "is_held", lambda folder: folder.name in ids)
    return ids


def test_every_state_is_told_and_the_flops_add_up(tmp_path, held):
    folder, units = sweep_folder(tmp_path / "s")
    done, branch, lost, running, starting, failed, *_ = RUNS
    finish(folder, done)
    at = units[branch.run_id].at
    finish(folder, branch, at=at)
    finish(folder, lost, status="diverged", loss=None, diverged_at_step=10)
    run = begin(folder, running)
    half = (units[running.run_id].at + running.steps) // 2
    state = {"step": half, "steps": running.steps, "loss": 2.5, "tokens_per_second": 1e5, "seconds_left": 12.0}
    (run / "progress.json").write_text(json.dumps(state))
    (run / "branch.json").write_text(json.dumps({"from": units[running.run_id].after, "at": units[running.run_id].at}))
    begin(folder, starting)
    held |= {running.run_id, starting.run_id}
    run = begin(folder, failed)
    (run / "failed.json").write_text(json.dumps({"reason": "OSError: no space", "attempts": 3, "launch": "x"}))
    (folder / "logs").mkdir()
    (folder / "logs" / "worker-0.log").write_text(f"old\n\n1\n2\n3\n4\nrun {failed.run_id} failed\nother run\n")
    (folder / "logs" / "worker-1.log").write_text("nothing to do with it\n")

    status = sweep_status(folder)
    counted = {name: status[name] for name in ("done", "running", "waiting", "failed", "diverged", "damaged")}
    assert counted == {"done": 2, "running": 2, "waiting": 3, "failed": 1, "diverged": 1, "damaged": 0}
    a_step = {c: c.flops / c.steps for c in RUNS}
    by_hand = done.flops + a_step[branch] * (branch.steps - at) + a_step[lost] * 10
    by_hand += a_step[running] * (half - units[running.run_id].at)
    assert status["flops_spent"] == pytest.approx(by_hand, rel=1e-9)
    assert status["flops_wanted"] == pytest.approx(sum(c.flops for c in RUNS), rel=1e-12)
    left_by_diverged = a_step[lost] * (lost.steps - 10)
    parts = status["flops_spent"] + status["flops_shared"] + status["flops_left"] + left_by_diverged
    # A run that finished without branching shares nothing, whatever the plan said of it.
    assert parts == pytest.approx(status["flops_wanted"], rel=1e-9)
    assert status["tokens_per_second"] == 1e5
    assert entry(status, failed)["reason"] == "OSError: no space"
    assert entry(status, failed)["log"] == ["1", "2", "3", "4", f"run {failed.run_id} failed"]
    assert entry(status, running)["loss"] == 2.5
    assert 12.0 < status["seconds_left"] < math.inf
    json.dumps(status, allow_nan=False)
    text = status_text(status)
    for part in ("2 finished", "1 diverged", "OSError: no space", "attempt 3", "no forecast: 2 finished runs"):
        assert part in text
    assert text.index(running.run_id) < text.index(done.run_id)


def test_time_left_follows_the_plan_and_the_pace(tmp_path, held):
    """One worker, at 10 ms a step and 1 s a run beyond: what waits takes the sum of it."""
    folder, units = sweep_folder(tmp_path / "s", RUNS[:3])
    finish(folder, RUNS[2], timing={"seconds": RUNS[2].steps * 0.01 + 1.0, "seconds_per_step": 0.01})
    begin(folder, RUNS[1])
    held.add(RUNS[1].run_id)
    steps = sum(c.steps - units[c.run_id].at for c in RUNS[:2])
    assert sweep_status(folder)["seconds_left"] == pytest.approx(steps * 0.01 + 2.0, abs=0.06)
    held.clear()
    assert sweep_status(folder)["seconds_left"] is None
    assert "nobody is at work" in status_text(sweep_status(folder))


def test_a_run_that_needs_another_waits_for_its_end_and_says_why_it_is_not_trained(tmp_path, held):
    """Two at work would be done in the time of one, were the child not to begin where its parent ends."""
    folder, _ = sweep_folder(tmp_path / "s", RUNS[:3])
    finish(folder, RUNS[2], timing={"seconds": RUNS[2].steps * 0.01 + 1.0, "seconds_per_step": 0.01})
    begin(folder, RUNS[1])
    held.add(RUNS[1].run_id)
    write_plan(folder, [Unit(RUNS[0], needs=(RUNS[1].run_id,)), Unit(RUNS[1]), Unit(RUNS[2])], "launch")
    steps = sum(config.steps for config in RUNS[:2])
    assert sweep_status(folder, workers=2)["seconds_left"] == pytest.approx(steps * 0.01 + 2.0, abs=0.06)
    run = folder / "runs" / RUNS[0].run_id
    write_failure(run, Failure(f"needs run {RUNS[1].run_id}, which diverged", 1, "launch", True))
    assert f"needs run {RUNS[1].run_id}, which diverged" in status_text(sweep_status(folder))


def test_old_results_and_sweeps_without_a_plan(tmp_path, held):
    folder, _ = sweep_folder(tmp_path / "s", planned=False)
    finish(folder, RUNS[0])
    status = sweep_status(folder)
    assert (status["flops_spent"], status["flops_shared"]) == (RUNS[0].flops, 0.0)
    assert status["flops_wanted"] == RUNS[0].flops
    assert "FLOPs of 8 runs are not counted" in status["notes"][0]


def test_the_forecast_is_the_planted_law(tmp_path, held):
    folder, _ = sweep_folder(tmp_path / "s")
    for config in RUNS[:5]:
        finish(folder, config)
    status = sweep_status(folder)
    assert status["forecast"] == {
        "law": None,
        "why": "5 finished runs of 2 sizes; at least 6 of 2 are needed",
    }
    for config in RUNS[5:8]:
        finish(folder, config)
    begin(folder, RUNS[8])
    held.add(RUNS[8].run_id)
    status = sweep_status(folder)
    assert status["forecast"]["law"] == "chinchilla"
    assert entry(status, RUNS[8])["forecast"] == pytest.approx(law(RUNS[8]), rel=5e-3)
    assert entry(status, RUNS[0])["forecast"] is None
    assert "forecast of the final loss: chinchilla law of 8 runs" in status_text(status)


def test_no_forecast_says_why(tmp_path, held):
    same = [RunConfig(model=RUNS[0].model, tokens=250_000, seed=s) for s in range(6)]
    folder, _ = sweep_folder(tmp_path / "one", [*same, RUNS[3]])
    for config in same:
        finish(folder, config)
    assert "6 finished runs of 1 sizes" in sweep_status(folder)["forecast"]["why"]
    few_d = [RunConfig(model=c.model, tokens=250_000, seed=s) for c in (RUNS[0], RUNS[3]) for s in range(4)]
    folder, _ = sweep_folder(tmp_path / "two", [*few_d, RUNS[8]])
    for config in few_d:
        finish(folder, config)
    forecast = sweep_status(folder)["forecast"]
    assert forecast["law"] is None
    assert "all 8 fitted runs have the same value" in forecast["why"]


DAMAGE = [
    b"",
    b"{",
    b'{"run": "x", "sta',
    b"[1]",
    b"null",
    b"\xff\xfe\x00",
    b'{"loss": NaN, "status": "finished"}',
    b"7",
]


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "result.json", "progress.json", "failed.json", "../../plan.json"])
def test_damaged_files_are_listed_with_a_remedy(tmp_path, held, name, content):
    folder, _ = sweep_folder(tmp_path / "s")
    finish(folder, RUNS[0])
    run = begin(folder, RUNS[1])
    if name == "progress.json":
        held.add(RUNS[1].run_id)
    (run / name).write_bytes(content)
    status = sweep_status(folder)
    json.dumps(status, allow_nan=False)
    text = status_text(status)
    assert status["done"] == 1
    found = entry(status, RUNS[1])
    if name in ("config.json", "result.json"):
        assert found["status"] == "damaged"
        assert "launch again" in found["remedy"]
        assert found["remedy"] in text
    elif name == "failed.json":
        assert found["status"] == "failed"
    elif name == "progress.json":
        assert found["status"] == "running"
    elif content != b'{"loss": NaN, "status": "finished"}':
        assert "plan.json is damaged" in text


def test_a_run_of_an_objective_that_is_not_here_leaves_the_others_alone(tmp_path, held):
    """Of a folder of another version: waiting, running and finished ones stand as they are, if without FLOPs."""
    own, *others = RUNS[:4]
    foreign = [dataclasses.replace(c, objective=ObjectiveConfig(name="theirs")) for c in others]
    folder, _ = sweep_folder(tmp_path / "s", [own], planned=False)
    units = [Unit(config) for config in (own, *foreign)]
    write_plan(folder, units, "launch")
    ids = [unit.run_id for unit in units]
    (folder / "sweep.json").write_text(json.dumps({"name": "mine", "runs": ids}))
    finish(folder, own)
    run = begin(folder, foreign[0])
    (run / "result.json").write_text(json.dumps(result_of(own, 2.0, run=run.name).to_dict()))
    run = begin(folder, foreign[1])
    (run / "progress.json").write_text(json.dumps({"step": 5, "tokens_per_second": 1e5, "seconds_left": 9.0}))
    held.add(run.name)
    status = sweep_status(folder)
    assert [run["status"] for run in status["runs"]] == ["finished", "finished", "running", "waiting"]
    assert "FLOPs of 2 runs are not counted" in status_text(status)
    json.dumps(status, allow_nan=False)


def test_values_of_the_wrong_kind_are_no_end(tmp_path, held):
    folder, _ = sweep_folder(tmp_path / "s")
    finish(folder, RUNS[0], timing=[1])
    finish(folder, RUNS[1], loss=float("inf"))
    run = begin(folder, RUNS[2])
    (run / "progress.json").write_text('{"step": "3", "loss": null, "tokens_per_second": "fast", "seconds_left": NaN}')
    held.add(RUNS[2].run_id)
    (begin(folder, RUNS[3]) / "config.json").write_text(json.dumps(RUNS[4].to_dict()))
    (begin(folder, RUNS[5]) / "config.json").write_text(json.dumps(RUNS[5].to_dict() | {"batch_size": "8"}))
    (begin(folder, RUNS[6]) / "failed.json").write_text('{"reason": null, "at": 2}')
    status = sweep_status(folder)
    json.dumps(status, allow_nan=False)
    status_text(status)
    states = [entry(status, config)["status"] for config in RUNS[:7]]
    assert states == ["damaged", "damaged", "running", "damaged", "waiting", "damaged", "failed"]
    assert "timing = [1]: expected an object; remove it" in entry(status, RUNS[0])["reason"]
    assert "of another run" in entry(status, RUNS[3])["reason"]


def test_watch_sees_the_end_and_waits_for_another_attempt(tmp_path, held, capsys):
    folder, _ = sweep_folder(tmp_path / "s", RUNS[:2])
    finish(folder, RUNS[0])
    looks = []

    def show(status):
        looks.append((status["done"], status["waiting"], status["failed"]))
        if len(looks) == 1:
            begin(folder, RUNS[1])
            write_atomically(folder / "runs" / RUNS[1].run_id / "failed.json", '{"reason": "died", "attempts": 1}')
        elif len(looks) == 2:  # the next attempt has begun
            (folder / "runs" / RUNS[1].run_id / "failed.json").unlink()
        elif len(looks) == 3:
            write_atomically(folder / "runs" / RUNS[1].run_id / "failed.json", '{"reason": "died", "attempts": 2}')

    watch(folder, show, every=0.0)
    assert looks == [(1, 1, 0), (1, 0, 1), (1, 1, 0), (1, 0, 1), (1, 0, 1)]
    (folder / "runs" / RUNS[1].run_id / "failed.json").unlink()
    (folder / "runs" / RUNS[1].run_id / "config.json").unlink()
    (folder / "runs" / RUNS[1].run_id).rmdir()
    finish(folder, RUNS[1])
    watch_here(folder, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["done"] == 2


def test_jobs_that_wait_are_no_reason_to_launch_again(tmp_path, held, monkeypatch):
    folder, _ = sweep_folder(tmp_path / "s", RUNS[:2])
    assert "launch the sweep again" in status_text(sweep_status(folder))
    (folder / "slurm.json").write_text('{"jobs": ["7_0", "7_1"]}')
    monkeypatch.setattr(slurm, "queued", lambda: {"7_1", "8"})
    status = sweep_status(folder)
    assert status["jobs"] == 1
    assert "nobody is at work yet: 1 Slurm jobs wait or start" in status_text(status)
    monkeypatch.setattr(slurm, "queued", set)
    assert "launch the sweep again" in status_text(sweep_status(folder))

    def fails():
        raise InputError("--on slurm: squeue fails (no controller)")

    monkeypatch.setattr(slurm, "queued", fails)
    assert "note: whether jobs wait is not known: squeue fails (no controller)" in status_text(sweep_status(folder))


def test_the_command_needs_no_jax(tmp_path):
    folder, _ = sweep_folder(tmp_path / "s")
    for config in RUNS[:8]:
        finish(folder, config)
    code = (
        "import sys; from sweeps.cli.main import main; main(['status', sys.argv[1], '--json']); "
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert {"flops_wanted", "flops_spent", "flops_shared", "runs", "seconds_left", "tokens_per_second"} <= set(status)


def test_the_command_as_text(tmp_path, held, capsys):
    folder, _ = sweep_folder(tmp_path / "s", RUNS[:1])
    finish(folder, RUNS[0])
    assert main(["status", str(folder)]) == 0
    assert main(["status", str(folder / "runs" / RUNS[0].run_id)]) == 0
    assert main(["status", str(folder), "--watch"]) == 0
    assert capsys.readouterr().out.count("1 finished") == 3
