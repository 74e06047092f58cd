"""Kills, damage, a copied folder, a clock that is wrong: in the end the same table bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import assert_same_runs, finish, kill, progress_of, start, wait_for, workers_of

from scaling.engine.lease import name, newest
from sweeps.table import table

pytestmark = pytest.mark.slow
OFTEN = ("--checkpoint-seconds", "0.05")
HOUR = 3600


def same(out, undisturbed):
    assert_same_runs(table(out), undisturbed)


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_ten_random_moments_the_table_is_the_same(definition, undisturbed, tmp_path, seed):
    """kill -9 of a worker, of the launcher, or of all; fifty moments over the seeds.

    A folder's first launch is left alone for up to four seconds, so that a kill lands anywhere, also before there is a
    folder; a later one is hit after training has begun anew. First up to two workers, which are replaced, then the
    launcher, alone or with all of its workers. A sweep that ends before that is compared, and another begun.
    """
    rng = random.Random(seed)
    kills = within_training = sweeps = 0
    out, fresh = tmp_path / "0", True
    while kills < 10:
        before = progress_of(out)
        process = start(definition, out, *OFTEN)
        if not fresh:
            wait_for(lambda p=process, b=before, o=out: p.poll() is not None or progress_of(o) - b)
        moments = [rng.uniform(0.0, 4.0 if fresh else 1.5), *(rng.uniform(0.0, 1.5) for _ in range(rng.randrange(3)))]
        for i, moment in enumerate(moments):
            time.sleep(moment)
            if process.poll() is not None:
                break
            kills += 1
            within_training += bool(saved(out))
            if i + 1 == len(moments):
                kill(process, workers=rng.random() < 0.5)
            elif victims := workers_of(process.pid):
                os.kill(rng.choice(victims), signal.SIGKILL)
        fresh = process.returncode == 0
        if fresh:
            process.communicate(timeout=60)
            same(out, undisturbed)
            sweeps += 1
            out = tmp_path / str(sweeps)
        else:
            assert process.returncode == -signal.SIGKILL, process.communicate(timeout=60)[0]
    if not fresh:
        finish(definition, out)
        same(out, undisturbed)
    assert within_training >= 4, "the kills missed the training: nothing was tested"


@pytest.fixture
def killed(definition, tmp_path):
    """A sweep whose launcher and two workers were killed while at least one was past a checkpoint of its run."""
    out = tmp_path / "sweep"
    process = start(definition, out, *OFTEN)
    wait_for(lambda: saved(out))
    kill(process)
    assert saved(out), "killed too late: nothing is under way"
    return out


def saved(out):
    """The newest checkpoint of each run that has no result."""
    runs = [run for run in out.glob("runs/*") if not (run / "result.json").exists()]
    steps = {run: [int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()] for run in runs}
    return [run / "checkpoints" / str(max(found)) for run, found in steps.items() if found]


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_newest_checkpoint_costs_only_steps(definition, undisturbed, killed, damage):
    steps = [folder.name for folder in saved(killed)]
    for folder in saved(killed):
        for path in folder.rglob("d/*"):  # the arrays
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    text = finish(definition, killed)
    for step in steps:
        assert f"checkpoint of step {step} is damaged" in text
    same(killed, undisturbed)


def test_a_folder_copied_to_another_machine_goes_on(definition, undisturbed, killed, tmp_path):
    """The killed holders are of a machine that cannot be asked: they are followed after a silence, here a second."""
    there = tmp_path / "there"
    shutil.copytree(killed, there)
    shutil.rmtree(killed)
    held = 0
    for run in there.glob("runs/*"):
        generation, raw = newest(run)
        said = json.loads(raw)
        if not said.get("released"):
            held += 1
            lease = run / name(generation)
            lease.write_bytes(json.dumps({**said, "host": "another", "every": 1 / 6}).encode().ljust(511) + b"\n")
    assert held
    patient = "import functools, sys; from scaling.engine import lease; from sweeps.launch import worker; "
    patient += "worker.Leases = functools.partial(lease.Leases, expire=1.0); sys.exit(worker.main())"
    done = subprocess.run(
        [sys.executable, "-c", patient, str(there)], timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stdout
    same(there, undisturbed)


def test_the_clock_is_set_back_an_hour(definition, undisturbed, killed):
    """After the kill all files are of a time that is yet to come."""
    for path in killed.rglob("*"):
        times = path.stat()
        os.utime(path, (times.st_atime + HOUR, times.st_mtime + HOUR))
    steps = [int(folder.name) for folder in saved(killed)]
    text = finish(definition, killed)
    assert {int(n) for n in re.findall(r"continuing from step (\d+)", text)} == set(steps)
    same(killed, undisturbed)


@pytest.mark.parametrize("hours", [0, 1])
def test_two_launchers_on_one_folder_share_the_work(definition, undisturbed, tmp_path, hours):
    """Also where the clock of one is late, and both end well. That no run is held twice, the leases' tests hold."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        f"import time\nreal = time.time\ntime.time = lambda: real() - {hours * HOUR}"
    )
    path = os.pathsep.join(filter(None, [str(late), os.environ.get("PYTHONPATH")]))
    out = tmp_path / "sweep"
    launchers = [start(definition, out), start(definition, out, env={"PYTHONPATH": path})]
    for process in launchers:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        assert "4 finished, 0 diverged, 0 failed" in text
    same(out, undisturbed)
