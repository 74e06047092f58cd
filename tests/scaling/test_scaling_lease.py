"""A run is held by one process at a time: on one machine at once, between machines by beats, and whoever lost it stops.

Another machine is played by a process that names another host, so its process id means nothing here.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.config import ModelConfig
from scaling.config import DataConfig, RunConfig
from scaling.engine import lease as lease_module
from scaling.engine import loop as train_module
from scaling.engine.lease import BEATS, Busy, Leases, Lost, generations, holder, lease
from scaling.engine.loop import train
from scaling.folder import check_run_folder
from sweeps.table import is_held

ELSEWHERE = {"host": "elsewhere", "machine": "elsewhere", "pid": 1, "start": 1, "bytes": None}


@contextmanager
def process(code: str, *args):
    """A process of Python that runs `code`, with this module's names imported and its arguments in `args`."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom scaling.engine import lease as lease_module\n"
    head += "from scaling.engine.lease import *\nargs = sys.argv[1:]\nfolder = Path(args[0])\n"
    command = [sys.executable, "-c", head + code, *map(str, args)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def beat_elsewhere(folder: Path, generation: int = 1, beat: int = 0, every: float = 0.01, **more) -> None:
    """What a holder on another machine writes."""
    said = {**ELSEWHERE, "beat": beat, "every": every, **more}
    (folder / lease_module.name(generation)).write_text(json.dumps(said))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


RACE = """
rounds = 0
while rounds < 50:
    try:
        with lease(folder) as held:
            mark = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # fails where two are inside
            time.sleep(0.0005)
            held.check()
            os.close(mark)
            os.unlink(folder / "inside")
            rounds += 1
    except Busy:
        pass
print(rounds)
"""


def test_two_processes_race_and_never_hold_at_once(tmp_path):
    with process(RACE, tmp_path) as one, process(RACE, tmp_path) as other:
        assert [racer.communicate(timeout=120)[0].strip() for racer in (one, other)] == ["50", "50"]
    assert generations(tmp_path) == [100], "a number was given twice, or an older file was left"


def test_a_killed_holder_is_followed_at_once(tmp_path):
    hold = "with lease(folder, memory=7):\n    print('held', flush=True)\n    time.sleep(600)"
    with process(hold, tmp_path) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=f"process {owner.pid} on "), lease(tmp_path):
            pass
        there = holder(tmp_path)
        assert (there["pid"], there["bytes"], there["here"]) == (owner.pid, 7, True)
        owner.send_signal(signal.SIGKILL)
        # It is a zombie until waited for, which is not to count as living.
        until(lambda: Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert holder(tmp_path) is None
        with lease(tmp_path, leases=Leases()) as held:
            assert held.generation == 2


def test_a_process_id_used_again_is_not_the_holder(tmp_path):
    """A process of the holder's number that began at another time."""
    said = {**ELSEWHERE, "host": lease_module.this_host(), "pid": 1, "start": 1 << 60, "beat": 0, "every": 10.0}
    (tmp_path / "lease-000004").write_text(json.dumps(said))
    with lease(tmp_path, leases=Leases()) as held:
        assert held.generation == 5


def test_released_is_free_at_once_and_the_folder_still_one_for_a_run(tmp_path):
    for generation in (1, 2, 3):
        with lease(tmp_path, leases=Leases()) as held:
            assert is_held(tmp_path)
            assert held.generation == generation
        assert not is_held(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [f"lease-{generation:06}"]
    check_run_folder(tmp_path, RunConfig())


def test_one_process_does_not_hold_twice(tmp_path):
    with lease(tmp_path), pytest.raises(Busy), lease(tmp_path):
        pass


def test_beats_elsewhere_are_busy_and_silence_is_followed(tmp_path, monkeypatch):
    """Decided by polling, on a clock of the test's; the wall clock runs backwards all the while."""
    wall = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(wall))
    clock = Clock()
    leases = Leases(expire=60.0, clock=clock)
    for beat in range(20):
        beat_elsewhere(tmp_path, beat=beat, every=10.0)
        assert leases.holder(tmp_path)["machine"] == "elsewhere"
        with pytest.raises(Busy), lease(tmp_path, leases=leases):
            pass
        clock.now += 59.0
    clock.now += 0.9
    assert leases.holder(tmp_path) is not None, "taken over early"
    clock.now += 0.2
    assert leases.holder(tmp_path) is None
    with lease(tmp_path, leases=leases) as held:
        assert (held.generation, generations(tmp_path)) == (2, [2])


def test_the_slower_pace_counts(tmp_path):
    """A holder that beats every 10 s is not gone for an observer who would wait only one."""
    clock = Clock()
    leases = Leases(expire=1.0, clock=clock)
    beat_elsewhere(tmp_path, every=10.0)
    assert leases.holder(tmp_path)
    clock.now = BEATS * 10.0 - 0.1
    assert leases.holder(tmp_path)
    clock.now = BEATS * 10.0
    assert leases.holder(tmp_path) is None


def test_without_a_memory_of_beats_it_watches(tmp_path):
    notes = []
    beat_elsewhere(tmp_path)
    with lease(tmp_path, expire=0.3, report=notes.append) as held:
        assert held.generation == 2
    assert notes == [f"{tmp_path}: left by process 1 on elsewhere; watching for up to 0 s whether that lives"]


def test_while_watching_one_beat_is_enough(tmp_path):
    beat_elsewhere(tmp_path)
    beater = threading.Timer(0.2, beat_elsewhere, [tmp_path, 1, 1])
    beater.start()
    with pytest.raises(Busy, match="process 1 on elsewhere"), lease(tmp_path, expire=30.0):
        pass
    beater.join()


@pytest.mark.parametrize("raw", [b"", b'{"host": "els', b"[]", b"\xff\x00", b'{"every": "1"}'])
def test_a_lease_that_is_not_whole_is_judged_by_its_silence(tmp_path, raw):
    """Its maker may be between making the file and filling it."""
    (tmp_path / "lease-000001").write_bytes(raw)
    clock = Clock()
    leases = Leases(expire=60.0, clock=clock)
    assert leases.holder(tmp_path) is not None
    assert holder(tmp_path) is not None
    clock.now = 60.0
    assert leases.holder(tmp_path) is None


OWNER_ELSEWHERE = """
lease_module.this_host = lambda: "elsewhere"
try:
    with lease(folder, expire=0.6) as held:
        print("held", flush=True)
        for line in sys.stdin:
            held.check()
            print("kept", flush=True)
except Lost as lost:
    print("lost", flush=True)
"""


def test_a_paused_holder_is_fenced_when_it_wakes(tmp_path):
    with process(OWNER_ELSEWHERE, tmp_path) as owner:

        def ask() -> str:
            owner.stdin.write("\n")
            owner.stdin.flush()
            return owner.stdout.readline()

        assert owner.stdout.readline() == "held\n"
        assert ask() == "kept\n"
        with pytest.raises(Busy), lease(tmp_path, expire=0.6):
            pass
        owner.send_signal(signal.SIGSTOP)
        with lease(tmp_path, expire=0.6) as held:
            owner.send_signal(signal.SIGCONT)
            assert ask() == "lost\n"
            held.check()
            assert owner.wait(timeout=30) == 0
            held.check()
            assert generations(tmp_path) == [2], "the one that lost it disturbed the one that holds it"
        assert generations(tmp_path) == [2]


def test_of_those_who_take_over_at_once_one_wins(tmp_path):
    """All have seen the same silence and go at the same moment; the losers find the winner there."""
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        beat_elsewhere(folder, generation=7)
        ready, won, lost = threading.Barrier(4), [], []

        def observer(folder=folder, ready=ready, won=won, lost=lost) -> None:
            clock = Clock()
            leases = Leases(expire=60.0, clock=clock)
            leases.holder(folder)
            clock.now = 60.0
            assert leases.holder(folder) is None
            ready.wait()
            try:
                with lease(folder, leases=leases) as held:
                    won.append(held.generation)
                    ready.wait()
            except Busy:
                lost.append(1)
                ready.wait()

        threads = [threading.Thread(target=observer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (won, len(lost)) == ([8], 3)


def test_a_slow_observer_does_not_take_what_is_past(tmp_path):
    """It saw generation 1 expire; since then 2 came and went and 3 is held: 2 is free to make, and must not count."""
    for _ in (1, 2):
        with lease(tmp_path):
            pass
    with lease(tmp_path) as held:
        assert lease_module.take(tmp_path, 2, 60.0, None) is None
        assert generations(tmp_path) == [3]
        held.check()


def test_looking_changes_nothing(tmp_path):
    beat_elsewhere(tmp_path, beat=3)
    before = (tmp_path / "lease-000001").stat()
    assert holder(tmp_path)["beat"] == 3
    assert not holder(tmp_path)["here"]
    assert holder(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    after = (tmp_path / "lease-000001").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_a_run_that_was_taken_over_writes_no_more(corpus, tmp_path, monkeypatch):
    """Another machine takes the run over after a few steps; this one is to leave without checkpoint and result."""
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    config = RunConfig(model=ModelConfig(d_model=16, n_layers=2, n_heads=2), data=data, tokens=10 * 8 * 32)
    calls = iter(range(100))

    def superseded_at_the_third() -> bool:
        if next(calls) == 3:
            beat_elsewhere(tmp_path, generation=2)
        return False

    with pytest.raises(Lost, match="another process took this run over"):
        train(config, tmp_path, should_stop=superseded_at_the_third)
    assert generations(tmp_path)[-1] == 2
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "checkpoints").exists()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)
