"""What a run costs beyond its own steps in a worker that is warm: `scaling bench run`.

A process pinned to one core, as a sweep's workers are, trains tiny runs on the default corpus into a temporary folder:
one that brings JAX and the corpus in, then for each model a run of a new shape and a second one of the same shape.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.sizing import shape
from scaling.config import DataConfig, RunConfig
from scaling.engine.runtime import cores

TOKENS = 20_000
MODELS = (
    ModelConfig(d_model=20, n_layers=3, n_heads=2),
    ModelConfig(d_model=56, n_layers=3, n_heads=2),
    ModelConfig(d_model=128, n_layers=6, n_heads=4),
)


def bench_overhead() -> list[dict[str, Any]]:
    """A row per run: seconds in all, of the steps, of the validation at the end, and what is left: the overhead."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}  # a new shape is new to the machine as well
    command = [sys.executable, "-m", "scaling.bench.overhead"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> list[dict[str, Any]]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[:1])
    from scaling.engine.runtime import set_up_jax

    set_up_jax()
    from scaling.engine.loop import train

    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def run(model: ModelConfig, seed: int, shape_is: str) -> None:
            config = RunConfig(model=model, data=DataConfig(seq_len=128), tokens=TOKENS, batch_size=2, seed=seed)
            began = time.perf_counter()
            timing = train(config, Path(folder) / str(len(rows))).timing
            seconds = time.perf_counter() - began
            steps = timing["seconds_per_step"] * config.steps
            rows.append(
                {
                    "model": shape(model),
                    "shape_is": shape_is,
                    "seconds": round(seconds, 3),
                    "step_seconds": round(steps, 3),
                    "validation_seconds": timing["validation_seconds"],
                    "overhead_seconds": round(seconds - steps - timing["validation_seconds"], 3),
                }
            )

        run(dataclasses.replace(MODELS[0], n_layers=1), 0, "the worker's first")
        for model in MODELS:
            run(model, 0, "new")
            run(model, 1, "known")
    return rows


if __name__ == "__main__":
    print(json.dumps(measure()))
