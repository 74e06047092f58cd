"""What came of a run: the content of result.json as a type, checked once, where it is read. No JAX here."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from models.config import ADDED
from models.errors import InputError
from scaling.config import RunConfig
from scaling.fields import fields_of, from_plain
from scaling.folder import read_json


class Flops(NamedTuple):
    """Training FLOPs of a run, by who makes its steps: ancestors + own = whole, and spent + left = own."""

    whole: float  #: from its beginning to its end
    ancestors: float  #: of the steps that it took over from the run it branched from
    own: float  #: of the steps from there to its end
    spent: float  #: of those that were really made: all, or up to where it diverged, or has come so far
    left: float


def flops_by_step(whole: float, steps: int, at: int, done: int) -> Flops:
    """The split for a run of so many steps that took over the first `at` of them and has come to step `done`."""
    a_step, done = whole / steps, max(at, done)
    return Flops(whole, a_step * at, a_step * (steps - at), a_step * (done - at), a_step * (steps - done))


@dataclass(frozen=True)
class RunResult:
    """A run that is over. Raises InputError, naming the field, where the values are no result."""

    run: str  #: id
    status: str  #: finished, or diverged: the loss or the gradient was not finite
    loss: float | None  #: validation cross-entropy after the last step, nats per token; None where diverged
    bits_per_byte: float | None  #: the same per UTF-8 byte
    train_loss: float | None  #: mean over the last 5 % of the steps, nats per token
    steps: int  #: of the whole run
    tokens: int  #: D: trained on in those steps, repeats counted
    unique_tokens: int  #: distinct tokens among them
    n_nonembedding: int
    n_compute: int
    n_total: int
    flops: float  #: training FLOPs of the whole run from its beginning
    valid_tokens: int  #: tokens that the loss is a mean over: those that the objective counts
    corpus: str  #: key of the token store
    flops_validation: float = field(
        default=0.0, metadata=ADDED
    )  #: forward only, of all its validations; not in `flops`
    #: parameters that were trained: all of the model's, or its adapters', and the objective's own; None: `n_total`
    n_trained: int | None = field(default=None, metadata=ADDED)
    flops_reference: float = field(default=0.0, metadata=ADDED)  #: forward, of its parent over its rows; not in `flops`
    flops_parents: float = field(default=0.0, metadata=ADDED)  #: training FLOPs of its parent, that one's parent, ...
    branched_from: str | None = field(default=None, metadata=ADDED)  #: id of the run whose first steps it took over
    branched_at_step: int = field(default=0, metadata=ADDED)  #: how many steps those are
    diverged_at_step: int | None = field(default=None, metadata=ADDED)
    timing: dict[str, int | float] = field(default_factory=dict, metadata=ADDED)  #: seconds and steps, by name
    where: dict[str, int | str] = field(default_factory=dict, metadata=ADDED)  #: device and versions

    def __post_init__(self) -> None:
        if not (self.status == "finished" and self.loss is not None and math.isfinite(self.loss)) and not (
            self.status == "diverged" and self.loss is None
        ):
            raise InputError(f"status {self.status!r} with loss {self.loss!r} is no result")
        for name in ("steps", "tokens", "unique_tokens", "n_nonembedding", "n_compute", "n_total", "flops"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected a number above 0")
        for name in ("branched_at_step", "diverged_at_step"):
            if not 0 <= (getattr(self, name) or 0) <= self.steps:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected a step of 0 to {self.steps}")

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def last_step(self) -> int:
        """The step that it came to."""
        return self.steps if self.diverged_at_step is None else self.diverged_at_step

    @property
    def split(self) -> Flops:
        return flops_by_step(self.flops, self.steps, self.branched_at_step, self.last_step)

    @property
    def flops_6nd(self) -> float:
        return 6.0 * self.n_compute * self.tokens

    @property
    def flops_own(self) -> float:
        return self.split.own

    @property
    def flops_spent(self) -> float:
        return self.split.spent

    @property
    def flops_ancestors(self) -> float:
        return self.split.ancestors

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields, and for readers of the file what follows from them."""
        derived = ("flops_6nd", "flops_own", "flops_spent", "flops_ancestors")
        return {name: getattr(self, name) for name in (*fields_of(RunResult), *derived)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RunResult":
        """The inverse of `to_dict`. Raises InputError for a value that is missing, of another type or out of range;
        what is not a field, as of other versions, is left out.
        """
        return from_plain(RunResult, {name: v for name, v in values.items() if name in fields_of(RunResult)})


def result_of(config: RunConfig, loss: float | None, **facts: Any) -> RunResult:
    """The result of `config`, with what follows from it filled in; a loss of None means that it diverged."""
    known = {
        "run": config.run_id,
        "status": "diverged" if loss is None else "finished",
        "loss": loss,
        "bits_per_byte": None,
        "train_loss": None,
        "steps": config.steps,
        "tokens": config.trained_tokens,
        "unique_tokens": config.trained_tokens,
        **config.counts._asdict(),
        "flops": config.flops,
        "valid_tokens": 0,
        "corpus": "",
    }
    return RunResult(**(known | facts))


def read_result(folder: Path) -> RunResult | None:
    """The result in a run's folder, or None while the run is not over. Raises InputError where it is no result."""
    path = folder / "result.json"
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return RunResult.from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}; remove it and launch again") from None
