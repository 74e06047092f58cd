"""Evaluations as work for the workers: queued, held by one, counted where they fail, and seen as one table."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, RunConfig, ScheduleConfig
from scaling.engine.lease import Leases, lease
from scaling.evaluate import EvaluationConfig, path_of
from scaling.execution import Execution
from sweeps.asking import Asked, ask, measurements, read_wanted, unask
from sweeps.define import Sweep, grid
from sweeps.launch import local
from sweeps.launch.asking import KILLED, Asking
from sweeps.launch.attempts import ATTEMPTS
from sweeps.launch.engine import standing, worker_command
from sweeps.launch.prepare import prepare, write_launch
from sweeps.launch.worker import work

LOSS = EvaluationConfig("loss", '{"n": 8}')
WRONG = EvaluationConfig("answers", '{"n": 8}')


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A finished sweep of two runs."""
    folder = tmp_path_factory.mktemp("asked") / "sweep"
    base = RunConfig(
        model=ModelConfig(d_model=8, n_layers=1, n_heads=1),
        data=DataConfig(source=corpus, seq_len=16, valid_fraction=0.1),
        schedule=ScheduleConfig(warmup_tokens=256),
    )
    sweep = Sweep(grid({"tokens": [2048, 4096]}, base))
    prepare("sweep", sweep, folder)
    assert local.launch(sweep, folder, workers=1).finished == 2
    return folder, [config.run_id for config in sweep.runs], sweep


@pytest.fixture
def fresh(trained, tmp_path):
    """A copy of it in which nothing was asked."""
    import shutil

    return shutil.copytree(trained[0], tmp_path / "sweep"), trained[1]


def wanted_of(evaluation: dict, *runs: str) -> str:
    """The text of an evaluations.json."""
    full = {"options": "", "seed": 0} | evaluation
    return json.dumps({"launch": "x", "asked": [{"evaluation": full, "runs": list(runs)}]})


def worked(folder, training=False) -> list[dict]:
    """The events of a worker in this process."""
    from sweeps.folder import read_execution

    events = []
    code = work(
        folder, read_execution(folder), lambda e, **f: events.append({"event": e, **f}), lambda: False, (), training
    )
    assert code == 0
    return events


def test_every_finished_run_is_asked_once(fresh):
    folder, runs = fresh
    ask(folder, [Asked(LOSS), Asked(EvaluationConfig("loss", '{"n": 4}'), (runs[0],))])
    events = worked(folder)
    assert [e["event"] for e in events] == ["answered"] * 3
    assert standing(folder).evaluations.left == 0
    assert worked(folder) == []
    frame = measurements(folder)
    assert sorted(frame["run"]) == sorted([*runs, runs[0]])
    assert set(frame["metric"]) == {"loss"}
    assert (frame["tokens"] > 0).all(), "the run's own columns stand beside each measurement"


def test_a_sweep_is_trained_and_asked_by_one_launch(trained, tmp_path):
    """And a run is asked while others wait to be trained: two kinds of work, one queue."""
    folder, sweep = tmp_path / "sweep", trained[2]
    prepare("sweep", sweep, folder)
    ask(folder, [Asked(LOSS)])
    units = write_launch(sweep, folder, Execution())
    lines = []
    state = local.run_pool(units, folder, worker_command(folder), 1, lambda _, line: line and lines.append(line))
    assert (state.finished, state.evaluations.answered, state.evaluations.left) == (2, 2, 0)
    assert sum("loss-" in line for line in lines) == 2
    first, second = measurements(trained[0]), measurements(folder)
    assert len(first) == 0
    assert len(second) == 2


def test_what_cannot_be_asked_leaves_the_others_alone_and_is_told(fresh):
    folder, _runs = fresh
    ask(folder, [Asked(WRONG), Asked(LOSS)])
    events = worked(folder)
    assert sorted(e["event"] for e in events) == ["answered"] * 2 + ["unanswered"] * 2
    now = standing(folder).evaluations
    assert (now.answered, now.left) == (2, 0)
    assert all("a text without questions" in reason for reason in now.failed.values())
    assert worked(folder) == [], "what is at fault is not asked again by the same launch"
    ask(folder)
    assert len(worked(folder)) == 2, "a new launch tries again"
    unask(folder, WRONG)
    assert [a.evaluation for a in read_wanted(folder).asked] == [LOSS]
    assert worked(folder) == []


#: A worker whose process is ended by `loss`, as by a lack of memory.
DYING = """
import os, sys
from pathlib import Path
from scaling.evaluation.loss import Loss
from sweeps.folder import read_execution
from sweeps.launch.worker import work

Loss.rows = lambda *_: os.kill(os.getpid(), 9)
folder = Path(sys.argv[1])
sys.exit(work(folder, read_execution(folder), lambda *_, **__: None, lambda: False, (), False))
"""


def test_an_evaluation_that_ends_its_process_is_given_up(fresh):
    """Counted before it is made: else it would take one worker after another with it, for ever."""
    folder, runs = fresh
    ask(folder, [Asked(LOSS, (runs[0],))])

    def worker() -> int:
        return subprocess.run([sys.executable, "-c", DYING, folder], timeout=120, check=False).returncode

    for _ in range(ATTEMPTS):
        assert not Asking(folder).standing().failed
        assert worker() == -signal.SIGKILL
    assert Asking(folder).standing().failed == {(runs[0], LOSS.key): KILLED}
    assert worker() == 0, "a worker that comes after leaves it alone"
    assert standing(folder).evaluations.left == 0


def test_a_run_that_another_process_asks_is_left_to_it(fresh):
    folder, runs = fresh
    ask(folder, [Asked(LOSS)])
    with lease(folder / "runs" / runs[0] / "evaluations"), contextlib.ExitStack() as stack:
        assert Asking(folder).choose(stack, Leases())[0] == runs[1]


def test_runs_that_diverged_or_are_not_finished_are_not_asked(fresh):
    folder, runs = fresh
    ask(folder, [Asked(LOSS)])
    (folder / "runs" / runs[0] / "result.json").unlink()
    result = folder / "runs" / runs[1] / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"status": "diverged", "loss": None}))
    assert worked(folder) == []
    assert standing(folder).evaluations.wanted == 0


def test_asking_again_for_all_runs_covers_those_named_before(tmp_path):
    ask(tmp_path, [Asked(LOSS, ("a" * 12,))])
    assert ask(tmp_path, [Asked(LOSS, ("b" * 12,))]).asked == (Asked(LOSS, ("a" * 12, "b" * 12)),)
    assert ask(tmp_path, [Asked(LOSS)]).asked == (Asked(LOSS),)
    assert ask(tmp_path, [Asked(LOSS, ("c" * 12,))]).asked == (Asked(LOSS),)


@pytest.mark.parametrize(
    "content",
    ["{", '{"asked": 3}', wanted_of({"name": "los"}), wanted_of({"name": "loss"}, "../..")],
)
def test_a_damaged_list_is_one_line(tmp_path, content):
    (tmp_path / "evaluations.json").write_text(content)
    with pytest.raises(InputError, match=r"evaluations\.json"):
        read_wanted(tmp_path)


def test_an_axis_named_like_a_column_of_the_run_stands_beside_it(fresh):
    folder, runs = fresh
    path = path_of(folder / "runs" / runs[0], LOSS)
    path.parent.mkdir(exist_ok=True)
    row = {"metric": "pass@k", "value": 0.5, "stderr": 0.1, "n": 3, "k": 2, "seed": 7}
    fields = {
        "run": runs[0],
        "name": "loss",
        "options": LOSS.options,
        "seed": 0,
        "rows": [row],
        "flops": 1.0,
        "seconds": 1,
    }
    path.write_text(json.dumps(fields))
    (measured,) = measurements(folder).to_dict("records")
    assert (measured["seed"], measured["asked_seed"], measured["k"]) == (0, 7, 2)
    path.write_text(json.dumps(fields | {"run": "0" * 12}))
    with pytest.raises(InputError, match="in the folder of"):
        measurements(folder)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "pass@k exact for any k"),
        (["{folder}", "loss", "--option", "n=4", "--json"], 0, '"metric":"loss"'),
        (["{folder}", "loss", "--option", "m=4"], 2, "loss takes source, subset, n"),
        (["{folder}", "loss", "--option", "n=x"], 2, "is not a number"),
        (["{folder}", "loss", "--option", "n=0"], 2, "n = 0: expected a whole number of at least 1"),
        (["{folder}", "answers", "--option", "each=perhaps"], 2, "neither true nor false"),
        (["{folder}", "los"], 2, "did you mean 'loss'"),
        (["{folder}", "answers"], 2, "a text without questions"),
        (["{folder}", "loss", "--run", "abc"], 2, "--run abc: not in"),
        (["{folder}/runs/{run}", "loss", "--option", "n=4"], 0, "loss"),
        (["{folder}/nothing", "loss"], 2, "neither a run"),
        (["{folder}"], 0, "nothing has been measured"),
    ],
)
def test_the_command(fresh, arguments, code, said):
    folder, runs = fresh
    words = [word.format(folder=folder, run=runs[0]) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "sweeps.cli", "evaluate", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == code, done.stderr
    assert said in (done.stdout if code == 0 else done.stderr)
    assert "Traceback" not in done.stderr
    if code == 2:
        assert len(done.stderr.strip().splitlines()) == 1


def test_the_axes_of_every_row_are_shown(fresh):
    """Two rows of one metric at two k would else look alike."""
    from sweeps.cli.evaluate import measurements_text

    folder, runs = fresh
    rows = [{"metric": "loss", "value": 1.5, "stderr": 0, "n": 3}]
    rows += [{"metric": "pass@k", "value": 0.1 * k, "stderr": 0, "n": 3, "k": k} for k in (2, 8)]
    for options in ("", '{"n":7}'):
        wanted = EvaluationConfig("loss", options)
        fields = {"run": runs[0], "name": "loss", "options": wanted.options, "seed": 0, "rows": rows, "flops": 1.0}
        path = path_of(folder / "runs" / runs[0], wanted)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(fields | {"seconds": 1.0}))
    lines = measurements_text(measurements(folder)).splitlines()
    assert {"k", "options"} <= set(lines[0].split())
    assert len(set(lines)) == 7, "no two rows look alike"


def test_nothing_is_written_or_read_through_a_link_out_of_a_run(fresh, tmp_path):
    folder, runs = fresh
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "runs" / runs[0] / "evaluations").symlink_to(elsewhere)
    ask(folder, [Asked(LOSS)])
    assert [e["event"] for e in worked(folder)] == ["answered"], "the other run is asked"
    assert not list(elsewhere.iterdir())
    assert "link out" in standing(folder).evaluations.failed[runs[0], LOSS.key]
    with pytest.raises(InputError, match="link out"):
        measurements(folder)


def test_a_sweep_without_a_finished_run_has_nothing_to_ask(fresh, capsys):
    from sweeps.cli.main import main

    folder, runs = fresh
    for run in runs:
        (folder / "runs" / run / "result.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(folder), "loss"])
    assert ended.value.code == 2
    assert "none has finished" in capsys.readouterr().err
