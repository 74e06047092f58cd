"""Measures, before a sweep is launched, what its runs will take here: short runs of a few of its shapes.

As many processes as there will be workers, each pinned as a worker is, train beside each other with the engine's own
loop, in folders that are thrown away: steps, compiling, validation, checkpoint and start-up are all in the figures.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models.errors import InputError
from scaling.alike import same_regime, same_speed
from scaling.config import DataConfig, RunConfig
from scaling.data.cache import cache_root
from scaling.folder import write_atomically
from scaling.result import result_of
from sweeps.cost import Known, program_id, ratio, remember_speed

SHAPES = 4  # of one regime: the smallest, the largest, and two between
BUSY = 0.5  # load per core above which other work disturbs what is measured
STEP_SECONDS = 3.0  # of timed steps per shape
FIRST_STEPS = 3  # of the run that compiles: its first call is one step, so two are timed


def measure_missing(
    runs: Sequence[RunConfig], places: Sequence[dict[str, str]], say: Callable[[str], None] = lambda line: None
) -> Known:
    """What is known of this machine, measured first where nothing speaks for these runs (`Known.near`).

    places: what each worker will be pinned to, as `sweeps.launch.local.placements` gives it. What is measured is
    remembered. The corpora of the runs must have been prepared. Raises InputError where a measuring process fails.
    """
    accelerated = any("cores" not in place for place in places)
    known = Known(len(places), accelerated)
    chosen = representatives([config for config in runs if not known.near(config)])
    if not chosen:
        return known
    say(f"measuring {len(chosen)} shapes on {len(places)} workers")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores:
        say(f"this machine is busy with other work (load {load:.1f} on {cores} cores): the time may be far off")
    for report in measured(chosen, places):
        config = chosen[report["shape"]]
        seconds = {name: report.get(name) for name in ("run_seconds", "load_seconds", "start_seconds")}
        if program_id(config) not in known.compiled:  # else it may have come from the cache
            seconds["compile_seconds"] = report.get("compile_seconds")
        remember_speed(config, report["seconds_per_step"], report["device"], len(places), **seconds)
    return Known(len(places), accelerated)


def representatives(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Of each regime the smallest shape, then the one farthest, in log N and log batch, from all chosen, and so on."""
    chosen = []
    for name in dict.fromkeys(map(same_regime, runs)):
        shapes = {same_speed(c): c for c in runs if same_regime(c) == name}
        shapes = sorted(shapes.values(), key=lambda c: (c.counts.n_compute, c.batch_size))
        some = [shapes[0]]
        while len(some) < min(SHAPES, len(shapes)):
            some.append(max(shapes, key=lambda c: min(distance(c, other) for other in some)))
        chosen += some
    return chosen


def distance(a: RunConfig, b: RunConfig) -> float:
    size, batch = ratio(a.counts.n_compute, b.counts.n_compute), ratio(a.batch_size, b.batch_size)
    return math.hypot(math.log(size), math.log(batch))


def measured(shapes: Sequence[RunConfig], places: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """A report of every process on every shape. Each begins at another shape, so that few compile the same at once."""
    reports = []
    with ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory(prefix="measure-", dir=cache_root()))
        log = stack.enter_context(open(Path(base) / "log", "w+b"))
        processes = []
        for i, place in enumerate(places):
            order = [(j + i * len(shapes) // len(places)) % len(shapes) for j in range(len(shapes))]
            job = {
                "shapes": [[j, shapes[j].to_dict()] for j in order],
                "cores": place.get("cores", ""),
                "folder": str(Path(base) / str(i)),
                "began": time.time(),
            }
            environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": place["gpu"]} if "gpu" in place else {})}
            command = [sys.executable, "-m", "sweeps.measure"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            process = stack.enter_context(subprocess.Popen(command, env=environment, text=True, **pipes))
            stack.callback(process.kill)
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            processes.append(process)
        for process in processes:
            lines = [json.loads(line) for line in process.stdout]
            if process.wait() or len(lines) < len(shapes):
                log.seek(0)
                errors = log.read().decode(errors="replace").strip().splitlines() or ["nothing in its log"]
                raise InputError(f"measuring failed with exit code {process.returncode}: {errors[-1]}")
            reports += lines
    firsts = {}  # of each shape the process that compiled it: the one that took longest
    for report in reports:
        best = firsts.setdefault(report["shape"], report)
        if report["first_seconds"] > best["first_seconds"]:
            firsts[report["shape"]] = report
    for report in reports:
        name = "compile_seconds" if firsts[report["shape"]] is report else "load_seconds"
        report[name] = max(0.0, report["first_seconds"] - report["run_seconds"])
    return reports


def main() -> None:
    """One process: a short run of each shape that compiles it, one that is timed, and a line of what they took."""
    job = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in job["cores"].split(",")})
    from scaling.engine.runtime import set_up_jax
    from scaling.execution import Execution

    set_up_jax()
    import jax

    from scaling.engine.loop import train

    jax.devices()
    start_seconds = time.time() - job["began"]

    def short(config: RunConfig, steps: int, name: str) -> dict[str, Any]:
        """The timing of a run of so many steps; `beyond`: its seconds that are not of its steps."""
        few = dataclasses.replace(config, tokens=steps * config.tokens_per_step)
        few = dataclasses.replace(few, parent=untrained(few, Path(job["folder"])) if config.parent else "")
        began = time.monotonic()
        result = train(few, Path(job["folder"]) / name, Execution())
        a_step = result.timing.get("seconds_per_step")
        seconds = time.monotonic() - began
        return {"a_step": a_step, "beyond": seconds - (a_step or 0.0) * few.steps, "device": result.where["device"]}

    for number, fields in job["shapes"]:
        config = RunConfig.from_dict(fields)
        first = short(config, FIRST_STEPS, f"{number}-first")
        steps = int(min(max(FIRST_STEPS, STEP_SECONDS / first["a_step"]), max(config.steps, FIRST_STEPS)))
        second = short(config, steps, f"{number}-second")
        report = {
            "shape": number,
            "seconds_per_step": second["a_step"],
            "run_seconds": second["beyond"],
            "first_seconds": first["beyond"],
            "start_seconds": start_seconds,
            "device": second["device"],
        }
        channel.write(json.dumps(report) + "\n")


def untrained(config: RunConfig, folder: Path) -> str:
    """The id of a run in `folder` that a run as `config` can start from: of fresh parameters, as if it had finished."""
    import jax

    from scaling.engine.checkpoint import Checkpointer
    from scaling.engine.program import program_for
    from scaling.engine.sharding import make_mesh
    from scaling.execution import Execution

    data = DataConfig(config.data.source, config.data.tokenizer, valid_fraction=config.data.valid_fraction)
    parent = RunConfig(config.model, data, tokens=1)
    place = folder / parent.run_id
    if not place.exists():
        saver = Checkpointer(place / "checkpoints")
        saver.save(1, program_for(parent, Execution(), make_mesh()).init(jax.random.key(0)))
        saver.close()
        write_atomically(place / "config.json", json.dumps(parent.to_dict()))
        write_atomically(place / "result.json", json.dumps(result_of(parent, 1.0).to_dict()))
    return parent.run_id


if __name__ == "__main__":
    main()
