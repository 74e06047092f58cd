"""Workers as child processes: their last words, its deaths, and being asked to leave."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from engine_sweeps import real_sweep, starts, stub, stub_sweep, wait_for

from scaling.config import RunConfig
from scaling.engine.lease import lease
from scaling.result import result_of
from sweeps.launch.attempts import ATTEMPTS
from sweeps.launch.engine import follow, standing
from sweeps.launch.queue import Queue
from sweeps.launch.supervisor import Start, Supervisor

# A worker that dies with the first run that is not given up, as often as it is started; else it has nothing to do.
KILLED = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from pathlib import Path
from sweeps.launch.queue import Queue
queue = Queue(Path(sys.argv[1]))
run = queue.units[0].run_id
failure = queue.attempts.of(run)
if not failure.final:
    begin = {"event": "begin", "run": run, "attempts": failure.attempts, "launch": queue.launch}
    print(json.dumps(begin), flush=True)
    os.kill(os.getpid(), 9)
"""


def supervise(folder, *command, **options) -> Supervisor:
    return Supervisor(folder, [Start([sys.executable, *command])], **options)


def test_a_run_that_kills_its_workers_is_given_up(corpus, tmp_path):
    """Else the most expensive run, out of memory each time, would keep every worker from all others."""
    folder = tmp_path / "sweep"
    real_sweep(corpus, folder, sizes=(8,))
    run = Queue(folder).units[0].run_id
    once = supervise(folder, "-c", KILLED, str(folder), again=False)
    assert once.run() == 128 + signal.SIGKILL
    failure = Queue(folder).attempts.of(run)
    assert (failure.attempts, failure.final) == (1, False)
    losses = []
    assert supervise(folder, "-c", KILLED, str(folder), lost=lambda *loss: losses.append(loss)).run() == 0
    assert [(lost, failure.attempts) for lost, failure in losses] == [(run, n) for n in range(2, ATTEMPTS + 1)]
    assert losses[-1][1].final
    assert "signal 9" in standing(folder).failed[run]


def test_a_death_is_not_held_against_a_run_that_another_trains_by_then(corpus, tmp_path):
    """Else a record of failure, perhaps the last, stands beside a run that is well under way."""
    folder = tmp_path / "sweep"
    real_sweep(corpus, folder, sizes=(8,))
    run, losses = folder / "runs" / Queue(folder).units[0].run_id, []
    with lease(run):
        supervise(folder, "-c", KILLED, str(folder), again=False, lost=lambda *loss: losses.append(loss)).run()
        assert not (run / "failed.json").exists()
    assert not losses


@pytest.mark.parametrize(("code", "times"), [(0, 1), (2, 1), (1, ATTEMPTS), (75, ATTEMPTS)])
def test_only_a_worker_that_died_is_started_again(code, times, tmp_path):
    supervisor = supervise(tmp_path, "-c", f"open('{tmp_path}/count', 'a').write('x'); exit({code})")
    assert supervisor.run() == code
    assert len((tmp_path / "count").read_text()) == times
    assert len(supervisor.stillborn) == (code != 0)


def test_one_pool_of_workers_loses_only_those_that_cannot_begin(tmp_path):
    """Three places: one cannot begin, the others work on; what libraries print between the events does no harm."""
    works = [
        sys.executable,
        "-c",
        """print('{"event": "begin", "run": "r"}\\nnoise\\n{"event": "done", "run": "r"}')""",
    ]
    events, notes = [], []
    starts = [Start(works), Start([sys.executable, "-c", "exit(1)"]), Start(works)]
    supervisor = Supervisor(tmp_path, starts, events.append, note=notes.append)
    assert supervisor.run() == 1
    assert [event["event"] for event in events].count("done") == 2
    assert notes.count("noise") == 2
    assert supervisor.stillborn == ["workers end before they can begin (exit code 1)"]


def test_a_worker_ends_with_a_supervisor_that_is_killed(tmp_path):
    """By kill -9, which no handler sees: else it would train on unseen."""
    code = "import sys; from pathlib import Path; from sweeps.launch.supervisor import *; "
    code += "Supervisor(Path('.'), [Start([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); "
    code += "time.sleep(60)'])]).run()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        worker = int(launcher.stdout.readline())
        launcher.kill()
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), 20, "the worker's end")


def test_asked_to_leave_the_worker_saves_and_is_not_started_again(tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 1)
    supervisor = Supervisor(folder, [Start(stub(folder, 100))])
    codes = []
    thread = threading.Thread(target=lambda: codes.append(supervisor.run()))
    thread.start()
    wait_for(lambda: starts(folder), 20, "the worker")
    time.sleep(0.3)
    supervisor.end(20)
    thread.join(20)
    assert codes == [75]
    assert int((folder / "runs/000000000000/step").read_text()) > 0
    assert Supervisor(folder, [Start(stub(folder, 5))]).run() == 0
    assert len(starts(folder)) == 2


def test_a_worker_that_does_not_leave_is_ended(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    heard = threading.Event()
    supervisor = supervise(tmp_path, "-c", deaf, note=lambda line: heard.set())
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    assert heard.wait(20)
    supervisor.end(0.5)
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
