"""Which run a worker trains next. The sweep's folder is the queue, and may lie on a slow file system that all share.

So a worker looks at few files: it remembers the runs that are over (a result is for ever), takes the first that is free
in the order of their cost and looks no further, and asks about a run that it could not take the more rarely, the longer
it has asked. over/ in the sweep's folder has an empty file for each run that is over, so that one listing tells of all;
where a file is missing, the run itself is looked at.

A run that takes no longer than its program takes to load is best trained where that is loaded: of such runs a worker
takes first those whose program it has, then those whose program nobody has.
"""

import contextlib
import errno
import functools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from models.errors import InputError
from scaling.alike import same_speed, same_swarm, same_trunk
from scaling.config import RunConfig
from scaling.engine.lease import Busy, Held, Leases, holder, lease
from scaling.failure import Failure
from scaling.result import read_result
from sweeps.launch.attempts import Attempts
from sweeps.plan import Unit, by_group, read_plan, sources, steps_in

SHORTEST, LONGEST = 0.5, 10.0  # seconds between two looks at what could not be taken
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # of a network file system, which may be away for a moment
PATIENCE = 60.0  # seconds that such an error lasts before it counts as an attempt at a run
LOOKS = 10  # in the time that something has been waited for, between these bounds
NOTHING, LATER = -1, -2
HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
MEMORY_SHARE = 0.9  # of it, for all workers together; the bytes of a run are an estimate
SHORT = 3e10  # FLOPs that take no longer, on a core, than a program takes to load
SMALL = 0.02  # of it: runs below are not counted, as no machine has so many cores for so little memory


class Queue:
    """The runs of a sweep's folder, as one worker sees them. `clock`: seconds, monotonic."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock = folder, clock
        self.over: set[str] = set()  # runs that have a result
        self.finished: set[str] = set()  # of these, those that others need and that have not diverged
        self.numbers: dict[RunConfig, int] = {}  # of programs, by what makes their steps alike
        self.compiled: set[int] = set()  # programs that this worker has ready
        self.refusals: list[tuple[str, Failure]] = []  # runs found not to be trainable, not reported yet
        self.troubled: dict[str, float] = {}  # runs whose folder could not be used at the last look: since when
        self.idle_since: float | None = None
        self.read = plan_state(folder)  # the state of the plan last read here
        self.follow(*read_plan(folder))

    def follow(self, launch: str, units: Sequence[Unit]) -> None:
        self.launch, self.units = launch, tuple(units)
        self.by_id = {unit.run_id: unit for unit in units}
        self.programs = [self.numbers.setdefault(same_speed(u.config), len(self.numbers)) for u in units]
        self.groups = by_group(units)
        self.order = sorted(range(len(units)), key=lambda i: -units[i].flops)
        self.attempts = Attempts(self.folder / "runs", launch)
        self.given_up: dict[str, Failure] = {}  # by this launch, as far as seen
        self.kept: dict[str, set[int]] = {}  # the steps at which a trunk's state is kept, as far as seen
        self.looks: dict[str, tuple[float, float]] = {}  # of what could not be taken: when first and last looked at
        #: equal on hosts that follow one plan; small, as hosts tell each other whole numbers below 2^24
        self.number = zlib.crc32(" ".join([launch, *self.by_id]).encode()) % 2**24

    def refresh(self) -> None:
        """Takes over what another launch has added to the plan since; runs that it no longer has stay in the queue."""
        state = plan_state(self.folder)
        if state == self.read:
            return
        with contextlib.suppress(InputError):  # removed or damaged: the plan at hand is still good
            launch, units = read_plan(self.folder)
            named = {unit.run_id for unit in units}
            self.follow(launch, [*units, *(unit for unit in self.units if unit.run_id not in named)])
        self.read = state

    def reread(self) -> None:
        """Follows the plan as it is now and nothing else: for hosts that have seen different ones."""
        with contextlib.suppress(InputError):
            self.follow(*read_plan(self.folder))

    def folder_of(self, run: str) -> Path:
        return self.folder / "runs" / run

    def sources(self, unit: Unit) -> list[tuple[Path, int]]:
        """(folder, common steps) of the runs whose kept states this one may start from."""
        group = self.groups[same_trunk(unit.config)]
        return [(self.folder_of(run), common) for run, common in sources(unit, group)]

    def choose(self, stack: contextlib.ExitStack, leases: Leases) -> tuple[int, Held | None]:
        """(index, lease) of a unit that is ready, held until `stack` ends; LATER, where others hold what is left, or
        NOTHING.
        """
        with contextlib.suppress(OSError):
            self.over.update(self.by_id.keys() & os.listdir(self.folder / "over"))
        waiting = self.open_units()
        while waiting:
            for i in sorted(waiting, key=functools.partial(self.loads, self.begun(waiting))):  # else the dearest first
                unit = self.units[i]
                if reason := self.unmet(unit):
                    self.refuse(unit.run_id, reason)
                    continue
                worth = self.ready(unit) and self.due(unit.run_id)
                if worth and (held := self.take(unit, stack, leases, alone=True)):
                    self.compiled.add(self.programs[i])
                    self.idle_since = None
                    del self.looks[unit.run_id]
                    return i, held
            before, waiting = waiting, self.open_units()
            if waiting == before:  # else others may be ready now that these have been seen to be over
                break
        if self.idle_since is None:
            self.idle_since = self.clock()
        return LATER if waiting else NOTHING, None

    def pause(self) -> float:
        """Seconds until it is worth choosing again."""
        return interval(0.0 if self.idle_since is None else self.clock() - self.idle_since)

    def open_units(self) -> list[int]:
        return [i for i in self.order if not self.ended(self.units[i].run_id)]

    def ended(self, run: str) -> bool:
        """Whether this launch does no more for a run, as far as has been seen."""
        return run in self.over or run in self.given_up

    def begun(self, waiting: Iterable[int]) -> set[int]:
        """The programs of runs that someone has begun: looked up where one of those waiting is short."""
        if not any(self.units[i].flops < SHORT for i in waiting):
            return set()
        names: set[str] = set()
        with contextlib.suppress(OSError):  # not there yet, or away for a moment: the order is all that hangs on it
            names.update(os.listdir(self.folder / "runs"))
        return {program for unit, program in zip(self.units, self.programs, strict=True) if unit.run_id in names}

    def loads(self, begun: set[int], i: int) -> int:
        """What a unit would have this worker load for it, the less the better; 0 where the unit is long."""
        unit, program = self.units[i], self.programs[i]
        if program in self.compiled or (unit.flops >= SHORT and unit.after is None):
            return 0
        return 2 if unit.after is not None or program in begun else 1  # better another's that has it loaded

    def unmet(self, unit: Unit) -> str:
        """Why a run that this one needs will never be there to start from; empty where it is or may be yet."""
        for run in unit.needs:
            if run in self.given_up:
                never = self.given_up[run].reason.startswith("needs run ")
                return f"needs run {run}, which {'was not trained' if never else 'failed'}"
            if run not in self.by_id and not self.is_over(run):
                return f"needs run {run}, which is not in this sweep"
            if run in self.over and run not in self.finished:
                try:
                    result = read_result(self.folder_of(run))
                except InputError:
                    result = None
                if result is None or not result.finished:
                    return f"needs run {run}, which {'has no readable result' if result is None else 'diverged'}"
                self.finished.add(run)
        return ""

    def ready(self, unit: Unit) -> bool:
        """Whether what it needs has finished, and the state that it begins from is kept, or will never be."""
        trunk = unit.after
        if not all(run in self.over for run in unit.needs):
            return False
        if trunk is None or trunk not in self.by_id or self.ended(trunk) or unit.at in self.kept.get(trunk, ()):
            return True
        if self.due(f"{trunk}/branches"):
            self.kept[trunk] = set(steps_in(self.folder_of(trunk) / "branches"))
        return unit.at in self.kept.get(trunk, ())

    def due(self, what: str) -> bool:
        """Whether it is time to look at it again, and notes that it is looked at."""
        now = self.clock()
        first, last = self.looks.get(what, (now, None))
        if last is not None and now - last < interval(last - first):
            return False
        self.looks[what] = first, now
        return True

    def take(self, unit: Unit, stack: contextlib.ExitStack, leases: Leases, alone: bool = False) -> Held | None:
        """The lease of a run that nobody holds and that is not over; `alone`: in memory beside others' runs."""
        run, folder, memory = unit.run_id, self.folder_of(unit.run_id), None
        try:
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                names = []
            if "result.json" in names:
                self.mark_over(run)
                return None
            if "failed.json" in names and (failure := self.attempts.of(run)).final:
                self.given_up[run] = failure
                return None
            if alone:
                memory = unit.config.training_bytes
                if not self.fits(memory):
                    return None
            held = stack.enter_context(lease(folder, leases=leases, memory=memory))
        except Busy:
            self.troubled.pop(run, None)
            return None
        except OSError as error:  # this run's folder is at fault, or the disk: the others may still be trained
            since = self.troubled.setdefault(run, self.clock())
            if error.errno not in PASSING or self.clock() - since >= PATIENCE:
                self.refuse(run, f"its folder cannot be used: {error}", final=False)
            return None
        self.troubled.pop(run, None)
        return None if self.is_over(run) else held  # by another, before it let go

    def peers(self, unit: Unit, stack: contextlib.ExitStack, leases: Leases) -> list[tuple[Unit, Held]]:
        """Units of the shape and length of `unit` that are ready, each held until `stack` ends: as many as fit."""
        from scaling.engine.swarm import capacity

        def alike(other: Unit) -> bool:
            same = (other.config.steps, other.at) == (unit.config.steps, unit.at)
            return same and other is not unit and same_swarm(other.config) == same_swarm(unit.config)

        def untried(other: Unit) -> bool:  # what failed in a swarm is tried alone
            return self.attempts.of(other.run_id).attempts == 0

        team: list[tuple[Unit, Held]] = []
        room = capacity(unit.config) - 1 if untried(unit) else 0
        for other in (self.units[i] for i in self.open_units()):
            if len(team) == room:
                break
            fits = alike(other) and not self.unmet(other) and self.ready(other) and untried(other)
            if fits and (held := self.take(other, stack, leases)) is not None:
                team.append((other, held))
        return team

    def fits(self, memory: int) -> bool:
        """Whether a run of so many bytes goes beside those that this machine trains now, or nothing else is trained."""
        if memory < SMALL * HOST_MEMORY:
            return True
        begun = [run for run in os.listdir(self.folder / "runs") if run in self.by_id and not self.ended(run)]
        holders = filter(None, (holder(self.folder_of(run)) for run in begun))
        others = sum(record.get("bytes") or 0 for record in holders if record["here"])
        return others == 0 or memory + others <= MEMORY_SHARE * HOST_MEMORY

    def is_over(self, run: str) -> bool:
        """Whether the run is over, looking now."""
        # os.path, unlike Path, says no where a folder cannot be looked into.
        if run not in self.over and os.path.exists(self.folder_of(run) / "result.json"):
            self.mark_over(run)
        return run in self.over

    def mark_over(self, run: str) -> None:
        self.over.add(run)
        mark(self.folder, [run])

    def failed(self, run: str, reason: str, before: int, final: bool = False) -> Failure:
        """Records an attempt in vain, after `before` others."""
        failure = self.attempts.add(run, reason, before, final)
        if failure.final:
            self.given_up[run] = failure
        return failure

    def refuse(self, run: str, reason: str, final: bool = True) -> None:
        """Records that a run could not be begun; once it is given up for that, it is one to report."""
        failure = self.failed(run, reason, self.attempts.of(run).attempts, final)
        if failure.final:
            self.refusals.append((run, failure))


def interval(waited: float) -> float:
    """Seconds between two looks at what has been waited for so long."""
    return min(max(waited / LOOKS, SHORTEST), LONGEST)


def mark(folder: Path, runs: Iterable[str]) -> None:
    """Notes in over/ that these runs are over. Of no weight: what cannot be written is looked up."""
    with contextlib.suppress(OSError):
        (folder / "over").mkdir(exist_ok=True)
        for run in runs:
            os.close(os.open(folder / "over" / run, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666))


def unmark(folder: Path, runs: Iterable[str]) -> None:
    """Takes back marks of runs that are not over: their results were removed."""
    with contextlib.suppress(OSError):
        for run in set(os.listdir(folder / "over")).intersection(runs):
            (folder / "over" / run).unlink(missing_ok=True)


def plan_state(folder: Path) -> tuple[int, int] | None:
    """Changes whenever plan.json is written anew; None where it is not there."""
    with contextlib.suppress(OSError):
        state = os.stat(folder / "plan.json")
        return state.st_ino, state.st_mtime_ns
    return None
