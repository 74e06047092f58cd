"""The states of a run on disk: where it begins, its newest checkpoints, and those that it keeps for other runs.

On several hosts the first one looks and decides, as a file server may show them different things.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import InputError
from scaling.config import canonical_json
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.hosts import agree, first_host
from scaling.engine.recorder import Recorder
from scaling.folder import read_json, set_aside, write_atomically

BRANCHES = "branches"


@dataclass(frozen=True)
class Sharing:
    """What a run leaves for runs that begin as it does, and where it may find the same. None of it changes a result."""

    saves: tuple[int, ...] = ()  #: steps at which the state is kept, in branches/
    sources: tuple[tuple[Path, int], ...] = ()  #: (a run's folder, steps that this run has in common with it)


ALONE = Sharing()


class States:
    def __init__(self, recorder: Recorder, keep: int, sharing: Sharing, report: Callable[[str], None]) -> None:
        self.recorder, self.folder, self.sharing, self.report = recorder, recorder.folder, sharing, report
        self.newest = Checkpointer(self.folder / "checkpoints", keep)
        self.kept = Checkpointer(self.folder / BRANCHES, None)
        self.branch: dict[str, Any] = {}  # what branch.json holds: the run and the step that this one continues from
        self.saved = 0  # the step of the run's own newest checkpoint

    def begin(self, abstract: Any) -> tuple[int, Any] | None:
        """(steps done, state): from the newest whole checkpoint, else from a trunk; None where there is neither."""
        return self.restored(abstract) or self.from_trunk(abstract)

    def restored(self, abstract: Any) -> tuple[int, Any] | None:
        """(steps done, state) from the run's own newest whole checkpoint."""
        restored = self.newest.restore(abstract, self.report)
        if restored is None:
            return None
        step, state = restored
        if self.curve_read(step, self.folder):
            self.saved, self.branch = step, self.recorded_branch(step)
            self.report(f"continuing from step {step} of {self.recorder.feed.config.steps}")
            return step, state
        self.report(f"the curve up to step {step} is missing or damaged; starting from the beginning")
        if first_host():
            self.newest.clear()
        agree(0)
        return None

    def curve_read(self, step: int, folder: Path) -> bool:
        """Whether the first host, which writes the curve, has read it up to `step`; if not, none has read anything."""
        curve = self.recorder.curve
        if agree(curve.read(step, folder / curve.path.name))[0, 0]:
            return True
        curve.steps, curve.valid_loss = 0, {}
        return False

    def recorded_branch(self, step: int) -> dict[str, Any]:
        """The content of branch.json. One that is damaged is set aside and made again: from what trunks keep now."""
        path = self.folder / "branch.json"
        if not first_host() or not path.exists():
            return {}
        try:
            branch = read_json(path)
            if isinstance(branch.get("from"), str) and type(branch.get("at")) is int and 0 < branch["at"] <= step:
                return branch
        except InputError:
            pass
        set_aside(path)
        candidates = [(at, folder) for at, folder in self.trunk_states() if at <= step]
        branch = {"from": candidates[0][1].name, "at": candidates[0][0]} if candidates else {}
        if branch:
            write_atomically(path, canonical_json(branch))
        self.report(f"{path.name} was damaged and is set aside; {'made again' if branch else 'counted as no branch'}")
        return branch

    def trunk_states(self) -> list[tuple[int, Path]]:
        """(step, the folder of the run that keeps it) of the states that this run has in common, the latest first."""
        states = [
            (step, i)
            for i, (folder, common) in enumerate(self.sharing.sources)
            for step in Checkpointer(folder / BRANCHES, None).steps()
            if 0 < step <= common
        ]
        return [(step, self.sharing.sources[i][0]) for step, i in sorted(states, reverse=True)]

    def from_trunk(self, abstract: Any) -> tuple[int, Any] | None:
        """(steps done, state) from the latest state that another run kept of the steps that both have in common."""
        folders = [folder for folder, _ in self.sharing.sources]
        # A trunk may be keeping another state at this moment.
        states = [(step, folders.index(folder)) for step, folder in self.trunk_states()] if first_host() else []
        for n in range(int(agree(len(states))[0, 0])):
            step, i = (int(x) for x in agree(*(states[n] if first_host() else (0, 0)))[0])
            trunk = Checkpointer(folders[i] / BRANCHES, None)
            state = trunk.restore_step(step, abstract, self.report)
            if state is None:
                continue
            if self.curve_read(step, folders[i]):
                self.branch = {"from": folders[i].name, "at": step}
                if first_host():
                    write_atomically(self.folder / "branch.json", canonical_json(self.branch))
                self.report(f"branching from step {step} of run {folders[i].name}")
                return step, state
        if first_host():
            (self.folder / "branch.json").unlink(missing_ok=True)
        return None

    def save(self, step: int, state: Any) -> None:
        if step == self.saved:  # resumed there: orbax takes no step twice
            return
        self.recorder.write_curve()
        self.kept.close()  # a run that goes on from here has passed its branches: they must be whole
        self.newest.save(step, state)
        self.saved = step

    def keep(self, step: int, state: Any) -> None:
        """Keeps the state as of `step` for runs that branch here; they read the curve up to it as well."""
        if not agree(step in self.kept.steps())[0, 0]:
            self.recorder.write_curve()
            self.kept.save(step, state)

    def clear(self) -> None:
        """Removes the checkpoints of a run that diverged."""
        self.newest.close()
        self.recorder.check_held()
        if first_host():
            self.newest.clear()

    def close(self) -> None:
        """Waits until all is on disk."""
        try:
            self.kept.close()
        finally:
            self.newest.close()
