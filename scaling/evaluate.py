"""Asking a finished run and keeping what came of it: evaluations/NAME-HASH.json in the run's folder.

The file's name says what was asked, with which options and seed, so an answer is found again and never asked for twice.
No JAX until something is asked.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from models.config import ADDED
from models.errors import InputError
from scaling import evaluation
from scaling.config import canonical_json, canonical_options
from scaling.fields import fields_of, from_plain, shown, to_plain
from scaling.folder import read_config, read_json, set_aside, write_atomically
from scaling.trust import check_links

FOLDER = "evaluations"
Value = int | float | str


@dataclass(frozen=True)
class EvaluationConfig:
    """What is asked of a run. Raises InputError for an evaluation or option that there is not."""

    name: str  #: of a file in scaling/evaluation/
    options: str = ""  #: JSON object of what it takes
    seed: int = 0  #: of what it samples

    def __post_init__(self) -> None:
        given = canonical_options("evaluation.options", self.options, '{"n": 256}')
        made = evaluation.find(self.name, given)
        others = {f.name: getattr(made, f.name) for f in fields(made) if getattr(made, f.name) != f.default}
        object.__setattr__(self, "options", canonical_json(to_plain(others)) if others else "")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise InputError(f"evaluation.seed = {self.seed!r}: expected a whole number from 0 to 2^32 - 1")

    @property
    def key(self) -> str:
        """The name of its file: equal where the same is asked, whether or not a default is spelt out."""
        revision = evaluation.class_of(self.name).revision
        newer = {"revision": revision} if revision > 1 else {}
        text = canonical_json({"options": self.options, "seed": self.seed} | newer)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class EvaluationResult:
    """What came of asking one run."""

    run: str  #: id
    name: str
    options: str
    seed: int
    rows: tuple[dict[str, Value], ...]  #: as scaling.evaluation.row makes them
    flops: float  #: forward, of asking
    seconds: float
    where: dict[str, Value] = field(default_factory=dict, metadata=ADDED)  #: device and versions

    def __post_init__(self) -> None:
        for row in self.rows:
            numbers = [row.get(name) for name in ("value", "stderr", "n")]
            if not isinstance(row.get("metric"), str) or not all(isinstance(x, int | float) for x in numbers):
                raise InputError(f"rows: {shown(row)}: expected metric, value, stderr and n")


def path_of(folder: Path, wanted: EvaluationConfig) -> Path:
    return folder / FOLDER / f"{wanted.key}.json"


def read_evaluation(path: Path) -> EvaluationResult:
    """Raises InputError where the file is not there or not whole."""
    try:
        values = read_json(path)
    except InputError as error:
        raise InputError(f"{str(error).partition(';')[0]}; remove that file and evaluate again") from None
    try:
        return from_plain(EvaluationResult, {k: v for k, v in values.items() if k in fields_of(EvaluationResult)})
    except InputError as error:
        raise InputError(f"{path}: {error}; remove it and evaluate again") from None


def read_evaluations(folder: Path, run: str) -> list[EvaluationResult]:
    """All that this run was asked so far. Raises InputError for a damaged file, one of another run, or a link out."""
    check_links(folder)
    check_links(folder / FOLDER)
    results = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        if not path.name.startswith((".", "damaged-")):
            results.append(read_evaluation(path))
            if results[-1].run != run:
                raise InputError(f"{path}: of run {results[-1].run}, in the folder of {run}; move it away")
    return results


def evaluate(
    folder: Path,
    wanted: EvaluationConfig,
    model: Any = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult:
    """Asks the finished run in `folder` and keeps the answer; one that is kept already is read.

    `model`: the run's, where the caller has loaded it. Raises InputError where the run is not finished, or the
    evaluation is not for it; nothing is written then. Likewise scaling.evaluation._asker.Stopped once `should_stop()`.
    """
    path = path_of(folder, wanted)
    check_links(folder)
    check_links(path.parent)
    if path.exists():
        try:
            if (kept := read_evaluation(path)).run == read_config(folder).run_id:
                return kept
        except InputError:
            pass
        set_aside(path)
    import jax

    from scaling.evaluation._asker import Asker
    from scaling.evaluation._rows import check_source
    from scaling.load import load
    from scaling.provenance import software

    asker, began = Asker(load(folder) if model is None else model, should_stop), time.monotonic()
    question = evaluation.find(wanted.name, wanted.options)
    if hasattr(question, "source"):
        check_source(asker.model, question.source)
    rows = question.rows(asker, wanted.seed)
    result = from_plain(
        EvaluationResult,
        {
            "run": asker.model.config.run_id,
            "name": wanted.name,
            "options": wanted.options,
            "seed": wanted.seed,
            "rows": list(rows),
            "flops": asker.flops,
            "seconds": round(time.monotonic() - began, 3),
            "where": {"device": jax.local_devices()[0].device_kind, **software()},
        },
        "evaluation",
    )
    path.parent.mkdir(exist_ok=True)
    check_links(path.parent)
    write_atomically(path, canonical_json(to_plain(result)) + "\n")
    return result
