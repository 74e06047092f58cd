"""What a worker takes next: runs that need others, damaged folders, and how few files are looked at."""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import os

import pytest

from models.config import ModelConfig
from scaling.config import ObjectiveConfig, RunConfig
from scaling.engine.lease import Leases, lease
from scaling.result import result_of
from sweeps.launch.attempts import ATTEMPTS
from sweeps.launch.queue import LATER, LONGEST, NOTHING, PATIENCE, Queue, mark
from sweeps.plan import Unit, write_plan

BASE = RunConfig(model=ModelConfig(d_model=16, n_layers=1, n_heads=1))


def config(i: int) -> RunConfig:
    """Runs of falling cost: the first is the most expensive."""
    return dataclasses.replace(BASE, tokens=10_000_000 - 1024 * i)


def chain(folder, *needs: tuple[int, ...]) -> tuple[Queue, list[str]]:
    """The queue of runs of which each needs those of the given numbers, and their ids."""
    ids = [config(i).run_id for i in range(len(needs))]
    units = [Unit(config(i), needs=tuple(ids[n] for n in needed)) for i, needed in enumerate(needs)]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    write_plan(folder, units, "launch")
    return Queue(folder), ids


def end(folder, run: str, status="finished") -> None:
    (folder / "runs" / run).mkdir(exist_ok=True)
    result = result_of(BASE, 2.0 if status == "finished" else None, run=run)
    (folder / "runs" / run / "result.json").write_text(json.dumps(result.to_dict()))


def taken(queue: Queue) -> str | int:
    """The run that a worker takes now, or LATER or NOTHING."""
    with contextlib.ExitStack() as stack:
        i, _ = queue.choose(stack, Leases())
        return queue.units[i].run_id if i >= 0 else i


def test_a_run_begins_once_what_it_needs_has_finished(tmp_path):
    """Though it is the most expensive, and though a trunk is only waited for until it fails."""
    queue, (child, parent, other) = chain(tmp_path, (1, 2), (), ())
    assert taken(queue) == parent
    end(tmp_path, parent)
    assert taken(Queue(tmp_path)) == other
    end(tmp_path, other)
    assert taken(Queue(tmp_path)) == child


def test_a_chain_whose_first_run_diverged_is_not_trained(tmp_path):
    """What it was to start from is not there; each says which run is missing, and no worker waits for ever."""
    queue, (first, second, third, free) = chain(tmp_path, (), (0,), (1,), ())
    end(tmp_path, first, "diverged")
    assert taken(queue) == free
    end(tmp_path, free)
    assert taken(queue) == NOTHING
    reasons = {run: failure.reason for run, failure in queue.refusals}
    assert reasons == {
        second: f"needs run {first}, which diverged",
        third: f"needs run {second}, which was not trained",
    }
    record = json.loads((tmp_path / "runs" / third / "failed.json").read_text())
    assert (record["final"], record["launch"]) == (True, "launch")
    assert taken(Queue(tmp_path)) == NOTHING, "another worker comes to the same end"


def test_a_run_that_needs_one_that_failed_for_good_is_not_trained(tmp_path):
    queue, (first, second) = chain(tmp_path, (), (0,))
    for attempt in range(ATTEMPTS):
        assert taken(queue) in (first, LATER)
        queue.failed(first, "out of memory", attempt)
    assert taken(queue) == NOTHING
    assert [(run, failure.reason) for run, failure in queue.refusals] == [(second, f"needs run {first}, which failed")]
    write_plan(tmp_path, queue.units, "again")
    assert taken(Queue(tmp_path)) == first, "launched again, both are tried again"


def test_a_parent_outside_the_sweep_counts_where_it_has_finished(tmp_path):
    parent = config(7).run_id
    unit = Unit(config(0), needs=(parent,))
    (tmp_path / "runs").mkdir()
    write_plan(tmp_path, [unit], "one")
    queue = Queue(tmp_path)
    assert taken(queue) == NOTHING
    assert queue.refusals[0][1].reason == f"needs run {parent}, which is not in this sweep"
    end(tmp_path, parent)
    write_plan(tmp_path, [unit], "two")
    assert taken(Queue(tmp_path)) == unit.run_id


def test_a_run_of_an_objective_that_is_not_here_leaves_the_others_alone(tmp_path):
    foreign = dataclasses.replace(config(0), objective=ObjectiveConfig(name="theirs"))
    (tmp_path / "runs").mkdir()
    write_plan(tmp_path, [Unit(foreign), Unit(config(1))], "launch")
    assert taken(Queue(tmp_path)) == config(1).run_id


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def calls(monkeypatch):
    """Counts what asks the file system: one entry a call."""
    made = []

    def counting(where, name):
        original = getattr(where, name)

        def call(*args, **options):
            made.append((name, args[:1]))
            return original(*args, **options)

        monkeypatch.setattr(where, name, call)

    for name in ("stat", "lstat", "open", "listdir", "scandir", "mkdir", "rename", "replace", "unlink", "readlink"):
        counting(os, name)
    counting(io, "open")
    counting(builtins, "open")
    return made


def test_a_worker_looks_at_few_of_many_runs(tmp_path, calls):
    """5,000 runs, of which 4,900 are over and 90 are trained by others; ten are free, the cheapest of all.

    On a network file system each look is a question to a server that all workers share.
    """
    configs = [config(i) for i in range(5000)]
    ids = [c.run_id for c in configs]
    (tmp_path / "runs").mkdir()
    write_plan(tmp_path, [Unit(c) for c in configs], "launch")
    mark(tmp_path, ids[:4900])
    with contextlib.ExitStack() as others:
        for run in ids[4900:4990]:
            others.enter_context(lease(tmp_path / "runs" / run))
        clock, leases = Clock(), Leases()
        queue = Queue(tmp_path, clock)

        def looks(choices: int = 1) -> tuple[int, list[int]]:
            calls.clear()
            with contextlib.ExitStack() as stack:
                chosen = [queue.choose(stack, leases)[0] for _ in range(choices)]
                made = len(calls)
            return made, chosen

        first, chosen = looks()
        assert chosen == [4990], "the most expensive of those that are free"
        assert first < 500
        mark(tmp_path, ids[4990:])
        second, chosen = looks()
        assert chosen == [LATER]
        assert second < 10, "what was found held a moment ago is asked again"
        clock.now = 0.6
        assert looks()[0] > 90, "half a second later it is time to ask"
        # In a long wait, choosing as often as `pause` says, each run is asked about every ten seconds, after a while.
        rounds, clock.now = [], 200.0
        while clock.now < 400:
            rounds.append(looks()[0])
            clock.now += queue.pause()
        assert len(rounds) <= 200 / LONGEST + 1
        assert max(rounds) < 500
        mark(tmp_path, ids)
        assert looks()[1] == [NOTHING]


def test_runs_are_taken_without_marks_and_marked(tmp_path):
    """A sweep of an earlier version, or one whose over/ was removed: results alone say what is over."""
    queue, ids = chain(tmp_path, *[()] * 5)
    for run in ids[:3]:
        end(tmp_path, run)
    assert taken(queue) == ids[3]
    assert sorted(os.listdir(tmp_path / "over")) == sorted(ids[:3])


def test_a_folder_that_cannot_be_used_is_given_up_after_some_tries(tmp_path):
    clock = Clock()
    _, (blocked, free) = chain(tmp_path, (), ())
    queue = Queue(tmp_path, clock)
    (tmp_path / "runs" / blocked).write_text("in the way")
    for _ in range(ATTEMPTS):
        assert taken(queue) == free
        clock.now += LONGEST
    (refusal,) = queue.refusals
    assert refusal[0] == blocked
    assert "its folder cannot be used" in refusal[1].reason
    end(tmp_path, free)
    assert taken(queue) == NOTHING


def test_a_file_system_that_is_away_for_a_moment_costs_no_run(tmp_path, monkeypatch):
    """Else a pause of a second in which each worker looks three times gives up the most expensive run."""
    clock = Clock()
    _, (run,) = chain(tmp_path, ())
    queue = Queue(tmp_path, clock)

    def away(*args, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("sweeps.launch.queue.lease", away)
        while clock.now < PATIENCE / 2:
            assert taken(queue) == LATER
            clock.now += queue.pause()
    clock.now += LONGEST
    assert taken(queue) == run
    monkeypatch.setattr("sweeps.launch.queue.lease", away)
    for _ in range(20):  # and one that stays away does not keep the worker for ever
        chosen = taken(queue)
        clock.now += LONGEST
    assert chosen == NOTHING
    assert "Stale file handle" in queue.refusals[0][1].reason


@pytest.mark.parametrize("number", ["000001", "999999"])
def test_a_folder_with_the_name_of_a_lease_is_set_aside(tmp_path, number):
    """Else nobody could hold the run, now or in any later launch."""
    clock = Clock()
    _, (run,) = chain(tmp_path, ())
    queue = Queue(tmp_path, clock)
    (tmp_path / "runs" / run / f"lease-{number}").mkdir(parents=True)
    chosen = []
    for _ in range(2):  # it is renamed at the first
        chosen.append(taken(queue))
        clock.now += LONGEST
    assert run in chosen


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[1]", '{"attempts": "many", "final": 1}', "\x00"])
def test_a_damaged_failure_is_no_obstacle(tmp_path, content):
    queue, (run,) = chain(tmp_path, ())
    (tmp_path / "runs" / run).mkdir()
    (tmp_path / "runs" / run / "failed.json").write_text(content)
    assert taken(queue) == run
