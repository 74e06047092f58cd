"""Which run a worker asks next: evaluations are queued as runs are, held by a lease, and what failed is counted.

The lease is on evaluations/ in the run's folder, so that one process asks a run, which it loads once, all that is open.
An attempt is counted before it is made: one that ends its process counts as well.
"""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import InputError
from scaling.config import canonical_json
from scaling.engine.lease import Busy, Leases, lease
from scaling.evaluate import FOLDER, EvaluationConfig, evaluate, path_of
from scaling.folder import read_json, write_atomically
from scaling.result import read_result
from scaling.trust import check_links
from sweeps.asking import pairs, read_wanted
from sweeps.folder import read_description
from sweeps.launch.attempts import ATTEMPTS

KILLED = "ended its process"


@dataclass(frozen=True)
class Attempt:
    reason: str = ""
    count: int = 0
    final: bool = False


def attempt_path(folder: Path, evaluation: EvaluationConfig) -> Path:
    return path_of(folder, evaluation).with_suffix(".failed")


def read_attempt(folder: Path, evaluation: EvaluationConfig, launch: str) -> Attempt:
    """What this launch has tried in vain. Of no weight: a file that is damaged counts as none."""
    with contextlib.suppress(InputError):
        fields = read_json(attempt_path(folder, evaluation))
        reason, count = fields.get("reason"), fields.get("count")
        if fields.get("launch") == launch and isinstance(reason, str) and type(count) is int:
            return Attempt(reason, count, fields.get("final") is True or count >= ATTEMPTS)
    return Attempt()


def write_attempt(folder: Path, evaluation: EvaluationConfig, launch: str, attempt: Attempt) -> None:
    fields = {"launch": launch, "reason": attempt.reason, "count": attempt.count, "final": attempt.final}
    write_atomically(attempt_path(folder, evaluation), canonical_json(fields))


@dataclass(frozen=True)
class Open:
    """How the evaluations of a sweep stand."""

    wanted: int  #: of runs that are finished
    answered: int
    failed: dict[tuple[str, str], str]  #: (run, key of the evaluation) -> reason, of those not tried again
    asked: dict[str, int] = field(default_factory=dict)  #: key of the evaluation -> of how many runs it is wanted

    @property
    def left(self) -> int:
        return self.wanted - self.answered - len(self.failed)


NONE = Open(0, 0, {})


class Asking:
    """What is to be asked in a sweep's folder, as one process sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launch = folder, ""
        self.done: set[tuple[str, str]] = set()
        self.finished: dict[str, bool] = {}  # of runs that are over: whether they finished
        self.refused: dict[tuple[str, str], str] = {}  # of runs in whose folder nothing may or can be written

    def wanted(self) -> list[tuple[str, EvaluationConfig]]:
        """All that is to be asked of the finished runs."""
        wanted = read_wanted(self.folder)
        self.launch = wanted.launch
        if not wanted.asked:
            return []
        return pairs(wanted.asked, filter(self.is_finished, read_description(self.folder).runs))

    def is_finished(self, run: str) -> bool:
        if run not in self.finished:
            with contextlib.suppress(InputError):
                if (result := read_result(self.folder / "runs" / run)) is not None:
                    self.finished[run] = result.finished
        return self.finished.get(run, False)

    def is_answered(self, run: str, evaluation: EvaluationConfig) -> bool:
        if (run, evaluation.key) not in self.done and path_of(self.folder / "runs" / run, evaluation).exists():
            self.done.add((run, evaluation.key))
        return (run, evaluation.key) in self.done

    def standing(self) -> Open:
        wanted, failed = self.wanted(), {}
        for run, evaluation in wanted:
            if not self.is_answered(run, evaluation) and (attempt := self.last(run, evaluation)).final:
                failed[run, evaluation.key] = attempt.reason
        answered = sum((run, e.key) in self.done for run, e in wanted)
        return Open(len(wanted), answered, failed, Counter(e.key for _, e in wanted))

    def last(self, run: str, evaluation: EvaluationConfig) -> Attempt:
        folder = self.folder / "runs" / run
        try:
            check_links(folder)
            check_links(folder / FOLDER)
        except InputError as error:
            return Attempt(str(error), ATTEMPTS, True)
        if reason := self.refused.get((run, evaluation.key)):
            return Attempt(reason, ATTEMPTS, True)
        return read_attempt(self.folder / "runs" / run, evaluation, self.launch)

    def is_open(self, run: str, evaluation: EvaluationConfig) -> bool:
        """Whether it is neither answered nor given up."""
        return not self.is_answered(run, evaluation) and not self.last(run, evaluation).final

    def choose(self, stack: contextlib.ExitStack, leases: Leases) -> tuple[str, list[EvaluationConfig]] | None:
        """(run, what to ask it), held until `stack` ends; None where nothing is open that nobody else asks."""
        for run, group in itertools.groupby(self.wanted(), key=lambda pair: pair[0]):
            folder, evaluations = self.folder / "runs" / run, [e for _, e in group if self.is_open(run, e)]
            if not evaluations:
                continue
            try:
                check_links(folder)
                (folder / FOLDER).mkdir(exist_ok=True)
                check_links(folder / FOLDER)
                stack.enter_context(lease(folder / FOLDER, leases=leases))
            except Busy:
                continue
            except (OSError, InputError) as error:
                for evaluation in evaluations:
                    self.refused[run, evaluation.key] = str(error)
                continue
            if left := [e for e in evaluations if self.is_open(run, e)]:
                return run, left
        return None

    def note(self, run: str, evaluation: EvaluationConfig, attempt: Attempt) -> None:
        with contextlib.suppress(OSError):
            write_attempt(self.folder / "runs" / run, evaluation, self.launch, attempt)

    def ask(
        self, run: str, evaluations: list[EvaluationConfig], say: Callable[..., None], stop: Callable[[], bool]
    ) -> None:
        """Asks a run that this process holds. What goes wrong is recorded, said, and leaves others alone."""
        from scaling.evaluation._asker import Stopped
        from scaling.load import load

        folder, model = self.folder / "runs" / run, None
        for evaluation in evaluations:
            if stop():
                return
            before = self.last(run, evaluation).count
            self.note(run, evaluation, Attempt(KILLED, before + 1))
            try:
                model = load(folder) if model is None else model
                result = evaluate(folder, evaluation, model, stop)
            except Stopped:  # which is no fault of the evaluation's
                self.note(run, evaluation, Attempt(KILLED, before))
                return
            except Exception as error:
                final = isinstance(error, InputError) or before + 1 >= ATTEMPTS
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                reason = (reason.splitlines() or [type(error).__name__])[0]
                self.note(run, evaluation, Attempt(reason, before + 1, final))
                say("unanswered", run=run, evaluation=evaluation.key, reason=reason, again=not final)
                continue
            with contextlib.suppress(OSError):
                os.unlink(attempt_path(folder, evaluation))
            self.done.add((run, evaluation.key))
            say("answered", run=run, evaluation=evaluation.key, seconds=result.seconds, flops=result.flops)
