"""How the runs of a sweep share work: which run continues from which, and what that saves. No JAX here.

Runs that differ only in how long they train begin alike: with a warm-up/stable/decay schedule all is shared until the
shorter one cools down. The longest run of such a group is the trunk: it keeps its state at the steps where others part
from it, and they branch from there. A run never depends on this: one that finds no kept state trains from its
beginning, to the same bits.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.alike import same_trunk
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

    @property
    def run_id(self) -> str:
        return self.config.run_id

    @property
    def flops(self) -> float:
        """Training FLOPs of the run's own steps."""
        return self.config.flops_from(self.at)


def plan(runs: Sequence[RunConfig], sharing: bool = True) -> tuple[Unit, ...]:
    """A unit for each run, in the order given. With `sharing`, runs of a group branch from its longest."""
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in runs:
        groups.setdefault(same_trunk(config) if sharing else config, []).append(config)
    units: dict[str, Unit] = {}
    for group in groups.values():
        placed: list[RunConfig] = []
        saves: dict[str, set[int]] = {}
        for config in sorted(group, key=lambda c: (-c.steps, c.run_id)):
            # The first of those that share most is the longest: branches hang on trunks, not on branches.
            trunk = max(placed, key=lambda other: common_steps(config, other), default=None)
            at = common_steps(config, trunk) if trunk else 0
            after = trunk.run_id if trunk and at >= LEAST_SHARE * config.steps else None
            if after:
                saves.setdefault(after, set()).add(at)
            units[config.run_id] = Unit(config, after, at if after else 0)
            placed.append(config)
        for config in placed if sharing else ():
            unit = units[config.run_id]
            if unit.after is None:  # a longer run, added later, continues from here
                longer = dataclasses.replace(config, tokens=2 * config.tokens)
                onward = common_steps(config, longer)
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
    if not sharing:
        return units
    by_id = {unit.run_id: unit for unit in units}

    def passed(unit: Unit) -> bool:
        trunk = folder / "runs" / unit.after
        done = by_id[unit.after].config.steps if (trunk / "result.json").exists() else 0
        return max([done, *steps_in(trunk / "checkpoints")]) > unit.at and unit.at not in kept(unit.after)

    found = []
    for unit in units:
        if unit.after is not None and passed(unit):
            starts = [step for run, common in sources(unit, units) for step in kept(run) if 0 < step <= common]
            unit = dataclasses.replace(unit, after=None, at=max(starts, default=0))  # it is there: none to wait for
        found.append(unit)
    return tuple(found)


def finished_runs(folder: Path, runs: Sequence[RunConfig]) -> set[str]:
    """The ids of those that have a result in a sweep's folder."""
    return {c.run_id for c in runs if (folder / "runs" / c.run_id / "result.json").exists()}


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder of them."""
    return [int(p.name) for p in folder.glob("*") if p.name.isascii() and p.name.isdigit()]


def common_steps(a: RunConfig, b: RunConfig) -> int:
    """Steps from the beginning on in which two runs of one group do the same: equal rates and weight decays."""
    n = min(a.steps, b.steps)
    differs = np.zeros(n, bool)
    for values in (learning_rates, weight_decays):
        differs |= values(a)[:n] != values(b)[:n]
    return int(np.argmax(differs)) if differs.any() else n


def ledger(units: Sequence[Unit]) -> dict[str, float]:
    """Training FLOPs wanted (each run from its beginning), spent (each unit's own steps), shared (the difference)."""
    wanted, spent = sum(u.config.flops for u in units), sum(u.flops for u in units)
    return {"flops_wanted": wanted, "flops_spent": spent, "flops_shared": wanted - spent}


def write_plan(folder: Path, units: Sequence[Unit], launch: str) -> None:
    """plan.json: what a worker needs to know of the sweep in `folder`; `launch` names this launch."""
    rows = [
        {"id": u.run_id, "config": u.config.to_dict(), "after": u.after, "at": u.at, "saves": list(u.saves)}
        for u in units
    ]
    write_atomically(folder / "plan.json", json.dumps({"launch": launch, "units": rows}) + "\n")


def read_plan(folder: Path) -> tuple[str, tuple[Unit, ...]]:
    """(launch, units) of the sweep in `folder`. Raises InputError where plan.json is not whole."""
    said: dict[str, Any] = read_json(folder / "plan.json")
    try:
        units = tuple(
            Unit(
                RunConfig.from_dict(row["config"]),
                row["after"] and check_run_id(row["after"], folder / "plan.json"),
                int(row["at"]),
                tuple(row["saves"]),
            )
            for row in said["units"]
        )
        return str(said["launch"]), units
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'plan.json'}: not a plan ({error}); launch the sweep again") from None


def sources(unit: Unit, units: Sequence[Unit]) -> list[tuple[str, int]]:
    """(run id, common steps) of every run whose kept states this one may start from, whoever kept them and why."""
    group = same_trunk(unit.config)
    return [
        (other.run_id, common)
        for other in units
        if other.run_id != unit.run_id and same_trunk(other.config) == group
        if (common := common_steps(unit.config, other.config))
    ]
