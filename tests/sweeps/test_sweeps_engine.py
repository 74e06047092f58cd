"""A worker as a child process: its last words, its deaths, and being asked to leave."""

import json
import signal
import sys
import threading
import time

import pytest
from engine_sweeps import real_sweep, starts, stub, stub_sweep, wait_for

from scaling.config import RunConfig
from scaling.result import result_of
from sweeps.launch.engine import Attended, follow, standing
from sweeps.launch.worker import ATTEMPTS, Queue
from sweeps.plan import read_plan

KILLED = """
import os, sys
sys.path.insert(0, os.getcwd())
from pathlib import Path
from sweeps.plan import read_plan
from sweeps.launch.worker import Queue
folder = Path(sys.argv[1])
queue = Queue(folder, *read_plan(folder))
unit = queue.units[0]
print('{"event": "begin", "run": "%s", "attempts": %d}' % (unit.run_id, queue.attempts(unit)), flush=True)
os.kill(os.getpid(), 9)
"""

# A worker is forked here with JAX in the process; the launchers themselves never import it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_run_that_kills_its_workers_is_given_up(corpus, tmp_path):
    """Else the dearest run, out of memory each time, would keep every worker from all others."""
    folder = tmp_path / "sweep"
    real_sweep(corpus, folder, sizes=(8,))
    worker = Attended(folder, [sys.executable, "-c", KILLED, str(folder)])
    assert worker.work(starts=ATTEMPTS - 1) == 128 + signal.SIGKILL
    queue = Queue(folder, *read_plan(folder))
    assert not queue.given_up(queue.units[0])
    worker.work(starts=1)
    assert queue.given_up(queue.units[0])
    assert "signal 9" in standing(folder).failed[queue.units[0].run_id]


@pytest.mark.parametrize(("code", "times"), [(0, 1), (2, 1), (1, 3), (75, 3)])
def test_only_a_worker_that_died_is_started_again(code, times, tmp_path):
    command = [sys.executable, "-c", f"open('{tmp_path}/count', 'a').write('x'); exit({code})"]
    assert Attended(tmp_path, command).work() == code
    assert len((tmp_path / "count").read_text()) == times


def test_asked_to_leave_the_worker_saves_and_is_not_started_again(tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 1)
    worker = Attended(folder, stub(folder, 100))
    codes = []
    thread = threading.Thread(target=lambda: codes.append(worker.work()))
    thread.start()
    wait_for(lambda: starts(folder), 20, "the worker")
    time.sleep(0.3)
    worker.end(20)
    thread.join(20)
    assert codes == [75]
    assert int((folder / "runs/000000000000/step").read_text()) > 0
    assert Attended(folder, stub(folder, 5)).work() == 0
    assert len(starts(folder)) == 2


def test_a_worker_that_does_not_leave_is_ended(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    worker = Attended(tmp_path, [sys.executable, "-c", deaf])
    thread = threading.Thread(target=worker.work)
    thread.start()
    time.sleep(1)
    worker.end(0.5)
    thread.join(10)
    assert not thread.is_alive()


def test_following_ends_with_the_last_worker(tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 2)
    (folder / "runs/000000000000").mkdir()
    (folder / "runs/000000000001").mkdir()
    (folder / "runs/000000000000/result.json").write_text(
        json.dumps(result_of(RunConfig(), None, run="0" * 12).to_dict())
    )
    (folder / "runs/000000000001/failed.json").write_text(json.dumps({"reason": "out of memory", "attempts": 3}))
    workers = iter([1, 1, 0])
    said = []
    end = follow(folder, lambda: next(workers), said.append, every=0)
    assert (end.runs, end.diverged, end.left, end.failed) == (2, 1, 1, {"000000000001": "out of memory"})
    assert len(said) == 2, "told once, and the failure's reason"
