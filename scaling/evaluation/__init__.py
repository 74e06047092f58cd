"""What is measured on a finished run: one file an evaluation, found by the file's name. No JAX here.

`scaling/evaluation/loss.py` defines the class `Loss(Evaluation)`, and `scaling evaluate RUN loss` asks it. The fields
of the class are its options. An evaluation is no part of a run's identity: it can be added to old runs, and is kept
apart (scaling/evaluate.py).
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from models.errors import InputError
from scaling import by_file

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A pure function of (trained model, seed). Raises InputError where an option or the model is not for it."""

    SUMMARY: ClassVar[str] = ""  #: a line, for the list of evaluations
    COUNTS: ClassVar[tuple[str, ...]] = ("n", "M", "samples")  #: options that are whole numbers of at least 1
    revision: ClassVar[int] = 1  #: raised when the same options would measure something else: what is kept is then old

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """What was measured, by `row`, of the model that `asker` (scaling.evaluation._asker.Asker) asks."""
        raise NotImplementedError


def row(metric: str, value: float, stderr: float, n: int, **axes: float | str) -> Row:
    """One measurement. stderr: standard error of `value`, 0 where it is exact; n: how many things it is a mean over;
    axes: where it was taken, such as k, hops or a budget.
    """
    return {"metric": metric, "value": float(value), "stderr": float(stderr), "n": int(n), **axes}


@functools.cache
def find(name: str, options: str = "") -> Evaluation:
    """The evaluation of a name, with options as a JSON object. Raises InputError for one misspelt, or a count of 0."""
    found = by_file.made(__name__, name, options, "evaluation")
    for count in found.COUNTS:
        value = getattr(found, count, 1)
        if isinstance(value, int) and not 1 <= value < 2**31:
            raise InputError(f"evaluation.options: {count} = {value}: expected a whole number of at least 1")
    return found


def names() -> tuple[str, ...]:
    """The evaluations there are."""
    return by_file.names(__name__)


def class_of(name: str) -> type[Evaluation]:
    """Raises InputError for a misspelt name."""
    return by_file.class_of(__name__, name, "evaluation")
