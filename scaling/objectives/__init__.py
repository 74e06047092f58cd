"""What a step minimises: one file an objective, found by the file's name. No JAX here.

`scaling/objectives/answers_only.py` defines the class `AnswersOnly(Objective)`, and `objective.name = "answers_only"`
in a configuration chooses it. The fields of the class are its options.
"""

import dataclasses
import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from models.errors import InputError, did_you_mean
from scaling.fields import fields_of, from_plain


@dataclass(frozen=True)
class Objective:
    """Hashable, and part of the compiled program's key: equal objectives share a program.

    `apply` is the model (scaling.engine.program.Apply), `frozen` a tree of arrays that are not trained (empty unless a
    run has any), `batch` a tree of arrays with leading axis B, `key` a PRNG key of the step, None unless `random`.
    Where a batch is accumulated in parts, objective and metrics are means over the parts.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)  #: names of the scalars of a step: columns of curve.parquet
    flops_factor: ClassVar[float] = 1.0  #: training FLOPs, as a multiple of next token's on the same tokens
    random: ClassVar[bool] = False  #: whether `loss` takes a key
    weighted_by: ClassVar[str | None] = None  #: the metric that says how much of a step its loss is a mean over

    def loss(self, apply: Any, params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        """(what is minimised, metrics by name), scalars; for next tokens means over the batch, in nats."""
        raise NotImplementedError

    def losses(self, apply: Any, params: Any, frozen: Any, batch: Any) -> Any:
        """Losses [B, ...] of a validation batch, whose sum over `counted` is the run's loss."""
        raise NotImplementedError

    def counted(self, batch: Any) -> float:
        """How many losses of a validation batch (NumPy arrays) count."""
        raise NotImplementedError

    def columns(self, tokens: np.ndarray, store: Any) -> dict[str, np.ndarray]:
        """What a batch holds besides its tokens: arrays over the positions of a split of the corpus, named by what they
        are in the batch. A name that ends in T has T values of a window from its first input on; bool becomes float32.

        Raises InputError where the corpus does not have it.
        """
        return {}

    def whole(self, batch: Any) -> Any:
        """The batch after what must be known of all of it, before it is accumulated in parts."""
        return batch


@functools.cache
def names() -> tuple[str, ...]:
    """The objectives there are."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")))


def check_name(name: str) -> None:
    """Raises InputError where there is no objective of this name."""
    if name not in names():
        raise InputError(
            f"objective.name = {name!r}: expected one of {', '.join(names())}{did_you_mean(str(name), names())}"
        )


@functools.cache
def find(name: str, options: str = "") -> Objective:
    """The objective of a name, with options as a JSON object. Raises InputError for a misspelt one."""
    check_name(name)
    kind = getattr(importlib.import_module(f"scaling.objectives.{name}"), name.title().replace("_", ""))
    try:
        values = json.loads(options or "{}")
    except ValueError:
        values = None
    fields = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(values, dict):
        raise InputError(f"objective.options = {options!r}: expected a JSON object of {', '.join(fields) or 'nothing'}")
    for field in values:
        if field not in fields:
            expected = ", ".join(fields) or "no options"
            raise InputError(
                f"objective.options: {name} has no {field!r}, expected {expected}{did_you_mean(field, fields)}"
            )
    return kind(
        **{name: from_plain(fields_of(kind)[name][1], v, f"objective.options {name}") for name, v in values.items()}
    )
