"""Sweeps for the tests of the engines: of a stub that only takes its time, and of real runs, a trunk among them."""

import json
import sys
import time
from pathlib import Path

from models.config import ModelConfig
from scaling.config import DataConfig, RunConfig
from scaling.execution import Execution
from sweeps.define import Sweep, children, grid, union
from sweeps.launch.prepare import prepare, write_launch

STUB = Path(__file__).parent / "stub_worker.py"


def stub_sweep(folder: Path, runs: int) -> Path:
    (folder / "runs").mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"runs": [f"{i:012}" for i in range(runs)]}))
    return folder


def stub(folder: Path, steps: int, seconds: float = 0.1) -> list[str]:
    return [sys.executable, str(STUB), str(steps), str(seconds), str(folder)]


def starts(folder: Path) -> list[tuple[str, int, int]]:
    """(node, steps done before, restarts of the job) of every start of every run."""
    lines = [line for p in sorted(folder.glob("runs/*/starts.txt")) for line in p.read_text().splitlines()]
    return [(node, int(step), int(restarts)) for node, step, restarts in map(str.split, lines)]


def wait_for(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def real_sweep(corpus: str, folder: Path, sizes=(8, 16), tokens=(300_000, 600_000), chained: bool = False) -> Sweep:
    """Runs of some widths, prepared in `folder` as `scaling sweep` does: the shorter of each width is a branch.

    chained: a run that starts from the longest of the first width, too.
    """
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1, repeat=True)
    models = [ModelConfig(d_model=d, n_layers=1, n_heads=2) for d in sizes]
    base = RunConfig(data=data, batch_size=2)
    runs = grid({"model": models, "tokens": list(tokens)}, base)
    tuned = children(runs[len(tokens) - 1 : len(tokens)], {"optim.lr": [1e-3], "tokens": [100_000]}, base)
    sweep = Sweep(union(runs, tuned) if chained else runs)
    prepare("tiny", sweep, folder)
    write_launch(sweep, folder, Execution(checkpoint_seconds=1))
    return sweep
