"""The ledger of attempts: how often a launch has tried each run in vain, whichever engine's worker it was.

It stands in the run's folder, as failed.json, so every worker and every launcher counts the same attempts. A launch has
its own count: launched again, a run that failed is tried again.
"""

from pathlib import Path

from scaling.failure import Failure, read_failure, write_failure

ATTEMPTS = 3  # of a run in one launch that raises or loses its worker; bad input and divergence are not tried again
UNTRIED = Failure("", 0)


class Attempts:
    """The attempts of one launch at the runs in `runs`, a sweep's folder of them."""

    def __init__(self, runs: Path, launch: str) -> None:
        self.runs, self.launch = runs, launch
        self.unwritten: dict[str, Failure] = {}  # of runs whose folder cannot be written

    def of(self, run: str) -> Failure:
        """This launch's last failure of a run; `UNTRIED` where there was none."""
        kept = read_failure(self.runs / run)
        here = self.unwritten.get(run, UNTRIED)
        return kept if kept is not None and kept.launch == self.launch and kept.attempts >= here.attempts else here

    def add(self, run: str, reason: str, before: int, final: bool = False) -> Failure:
        """Records one more failed attempt, after `before` others. `final`: another attempt would fail as well."""
        failure = Failure(reason, before + 1, self.launch, final or before + 1 >= ATTEMPTS)
        try:
            write_failure(self.runs / run, failure)
        except OSError:
            self.unwritten[run] = failure
        return failure
