"""What a sweep will cost before it is launched: FLOPs, memory, and time, from what this machine has measured.

speeds.jsonl in the cache holds a line a measurement: by `sweeps.measure` before a launch, and by each run trained.
"""

import functools
import heapq
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from analysis.text import text_table
from models.sizing import shape
from scaling.alike import same_program, same_regime
from scaling.config import RunConfig
from scaling.data.batches import Store, n_valid_windows, validation_flops
from scaling.data.cache import cache_root
from scaling.data.store import open_store
from scaling.engine.runtime import compilation_cache, processor
from sweeps.plan import Unit, ledger

# Assumed where nothing was measured: (n_compute, FLOP/s of one core), from the quickstart's runs on a 2.4 GHz AMD EPYC
# (Zen 3), flops / steps / timing.seconds_per_step of their result.json. Larger models run faster.
REFERENCE = ((8.4e3, 7.8e9), (2.0e4, 1.2e10), (3.5e4, 1.6e10), (6.7e4, 2.2e10), (1.3e5, 2.6e10))
COMPILE_SECONDS = 8.0  # of the first run of a shape on a machine, beyond what every run costs
LOAD_SHARE = 0.4  # of that, where the compiled program is found in the cache
RUN_SECONDS = 2.0  # of every run beyond its steps: set-up, validation, checkpoint, record
START_SECONDS = 5.0  # of a worker, until it trains
SPEEDS = "speeds.jsonl"
NEAR_SIZE, NEAR_BATCH = 1.5, 1.5  # ratios to which measurements speak beyond their own sizes and batches
MOST_ROWS, ENDS = 1000, 20  # of a printed table; of more runs the first and the last
VALIDATION_SHARE = 0.05  # of the training FLOPs: where validation costs more, a dry run warns
LATEST = 5  # measurements of one shape that count; older ones are of older code


class Job(NamedTuple):
    """A job of a schedule. With `after`, the index of another, it is ready so many seconds after that one began, or
    with `ready` None once that one has ended.
    """

    seconds: float
    after: int | None = None
    ready: float | None = None


class Speed(NamedTuple):
    """One measurement. Seconds are None where they were not measured."""

    n_compute: float
    batch_size: int
    flops_per_second: float  #: of the steps, on one worker
    run_seconds: float | None  #: of a run beyond its steps, its program being there
    compile_seconds: float | None  #: that the first run of the shape on this machine pays beyond that
    load_seconds: float | None  #: that the first run of the shape in a process pays, the program being in the cache
    start_seconds: float | None  #: of a worker, until it trains


@functools.cache
def machine() -> str:
    """What a speed belongs to: processor, its number of cores, jax. Whether on an accelerator stands beside it."""
    return f"{processor()}, {os.cpu_count()} cores, jax {version('jax')}"


def program_id(config: RunConfig) -> str:
    """Equal for runs that share their compiled programs: `scaling.alike.same_program` in twelve hex digits."""
    return id_of(same_program(config))


@functools.lru_cache(maxsize=4096)
def id_of(config: RunConfig) -> str:
    return config.run_id


def remember_speed(
    config: RunConfig,
    seconds_per_step: float,
    device: str,
    workers: int | None = None,
    **seconds: float | None,
) -> None:
    """Notes how fast a run's steps were, for later estimates, and other seconds of `Speed` by name.

    workers: how many trained beside each other. A cache that cannot be written is no error.
    """
    line = {
        "machine": machine(),
        "device": device,
        "workers": workers,
        "regime": same_regime(config),
        "shape": program_id(config),
        "n_compute": config.counts.n_compute,
        "batch_size": config.batch_size,
        "flops_per_second": round(config.flops / config.steps / seconds_per_step),
        **{name: round(value, 3) for name, value in seconds.items() if value is not None},
    }
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        with open(cache_root() / SPEEDS, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        pass


class Known:
    """What was measured on this machine with so many workers beside each other, on the CPU or on an accelerator."""

    def __init__(self, workers: int, accelerated: bool = False) -> None:
        self.speeds: dict[str, list[Speed]] = {}  #: by regime, the latest last
        self.compiled: set[str] = set()  #: `program_id` of the programs that lie in the compilation cache
        for line in remembered():
            try:
                if line["machine"] != machine() or (line["device"] == "cpu") == accelerated:
                    continue
                self.compiled.add(line["shape"])
                if line["workers"] not in (None, workers):
                    continue
                speed = Speed(*(line.get(name) for name in Speed._fields))
                if min(speed[:3]) > 0:
                    self.speeds.setdefault(line["regime"], []).append(speed)
            except (KeyError, TypeError):
                continue  # of an older version, or damaged
        if not compilation_cache().is_dir():
            self.compiled = set()
        #: by regime, size, batch and field, as most runs of a large sweep ask the same
        self.answers: dict[tuple[str, int, int, str], float | None] = {}

    def near(self, config: RunConfig) -> bool:
        """Whether a measurement of about this size speaks for this run, or two that it lies between."""
        return bool(self.answer(config, ""))

    def at(self, config: RunConfig, field: str, otherwise: float) -> float:
        """A field of `Speed` at this run's size, from measurements at the nearest batch; `otherwise` without any."""
        value = self.answer(config, field)
        return otherwise if value is None else value

    def answer(self, config: RunConfig, field: str) -> float | None:
        """`near` where no field is named, else the field `at` this run's size; None without a measurement."""
        key = (same_regime(config), config.counts.n_compute, config.batch_size, field)
        if key not in self.answers:
            self.answers[key] = self.field_at(*key) if field else self.is_near(*key[:3])
        return self.answers[key]

    def is_near(self, regime: str, n: int, batch_size: int) -> bool:
        measured = self.speeds.get(regime, ())
        sizes = [s.n_compute for s in measured if ratio(s.batch_size, batch_size) <= NEAR_BATCH]
        return bool(sizes) and min(sizes) / NEAR_SIZE <= n <= max(sizes) * NEAR_SIZE

    def field_at(self, regime: str, n: int, batch_size: int, field: str) -> float | None:
        measured = [s for s in self.speeds.get(regime, ()) if getattr(s, field)]
        nearest = min((ratio(s.batch_size, batch_size) for s in measured), default=0.0)
        points = [(s.n_compute, getattr(s, field)) for s in measured if ratio(s.batch_size, batch_size) <= nearest]
        return interpolated(points, n) if points else None

    def steps_seconds(self, config: RunConfig, steps: int) -> float:
        """Seconds of so many steps on one worker."""
        speed = self.at(config, "flops_per_second", 0.0) or interpolated(REFERENCE, config.counts.n_compute)
        return config.flops / config.steps * steps / speed


def remembered() -> list[dict[str, Any]]:
    """The latest lines of speeds.jsonl that are whole."""
    try:
        lines = (cache_root() / SPEEDS).read_text(errors="replace").splitlines()[-2000:]
    except OSError:
        return []
    whole = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            whole.append(value)
    return whole


def ratio(a: float, b: float) -> float:
    return max(a / b, b / a)


def interpolated(points: Iterable[tuple[float, float]], x: float) -> float:
    """y at x, linear in log y against log x, level beyond the ends; at each x the median of the latest counts."""
    by_x: dict[float, list[float]] = {}
    for at, y in points:
        by_x.setdefault(at, []).append(y)
    known = sorted((at, sorted(ys[-LATEST:])[len(ys[-LATEST:]) // 2]) for at, ys in by_x.items())
    if x <= known[0][0]:
        return known[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 * (y1 / y0) ** share
    return known[-1][1]


def schedule_seconds(jobs: Sequence[Job], workers: int, running: Collection[int] = ()) -> float:
    """Seconds until all jobs are done by so many workers, each free worker taking the longest job that is ready.

    Those in `running` have begun. Raises ValueError where jobs wait for each other in a circle.
    """
    children: dict[int, list[int]] = {}
    events: list[tuple[float, int, int]] = []  # (when, 0: a job ends or 1: becomes ready, which)
    for i, job in enumerate(jobs):
        if job.after is None or i in running:
            events.append((0.0, 1, i))
        else:
            children.setdefault(job.after, []).append(i)
    heapq.heapify(events)
    ready: list[tuple[bool, float, int]] = []  # those that run already first, then the longest
    free, ended, last = workers, 0, 0.0
    while events:
        now, what, i = heapq.heappop(events)
        if what == 1:
            heapq.heappush(ready, (i not in running, -jobs[i].seconds, i))
        else:
            free, ended, last = free + 1, ended + 1, now
        if events and events[0][0] == now:
            continue  # all that happens at this moment, before a worker chooses
        while free and ready:
            i = heapq.heappop(ready)[2]
            free -= 1
            heapq.heappush(events, (now + jobs[i].seconds, 0, i))
            for child in children.get(i, ()):
                delay = jobs[child].ready
                delay = jobs[i].seconds if delay is None else min(delay, jobs[i].seconds)
                heapq.heappush(events, (now + delay, 1, child))
    if ended < len(jobs):
        raise ValueError(f"{len(jobs) - ended} jobs wait for each other")
    return last


def validated_tokens(runs: Iterable[RunConfig]) -> dict[str, int]:
    """How many tokens each run validates on, by its id; their corpora are opened."""

    @functools.cache
    def store(*of: Any) -> Store:
        return open_store(of[0], of[1], valid_fraction=of[2])

    return {
        config.run_id: config.data.seq_len
        * n_valid_windows(config, store(config.data.source, config.data.tokenizer, config.data.valid_fraction))
        for config in runs
    }


def validation_cost(units: Sequence[Unit], tokens: Mapping[str, int]) -> dict[str, Any]:
    """FLOPs of validating each run once, and `valid_tokens_advised`: how many tokens would cost VALIDATION_SHARE of the
    training that the sweep spends; None where they cost no more.
    """
    cost = {unit.run_id: validation_flops(unit.config, tokens[unit.run_id]) for unit in units}
    spent, whole = sum(cost.values()), ledger(units)["flops_spent"]
    advised = None
    if spent > VALIDATION_SHARE * whole:
        of_one = sum(validation_flops(unit.config, 1) for unit in units)
        advised = int(float(f"{VALIDATION_SHARE * whole / of_one:.1e}"))
    return {"flops_validation": spent, "valid_tokens_advised": advised}


def dry_run_json(
    units: Sequence[Unit],
    workers: int,
    finished: Collection[str] = (),
    known: Known | None = None,
    valid_tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """FLOPs wanted, spent and shared by the whole sweep, `seconds` for what is not in `finished` (ids), and the runs.

    `seconds` counts the start of the workers, compiling, and what each run costs beyond its steps. They are None where
    nothing is `known` of the machine. valid_tokens: by run id, for what validation costs.
    """
    units = sorted(units, key=lambda u: (u.config.flops, u.run_id))
    left = sorted((u for u in units if u.run_id not in finished), key=lambda u: -u.flops)  # as workers take them
    jobs = dict(zip((u.run_id for u in left), jobs_of(left, workers, known), strict=True)) if known else {}
    seconds = {unit.run_id: None if known is None else 0.0 for unit in units}
    seconds |= {run: round(job.seconds, 2) for run, job in jobs.items()}
    rows = [
        {
            "run": unit.run_id,
            "model": shape(unit.config.model),
            "n_compute": unit.config.counts.n_compute,
            "tokens": unit.config.trained_tokens,
            "batch_size": unit.config.batch_size,
            "seq_len": unit.config.data.seq_len,
            "lr": unit.config.optim.lr,
            "steps": unit.config.steps,
            "flops": unit.config.flops,
            "flops_spent": unit.flops,
            "after": unit.after,
            "at": unit.at,
            "needs": list(unit.needs),
            "memory_bytes": unit.config.training_bytes,
            "seconds": seconds[unit.run_id],
            "finished": unit.run_id in finished,
        }
        for unit in units
    ]
    speeds = known.speeds.values() if known else ()
    starts = [s.start_seconds for some in speeds for s in some if s.start_seconds][-LATEST:]
    start = sorted(starts)[len(starts) // 2] if starts else START_SECONDS
    in_all = round(schedule_seconds(list(jobs.values()), workers) + start, 1) if jobs else 0.0
    return {
        **ledger(units),
        **(validation_cost(units, valid_tokens) if valid_tokens else {}),
        "seconds": None if known is None else in_all,
        "workers": workers,
        "measured": known is not None and all(known.near(unit.config) for unit in left),
        "runs": rows,
    }


def jobs_of(units: Sequence[Unit], workers: int, known: Known) -> list[Job]:
    """The runs as jobs of a schedule. The first of a shape compiles it; as many others as there are workers load it."""
    index = {unit.run_id: i for i, unit in enumerate(units)}
    jobs, firsts, met = [], [], Counter()
    for unit in units:
        config, key = unit.config, program_id(unit.config)
        compiling = known.at(config, "compile_seconds", COMPILE_SECONDS)
        loading = known.at(config, "load_seconds", LOAD_SHARE * compiling)
        first = 0.0 if met[key] >= workers else loading if met[key] or key in known.compiled else compiling
        met[key] += 1
        firsts.append(first)
        beyond = known.at(config, "run_seconds", RUN_SECONDS) + first
        trunk = index.get(unit.after)
        ready = known.steps_seconds(config, unit.at) + (0.0 if trunk is None or trunk >= len(jobs) else firsts[trunk])
        needed = [index[run] for run in unit.needs if run in index]  # the last in the order counts
        if needed and trunk is None:  # a trunk needs what its branches need
            trunk, ready = max(needed), None
        jobs.append(Job(known.steps_seconds(config, config.steps - unit.at) + beyond, trunk, ready))
    return jobs


def dry_run_text(result: dict[str, Any], note: str = "") -> str:
    """What `dry_run_json` says as a table, a row a run, and the totals. `note`: why the time is not known."""
    header = ["run", "model", "N (n_compute)", "D tokens", "batch", "lr", "steps", "FLOPs", "memory", "time", ""]
    table = table_of_ends(header, result["runs"], row_of)
    runs, left = len(result["runs"]), sum(not row["finished"] for row in result["runs"])
    count = f"{left} of {runs} runs to train" if left < runs else f"{runs} runs"
    flops = ", ".join(f"{result[f'flops_{what}']:.4g} {what}" for what in ("wanted", "spent", "shared"))
    source = "measured here" if result["measured"] else "a guess: not measured on this machine"
    workers = result["workers"]
    time = note if note else f"about {duration(result['seconds'])} on {workers} workers ({source})"
    flops += validation_text(result)
    return f"{table}\nFLOPs: {flops}\ntotal: {count}, {result['flops_wanted']:.4g} FLOPs, {time}"


def row_of(row: dict[str, Any]) -> list[str]:
    return [
        row["run"],
        row["model"],
        f"{row['n_compute']:,}",
        f"{row['tokens']:,}",
        f"{row['batch_size']}x{row['seq_len']}",
        f"{row['lr']:.4g}",
        f"{row['steps']:,}",
        f"{row['flops']:.3g}",
        f"{row['memory_bytes'] / 2**20:,.0f} MiB",
        "" if row["finished"] or row["seconds"] is None else duration(row["seconds"]),
        "finished" if row["finished"] else begins(row),
    ]


def begins(row: dict[str, Any]) -> str:
    """Where a run begins, if not with fresh parameters."""
    parts = [f"parent {run}" for run in row["needs"]] + ([f"from step {row['at']:,}"] if row["at"] else [])
    return ", ".join(parts)


def table_of_ends(header: Sequence[str], runs: Sequence[Any], row_of: Callable[[Any], list[str]]) -> str:
    """A table of all runs, or of the first and the last of very many, with the number of those between."""
    between = len(runs) - 2 * ENDS
    if len(runs) <= MOST_ROWS:
        return text_table([header, *map(row_of, runs)])
    gap = [f"... {between:,} more", "(--json has all)", *[""] * (len(header) - 2)]
    return text_table([header, *map(row_of, runs[:ENDS]), gap, *map(row_of, runs[-ENDS:])])


def validation_text(result: dict[str, Any]) -> str:
    """What validation costs, after the other FLOPs, and a line that warns where that is much."""
    if "flops_validation" not in result:
        return ""
    cost, advised = result["flops_validation"], result["valid_tokens_advised"]
    share = cost / result["flops_spent"]
    text = f"; validation, once a run: {cost:.4g} more ({share:.1%})"
    if advised is None:
        return text
    return (
        f"{text}\nwarning: validation costs {share:.0%} of the training FLOPs; data.valid_tokens = {advised} would "
        f"cost {VALIDATION_SHARE:.0%} (set it for all runs that are to be compared: it changes their ids)"
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
