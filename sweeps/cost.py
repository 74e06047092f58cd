"""What a sweep will cost before it is launched: FLOPs, memory, and time, from what this machine has measured."""

import json
import math
from collections.abc import Sequence

from models.sizing import shape, training_bytes
from scaling.data.cache import cache_root
from scaling.run import RunConfig

# Assumed of a machine that has run nothing yet: (n_compute, FLOP/s of one core), from the quickstart's runs on a
# 2.4 GHz AMD EPYC (Zen 3), flops / steps / timing.seconds_per_step of their result.json. Larger models run faster.
REFERENCE = ((8.4e3, 7.8e9), (2.0e4, 1.2e10), (3.5e4, 1.6e10), (6.7e4, 2.2e10), (1.3e5, 2.6e10))
COMPILE_SECONDS = 8.0  # per shape of run
SPEEDS = "speeds.jsonl"


def remember_speed(config: RunConfig, seconds_per_step: float, device: str) -> None:
    """Notes how fast a run's steps were, for later estimates. A cache that cannot be written is no error."""
    speed = config.flops / config.steps / seconds_per_step
    line = {"n_compute": config.counts.n_compute, "flops_per_second": round(speed), "device": device}
    try:
        with open(cache_root() / SPEEDS, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        pass


def known_speeds() -> list[tuple[float, float]]:
    """(n_compute, FLOP/s of one worker) of the latest runs on this machine; the reference where there are none.

    Of several kinds of device, the one used last.
    """
    try:
        lines = [json.loads(line) for line in (cache_root() / SPEEDS).read_text().splitlines()[-200:]]
        same = [s for s in lines if s["device"] == lines[-1]["device"]]
        found = [(float(s["n_compute"]), float(s["flops_per_second"])) for s in same]
    except (OSError, ValueError, KeyError):
        found = []
    return found or list(REFERENCE)


def seconds(config: RunConfig, speeds: Sequence[tuple[float, float]]) -> float:
    """Estimated seconds of the run on one worker: at the median speed of the nearest sizes measured."""
    distance = [abs(math.log(n / config.counts.n_compute)) for n, _ in speeds]
    near = sorted(s for (_, s), d in zip(speeds, distance, strict=True) if d <= min(distance) + 0.1)
    return config.flops / near[len(near) // 2]


def dry_run(runs: Sequence[RunConfig], workers: int, finished: set[str]) -> str:
    """The runs of a sweep as a table with their cost, and the total; those in `finished` (ids) cost nothing more."""
    speeds = known_speeds()
    header = ["run", "model", "N (n_compute)", "D tokens", "batch", "lr", "steps", "FLOPs", "memory", "time", ""]
    rows, total, work = [], 0.0, []
    for config in sorted(runs, key=lambda c: (c.flops, c.run_id)):
        needed = seconds(config, speeds)
        done = config.run_id in finished
        total += config.flops
        work += [] if done else [needed]
        memory = training_bytes(config.model, config.batch_size, config.data.seq_len)
        rows.append(
            [
                config.run_id,
                shape(config.model),
                f"{config.counts.n_compute:,}",
                f"{config.trained_tokens:,}",
                f"{config.batch_size}x{config.data.seq_len}",
                f"{config.optim.lr:.4g}",
                f"{config.steps:,}",
                f"{config.flops:.3g}",
                f"{memory / 2**20:,.0f} MiB",
                duration(needed),
                "finished" if done else "",
            ]
        )
    compiling = COMPILE_SECONDS * len(
        {(c.model, c.batch_size, c.data.seq_len) for c in runs if c.run_id not in finished}
    )
    wall = max([sum(work) / workers + compiling / workers, *work]) if work else 0.0
    text = align([header, *rows])
    left = f"{len(work)} of {len(rows)} runs to train" if finished else f"{len(rows)} runs"
    return f"{text}\ntotal: {left}, {total:.4g} FLOPs, about {duration(wall)} on {workers} workers"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of strings as aligned columns, the first two to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
