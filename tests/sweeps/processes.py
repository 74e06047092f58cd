"""Launchers as processes, for tests that kill, stop and race them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from sweeps.table import EXECUTED

DEFINITION = """
from models.config import ModelConfig
from scaling.config import DataConfig, RunConfig
from sweeps.define import Sweep, grid

def sweep():
    data = DataConfig(source={source!r}, seq_len=32, valid_fraction=0.1, repeat=True)
    models = [ModelConfig(d_model=d, n_layers=1, n_heads=2) for d in (8, 16)]
    return Sweep(grid({{"model": models, "tokens": [100_000, 200_000]}}, base=RunConfig(data=data, batch_size=2)))
"""


def start(definition, out, *options, env=None) -> subprocess.Popen:
    command = [sys.executable, "-m", "sweeps.cli", "sweep", str(definition), "--out", str(out), "--workers", "2"]
    environment = os.environ | (env or {})
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(definition, out, *options, env=None) -> str:
    process = start(definition, out, *options, env=env)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def assert_same_runs(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal bit for bit, but for what depends on which run branched from which."""
    frame, expected = (f.drop(columns=list(EXECUTED)) for f in (frame, expected))
    pd.testing.assert_frame_equal(frame, expected, check_exact=True)


def workers_of(launcher: int) -> list[int]:
    """Process ids of the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def kill(process: subprocess.Popen, workers=True) -> None:
    """kill -9 of a launcher; of its workers too, which else are left to end with it."""
    victims = workers_of(process.pid)
    for pid in victims if workers else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)
    for pid in victims:
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def progress_of(out: Path) -> set[tuple[str, int]]:
    """(file, modification time) of the progress and checkpoints of runs under way."""
    found = [*out.glob("runs/*/progress.json"), *out.glob("runs/*/checkpoints/*")]
    with contextlib.suppress(FileNotFoundError):
        return {(str(p), p.stat().st_mtime_ns) for p in found}
    return set()
