"""How a sweep stands while it runs: `scaling status`. Only reads the folder, never JAX, and a damaged file is no end.

Every run is in one state: finished, diverged, running (a worker holds it), failed (its last attempt raised or died),
waiting (not begun, or stopped with its state saved), damaged (its files are not whole; `remedy` says what to do).
"""

import functools
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from analysis.errors import InputError as AnalysisInputError
from analysis.text import printable
from models.errors import InputError
from scaling.config import RunConfig
from scaling.failure import read_failure
from scaling.folder import read_config, read_json
from scaling.result import RunResult, flops_by_step, read_result
from sweeps.cost import Job, duration, interpolated, schedule_seconds, table_of_ends
from sweeps.folder import lacks_config, read_description
from sweeps.plan import Unit, flops_of, read_plan
from sweeps.table import is_held, read_progress, run_folders

STATES = ("running", "failed", "damaged", "waiting", "diverged", "finished")
FEWEST_RUNS, FEWEST_SIZES = 6, 2  # finished, below which no law is fitted
COUPLED_RUNS = 10  # from here on the coupled law, of 6 parameters, which fits small models better than the additive one
LOG_BYTES, LOG_LINES = 65_536, 5
REFRESH_SECONDS = 2.0
DAMAGE = (InputError, OSError, ValueError, TypeError, KeyError, ArithmeticError)


def sweep_status(folder: Path, workers: int = 0) -> dict[str, Any]:
    """All that is known of the sweep, or of the single run, in `folder`, as plain JSON.

    workers: how many were at work a moment ago: between two runs a worker holds none.

    FLOPs of whole runs: wanted = spent + shared + left, but for what diverged runs leave. Shared: what a run need not
    spend as it begins from another run's checkpoint, as its result says, or for runs not finished the plan.
    `seconds_left` is None while nobody is at work. Raises InputError where `folder` holds no runs.
    """
    folders = run_folders(folder)
    sweep = read_description(folder) if (folder / "sweep.json").exists() else None
    units, notes = planned(folder)
    runs = [run_status(run, units.get(run.name), sweep is not None) for run in folders]
    for run in runs:
        if run["status"] == "failed" and sweep:  # of its folder alone it is known that no link leads out
            run["log"] = log_tail(folder / "logs", run["run"], folder / "runs" / run["run"] / "failed.json")
    unknown = sum(run["flops"] is None for run in runs)
    if unknown:
        notes.append(f"FLOPs of {unknown} runs are not counted: their configuration or objective is not here")
    number = Counter(run["status"] for run in runs)
    idle = not number["running"] and bool(number["waiting"] or number["failed"])
    counted = {f"flops_{what}": total(runs, f"flops_{what}") for what in ("spent", "shared", "left")}
    return {
        "folder": str(folder),
        "name": sweep.name if sweep else folder.name,
        "done": number["finished"],
        **{state: number[state] for state in ("running", "waiting", "failed", "diverged", "damaged")},
        "flops_wanted": total(runs, "flops"),
        **counted,
        "tokens_per_second": total(runs, "tokens_per_second"),
        "seconds_left": seconds_left(runs, workers),
        "jobs": waiting_jobs(folder, notes) if idle else None,
        "forecast": add_forecasts(runs, sweep.law if sweep else None),
        "notes": notes,
        "runs": [{k: v for k, v in run.items() if k != "pace"} for run in runs],
    }


def waiting_jobs(folder: Path, notes: list[str]) -> int | None:
    """How many Slurm jobs of the sweep's launches wait or start; None where it has none, or Slurm does not answer."""
    from sweeps.launch.slurm import queued, read_jobs

    try:
        jobs = read_jobs(folder)
        return len(set(jobs) & queued()) if jobs else None
    except InputError as error:
        notes.append(f"whether jobs wait is not known: {error}".replace("--on slurm: ", ""))
        return None


def planned(folder: Path) -> tuple[dict[str, Unit], list[str]]:
    """The units of plan.json by run id, and notes on it: without a plan, or with a damaged one, none."""
    if not (folder / "plan.json").exists():
        return {}, []
    try:
        return {unit.run_id: unit for unit in read_plan(folder)[1]}, []
    except (*DAMAGE, AttributeError):
        return {}, ["plan.json is damaged; launch the sweep again to write it anew"]


def run_status(folder: Path, unit: Unit | None, named: bool) -> dict[str, Any]:
    """One run's entry. `named`: the folder's name must be the run's id, as in a sweep."""
    entry: dict[str, Any] = dict.fromkeys(
        ("n_compute", "tokens", "flops", "flops_spent", "flops_shared", "flops_left", "step", "steps", "loss")
    )
    entry |= {
        "run": folder.name,
        "after": unit and unit.after,
        "needs": list(unit.needs) if unit else [],
        "tokens_per_second": None,
        "seconds_left": None,
    }
    try:
        return entry | looked_at(folder, unit, named)
    except DAMAGE as error:
        remedy = "launch again, which makes it anew" if mendable(folder) else f"move {folder} away and launch again"
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        damaged = {"status": "damaged", "reason": " ".join(reason.split()), "remedy": remedy}
        return entry | (sizes(unit.config, unit.at) if unit else {}) | damaged


def mendable(folder: Path) -> bool:
    """Whether a launch makes anew what is damaged (sweeps/launch/prepare.py)."""
    try:
        read_result(folder)
    except InputError:
        return True
    return lacks_config(folder)


def looked_at(folder: Path, unit: Unit | None, named: bool) -> dict[str, Any]:
    """What `run_status` knows of a run whose files are whole; raises one of DAMAGE where they are not."""
    began = (folder / "config.json").exists()
    if not began and (folder / "result.json").exists():
        raise InputError(f"{folder}: has a result but no config.json")
    config = read_config(folder) if began else unit and unit.config
    if config is None:
        return {"status": "waiting", **failure(folder)}
    if named and config.run_id != folder.name:
        raise InputError(f"{folder}: config.json is of another run ({config.run_id})")
    result = read_result(folder) if began else None
    if result is not None:
        return {"run": config.run_id, **ended(folder, config, result)}
    entry = {"run": config.run_id, "status": "running" if is_held(folder) else "waiting"}
    state = read_progress(folder) if began else {}
    step, loss = state.get("step"), state.get("loss")
    if step is None:  # not begun, as far as is known: as planned
        entry |= sizes(config, unit.at if unit else 0)
    else:
        entry |= sizes(config, min(branched_at(folder), step), step)
    entry |= {"step": step, "loss": loss}
    if entry["status"] == "running":
        rate = state.get("tokens_per_second")
        entry |= {"tokens_per_second": rate, "seconds_left": state.get("seconds_left")}
        if rate and entry.get("flops"):
            entry["pace"] = (config.counts.n_compute, rate * entry["flops"] / config.trained_tokens, 0.0)
        return entry
    return entry | failure(folder)


def branched_at(folder: Path) -> int:
    """The step at which a run that has begun took over another's state; 0 where it began by itself."""
    try:
        at = read_json(folder / "branch.json").get("at")
    except InputError:
        return 0
    return at if type(at) is int and 0 <= at < 1e18 else 0


def ended(folder: Path, config: RunConfig, result: RunResult) -> dict[str, Any]:
    """The entry of a run with a result."""
    if result.run != config.run_id:
        raise InputError(f"{folder}: result.json is not of this config")
    entry = {"status": result.status, "loss": result.loss, "step": result.last_step}
    entry |= sizes(config, result.branched_at_step, result.last_step, result.flops) | {"flops_left": 0.0}
    a_step, seconds = result.timing.get("seconds_per_step"), result.timing.get("seconds", 0.0)
    if a_step:
        trained = result.last_step - result.timing.get("resumed_at_step", result.branched_at_step)
        rest = max(0.0, seconds - trained * a_step)
        entry["pace"] = (config.counts.n_compute, result.flops / config.steps / a_step, rest)
    return entry


def sizes(config: RunConfig, at: int, done: int = 0, whole: float | None = None) -> dict[str, Any]:
    """Sizes and FLOPs of a run that began at step `at` and has come to step `done`.

    `whole`: its FLOPs where they are known; the configuration of an objective that is not here does not say them.
    """
    counted = {"n_compute": config.counts.n_compute, "tokens": config.trained_tokens, "steps": config.steps}
    whole = flops_of(config) if whole is None else whole
    if whole is None:
        return counted
    flops = flops_by_step(whole, config.steps, at, done)
    return counted | {
        "flops": flops.whole,
        "flops_spent": flops.spent,
        "flops_shared": flops.ancestors,
        "flops_left": flops.left,
    }


def failure(folder: Path) -> dict[str, Any]:
    """Why the run failed, where it did."""
    last = read_failure(folder)
    return {} if last is None else {"status": "failed", "reason": last.reason, "attempts": last.attempts or None}


def total(runs: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(run[name] or 0.0 for run in runs))


def log_tail(logs: Path, run: str, failed: Path) -> list[str]:
    """The last lines of the log that speaks of the run, up to where it does; else of the log written last before it
    failed.
    """
    try:
        when = failed.stat().st_mtime
        newest_first = sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
        ends = {path: end_of(path) for path in newest_first}
        written = [path for path in newest_first if path.stat().st_size and path.stat().st_mtime <= when + 5]
    except OSError:
        return []
    for lines in ends.values():
        spoken = [i for i, line in enumerate(lines) if run in line]
        if spoken:
            return lines[: spoken[-1] + 1][-LOG_LINES:]
    return ends[written[0]][-LOG_LINES:] if written else []


def end_of(path: Path) -> list[str]:
    """The lines at the end of a file that are not blank."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def seconds_left(runs: Sequence[dict[str, Any]], workers: int) -> float | None:
    """Until all that waits is done, by as many workers as are at work, at the pace of this sweep's own runs."""
    running = [run for run in runs if run["status"] == "running" and run["flops"]]
    if not running:
        return None if any(run["flops_left"] for run in runs) else 0.0
    paces = [run["pace"] for run in runs if "pace" in run]
    if not paces:
        return None
    # What a run takes beyond its steps: more where its size is the first of it, which compiles.
    rests = sorted(rest for _, _, rest in paces if rest) or [0.0]
    met = {n for n, _, _ in paces}
    open_runs = running + [run for run in runs if run["status"] == "waiting" and run["flops"]]
    index = {run["run"]: i for i, run in enumerate(open_runs)}
    speeds = [pace[:2] for pace in paces]
    jobs = []
    for run in open_runs:
        speed = interpolated(speeds, run["n_compute"])
        needed = run["flops_left"] / speed if run["seconds_left"] is None else run["seconds_left"]
        rest = rests[0] if run["n_compute"] in met else rests[len(rests) // 2]
        trunk, ready = index.get(run["after"]), 0.0
        if trunk is not None:  # ready once the trunk has made the steps that both share
            ahead = run["flops_shared"] - (run_done(open_runs[trunk]) if trunk < len(running) else 0.0)
            ready = max(0.0, ahead) / speed
        parents = [index[parent] for parent in run["needs"] if parent in index]
        if parents and trunk is None:  # a trunk needs what its branches need
            trunk, ready = max(parents), None  # ready once that one has ended
        jobs.append(Job(needed + rest, trunk, ready))
    return round(schedule_seconds(jobs, max(workers, len(running)), running=range(len(running))), 1)


def run_done(run: dict[str, Any]) -> float:
    """FLOPs of the steps that a run has behind it, its own or another's."""
    return run["flops"] - run["flops_left"]


def add_forecasts(runs: Sequence[dict[str, Any]], law: Any) -> dict[str, Any]:
    """Sets `forecast`, the final loss by a law of the finished runs, on those not ended; returns what law it is, or why
    there is none.
    """
    own = [run for run in runs if not run["needs"]]  # what began elsewhere is not of their law
    done = [run for run in own if run["status"] == "finished"]
    sizes = len({run["n_compute"] for run in done})
    coming = [run for run in own if run["status"] in ("running", "waiting") and run["n_compute"]]
    for run in runs:
        run["forecast"] = None
    if len(done) < FEWEST_RUNS or sizes < FEWEST_SIZES:
        why = f"{len(done)} finished runs of {sizes} sizes; at least {FEWEST_RUNS} of {FEWEST_SIZES} are needed"
        return {"law": None, "why": why}
    if not coming:
        return {"law": None, "why": "no run is still to come"}
    named = str(law) if law and law != "auto" else "coupled" if len(done) >= COUPLED_RUNS else "chinchilla"
    try:
        fit = fitted(tuple((run["n_compute"], run["tokens"], run["loss"]) for run in done), named)
        for run in coming:
            loss = float(fit.predict(run["n_compute"], run["tokens"]))
            run["forecast"] = round(loss, 5) if math.isfinite(loss) else None
            outside = fit.outside(run["n_compute"], run["tokens"])
            if outside:
                run["forecast_note"] = outside
    except AnalysisInputError as error:
        return {"law": None, "why": " ".join(str(error).split())}
    return {"law": named, "runs": len(done), "noise": float(fit.noise["sigma"])}


@functools.lru_cache(maxsize=4)
def fitted(rows: tuple[tuple[float, float, float], ...], law: str):
    """The LawFit to (n_compute, tokens, loss) of the finished runs; kept from look to look."""
    import pandas as pd

    from analysis.fitting.fit import fit
    from analysis.runs import read_runs

    frame = pd.DataFrame(rows, columns=["n_compute", "tokens", "loss"])
    return fit(read_runs(frame, n_unit=1, d_unit=1, loss_unit="nats"), law)


def status_text(status: dict[str, Any]) -> str:
    """The status as people read it: totals, a row a run (those at work first), failures with their reason and log."""
    runs = sorted(status["runs"], key=lambda run: STATES.index(run["status"]))
    counted = Counter(run["status"] for run in runs)
    states = ", ".join(f"{counted[state]} {state}" for state in reversed(STATES) if counted[state])
    lines = [f"{status['folder']}: {len(runs)} runs: {states}"]
    parts = ", ".join(f"{status[f'flops_{what}']:.4g} {what}" for what in ("wanted", "spent", "shared", "left"))
    lines.append(f"FLOPs: {parts}")
    if counted["running"]:
        left = "not known yet" if status["seconds_left"] is None else f"about {duration(status['seconds_left'])}"
        lines.append(f"{status['tokens_per_second']:,.0f} tokens/s; time left: {left}")
    elif status["jobs"]:
        lines.append(f"nobody is at work yet: {status['jobs']} Slurm jobs wait or start")
    elif counted["waiting"] or counted["failed"]:
        lines.append("nobody is at work; launch the sweep again to continue")
    forecast = status["forecast"]
    if forecast["law"]:
        outside = "; *: outside the fitted runs" if any("forecast_note" in run for run in runs) else ""
        law = f"{forecast['law']} law of {forecast['runs']} runs, noise {forecast['noise']:.2%}"
        lines.append(f"forecast of the final loss: {law}{outside}")
    elif counted["running"] or counted["waiting"]:
        lines.append(f"no forecast: {forecast['why']}")
    lines += [printable(f"note: {note}") for note in status["notes"]]
    for run in runs:  # before the table, which may be longer than the terminal
        if run["status"] in ("failed", "damaged"):
            tried = f", attempt {run['attempts']}" if run.get("attempts") else ""
            lines += ["", printable(f"{run['run']} {run['status']}{tried}: {run['reason']}")]
            lines += [f"    {printable(line)}" for line in run.get("log", ())]
            lines += [f"    {run['remedy']}"] if "remedy" in run else []
    header = ["run", "status", "N", "D", "step", "loss", "forecast", "left"]
    lines += ["", table_of_ends(header, runs, row_of)]
    return "\n".join(lines)


def row_of(run: dict[str, Any]) -> list[str]:
    def shown(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    step = f"{run['step']:,}/{run['steps']:,}" if run["step"] is not None and run["steps"] else ""
    left = "" if run["seconds_left"] is None else duration(run["seconds_left"])
    forecast = shown(run["forecast"], ".4f") + ("*" if "forecast_note" in run else "")  # *: outside the fitted runs
    cells = [run["run"], run["status"], shown(run["n_compute"], ","), shown(run["tokens"], ",")]
    return [*cells, step, shown(run["loss"], ".4f"), forecast, left]


def watch(folder: Path, show: Callable[[dict[str, Any]], None], every: float = REFRESH_SECONDS) -> dict[str, Any]:
    """Shows the status again and again, until nothing runs or waits; returns the last.

    A failed run may be on its way to another attempt, so with failures the end is believed at the second look.
    """
    ends, workers = 0, deque([0], maxlen=5)
    while True:
        status = sweep_status(folder, max(workers))
        workers.append(status["running"])
        show(status)
        over = not status["running"] and not status["waiting"]
        ends = ends + 1 if over else 0
        if ends > bool(status["failed"]):
            return status
        time.sleep(every)


def watch_here(folder: Path, as_json: bool) -> None:
    """The live view on a terminal; elsewhere, or as JSON, a block (a line) each time that a run's state changes."""
    import sys

    if sys.stdout.isatty() and not as_json:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(), auto_refresh=False) as live:
            watch(folder, lambda status: live.update(Text(status_text(status)), refresh=True))
        return
    before: list[str] = []

    def show(status: dict[str, Any]) -> None:
        states = [run["status"] for run in status["runs"]]
        if states != before:
            before[:] = states
            print(json.dumps(status) if as_json else status_text(status) + "\n", flush=True)

    watch(folder, show)
