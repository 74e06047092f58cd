"""How the runs of a sweep share work: which run continues from which, and what that saves. No JAX here.

Runs that differ only in how long they train begin alike: with a warm-up/stable/decay schedule all is shared until the
shorter one cools down. The longest run of such a group is the trunk: it keeps its state at the steps where others part
from it, and they branch from there. A run never depends on this: one that finds no kept state trains from its
beginning, to the same bits.
"""

import contextlib
import dataclasses
import functools
import graphlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.alike import same_rates, same_trunk
from scaling.config import RunConfig
from scaling.engine.schedules import learning_rates, weight_decays
from scaling.folder import read_json, write_atomically
from scaling.trust import check_run_id

LEAST_SHARE = 0.05  # of a run's steps: below it, waiting for a trunk costs more than it saves


@dataclass(frozen=True)
class Unit:
    """A run of a sweep, and its place among those that begin as it does."""

    config: RunConfig
    after: str | None = None  #: id of the run that it branches from
    at: int = 0  #: steps that it takes over from there
    saves: tuple[int, ...] = ()  #: steps at which it keeps its state, for branches
    #: ids of runs that must have finished before it begins, as it starts from what they end with; `after` may fail
    needs: tuple[str, ...] = ()

    @property
    def run_id(self) -> str:
        return self.config.run_id

    @functools.cached_property
    def flops(self) -> float:
        """Training FLOPs of the run's own steps; 0 where they are not known."""
        return flops_of(self.config, self.at) or 0.0


def flops_of(config: RunConfig, step: int = 0) -> float | None:
    """The training FLOPs of a run after a step; None where its objective is not here, as of another version."""
    with contextlib.suppress(InputError):
        return config.flops_from(step)
    return None


def plan(runs: Sequence[RunConfig], sharing: bool = True) -> tuple[Unit, ...]:
    """A unit for each run, in the order given. With `sharing`, runs of a group branch from its longest."""
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in runs:
        groups.setdefault(same_trunk(config) if sharing else config, []).append(config)
    units: dict[str, Unit] = {}
    common = comparison()
    for group in groups.values():
        placed: list[RunConfig] = []
        saves: dict[str, set[int]] = {}
        for config in sorted(group, key=lambda c: (-c.steps, c.run_id)):
            # The first of those that share most is the longest: branches hang on trunks, not on branches.
            steps = [common(config, other) for other in placed]
            at = max(steps, default=0)
            after = placed[steps.index(at)].run_id if at and at >= LEAST_SHARE * config.steps else None
            if after:
                saves.setdefault(after, set()).add(at)
            needs = (config.parent,) if config.parent else ()
            units[config.run_id] = Unit(config, after, at if after else 0, needs=needs)
            placed.append(config)
        for config in placed if sharing else ():
            unit = units[config.run_id]
            if unit.after is None:  # a longer run, added later, continues from here
                onward = common(config, dataclasses.replace(config, tokens=2 * config.tokens))
                if onward >= LEAST_SHARE * config.steps:
                    saves.setdefault(config.run_id, set()).add(onward)
            units[config.run_id] = dataclasses.replace(unit, saves=tuple(sorted(saves.get(config.run_id, ()))))
    return tuple(units[config.run_id] for config in runs)


def plan_in(folder: Path, runs: Sequence[RunConfig], sharing: bool = True) -> tuple[Unit, ...]:
    """`plan`, as far as it can still be followed in a sweep's folder: where a trunk is past a step and did not keep its
    state there, as nobody wanted it then, the run begins from the latest state that is kept of what both share, or from
    its own beginning.
    """
    units, kept = plan(runs, sharing), functools.cache(lambda run: steps_in(folder / "runs" / run / "branches"))
    if not sharing or not (folder / "runs").is_dir():
        return units
    by_id = {unit.run_id: unit for unit in units}

    def passed(unit: Unit) -> bool:
        trunk = folder / "runs" / unit.after
        done = by_id[unit.after].config.steps if (trunk / "result.json").exists() else 0
        return max([done, *steps_in(trunk / "checkpoints")]) > unit.at and unit.at not in kept(unit.after)

    groups, followed = by_group(units), []
    for unit in units:
        if unit.after is not None and passed(unit):
            alike = sources(unit, groups[same_trunk(unit.config)])
            starts = [step for run, common in alike for step in kept(run) if 0 < step <= common]
            unit = dataclasses.replace(unit, after=None, at=max(starts, default=0))  # it is there: none to wait for
        followed.append(unit)
    return tuple(followed)


def finished_runs(folder: Path, runs: Sequence[RunConfig]) -> set[str]:
    """The ids of those that have a result in a sweep's folder."""
    return {c.run_id for c in runs if (folder / "runs" / c.run_id / "result.json").exists()}


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder of them."""
    with contextlib.suppress(OSError):  # not there, or a link that leads nowhere
        return [int(name) for name in os.listdir(folder) if name.isascii() and name.isdigit() and len(name) < 16]
    return []


def common_steps(a: RunConfig, b: RunConfig) -> int:
    """Steps from the beginning on in which two runs of one group do the same: equal rates and weight decays."""
    n = min(a.steps, b.steps)
    differs = np.zeros(n, bool)
    for values in (learning_rates, weight_decays):
        differs |= values(a)[:n] != values(b)[:n]
    return int(np.argmax(differs)) if differs.any() else n


def comparison() -> Callable[[RunConfig, RunConfig], int]:
    """`common_steps`, computed once for all runs of the same two schedules: a sweep has many of each."""
    schedules: dict[tuple, int] = {}
    numbers: dict[str, int] = {}  # of a run's schedule, by run id
    known: dict[tuple[int, int], int] = {}

    def number(config: RunConfig) -> int:
        if config.run_id not in numbers:
            numbers[config.run_id] = schedules.setdefault(same_rates(config), len(schedules))
        return numbers[config.run_id]

    def common(a: RunConfig, b: RunConfig) -> int:
        pair = number(a), number(b)
        if pair not in known:
            known[pair] = common_steps(a, b)
        return known[pair]

    return common


def ledger(units: Sequence[Unit]) -> dict[str, float]:
    """Training FLOPs wanted (each run from its beginning), spent (each unit's own steps), shared (the difference)."""
    wanted, spent = sum(u.config.flops for u in units), sum(u.flops for u in units)
    return {"flops_wanted": wanted, "flops_spent": spent, "flops_shared": wanted - spent}


def write_plan(folder: Path, units: Sequence[Unit], launch: str) -> None:
    """plan.json: what a worker needs to know of the sweep in `folder`; `launch` names this launch."""
    rows = [
        {
            "id": unit.run_id,
            "config": unit.config.to_dict(),
            "after": unit.after,
            "at": unit.at,
            "saves": list(unit.saves),
            "needs": list(unit.needs),
        }
        for unit in units
    ]
    write_atomically(folder / "plan.json", json.dumps({"launch": launch, "units": rows}) + "\n")


def read_plan(folder: Path) -> tuple[str, tuple[Unit, ...]]:
    """(launch, units) of the sweep in `folder`. Raises InputError where plan.json is not whole."""
    plan: dict[str, Any] = read_json(folder / "plan.json")
    try:
        if not isinstance(plan["launch"], str):
            raise InputError(f"launch = {plan['launch']!r}, expected text")
        units = tuple(unit_of(row) for row in plan["units"])
        check_order(units)
        return plan["launch"], units
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'plan.json'}: not a plan ({error}); launch the sweep again") from None


def unit_of(row: dict[str, Any]) -> Unit:
    """The unit of a row of plan.json. Raises InputError, KeyError or TypeError where it is none."""
    if not isinstance(row, dict) or not isinstance(row["config"], dict):
        raise InputError("a unit is no object with a config")
    config = RunConfig.from_dict(row["config"])
    after, at, saves, needs = row["after"], row["at"], row["saves"], row.get("needs", [])
    whole = [at, *saves]
    if row["id"] != config.run_id:
        raise InputError(f"id = {row['id']!r}, but its configuration is that of run {config.run_id}")
    if not all(type(step) is int and 0 <= step <= config.steps for step in whole):
        raise InputError(f"run {config.run_id}: at = {at!r}, saves = {saves!r}, expected steps of the run")
    for run in [*needs, *([] if after is None else [after])]:
        check_run_id(run, "what a run waits for")
    return Unit(config, after, at, tuple(saves), tuple(needs))


def check_order(units: Sequence[Unit]) -> None:
    """Raises InputError where runs wait for each other in a circle."""
    waits = {unit.run_id: {*unit.needs, *([] if unit.after is None else [unit.after])} for unit in units}
    try:
        graphlib.TopologicalSorter(waits).prepare()
    except graphlib.CycleError as error:
        raise InputError(f"runs {' -> '.join(error.args[1])} wait for each other") from None


def by_group(units: Sequence[Unit]) -> dict[RunConfig, list[Unit]]:
    """The units that may begin alike, by what they have in common."""
    groups: dict[RunConfig, list[Unit]] = {}
    for unit in units:
        groups.setdefault(same_trunk(unit.config), []).append(unit)
    return groups


def sources(unit: Unit, group: Sequence[Unit]) -> list[tuple[str, int]]:
    """(run id, common steps) of every run of its group whose kept states this one may start from, whoever kept them and
    why.
    """
    return [
        (other.run_id, common)
        for other in group
        if other.run_id != unit.run_id and (common := common_steps(unit.config, other.config))
    ]
