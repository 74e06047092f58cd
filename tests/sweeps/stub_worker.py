"""Stands in for `python -m sweeps.launch.worker DIR` where a test is about the engine: the same contract, no training.

    python tests/sweeps/stub_worker.py STEPS SECONDS DIR

Each run takes STEPS steps of SECONDS. The state (steps done) is saved at SIGTERM only, so a worker that is not told to
leave loses its steps; every start is a line `host from-step restarts` of the run's starts.txt.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from scaling.config import RunConfig
from scaling.result import result_of


def main() -> int:
    steps, seconds, folder = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    runs = [folder / "runs" / run for run in json.loads((folder / "sweep.json").read_text())["runs"]]
    while not stopping:
        left = [run for run in runs if not (run / "result.json").exists()]
        if not left:
            return 0
        for run in left:
            if stopping:
                break
            run.mkdir(exist_ok=True)
            with open(run / "lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if not (run / "result.json").exists():
                    train(run, steps, seconds, lambda: stopping)
        time.sleep(0.1)
    return 75


def train(run: Path, steps: int, seconds: float, stop) -> None:
    saved = run / "step"
    done = int(saved.read_text()) if saved.exists() else 0
    with open(run / "starts.txt", "a") as starts:
        node = os.environ.get("SLURMD_NODENAME", "-")
        starts.write(f"{node} {done} {os.environ.get('SLURM_RESTART_COUNT', 0)}\n")
    while done < steps:
        if stop():
            saved.write_text(str(done))
            return
        time.sleep(seconds)
        done += 1
    (run / ".result.tmp").write_text(json.dumps(result_of(RunConfig(), 1.0, run=run.name).to_dict()))
    (run / ".result.tmp").rename(run / "result.json")


if __name__ == "__main__":
    sys.exit(main())
