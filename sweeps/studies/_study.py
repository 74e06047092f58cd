"""What a study is: runs, what is asked of them, and claims that are written down before the first run. No JAX here.

A file sweeps/studies/NAME.py, or one of your own, opens with question, command, cost and result, and has `QUESTION`,
`COST` and a function `study(dial, tiny)` that returns a `Study`. Each claim's `decide` takes the long table of
measurements (sweeps/studies/_measure.py) and returns a `Verdict`; sweeps/studies/_rules.py has the usual ones.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from models.errors import InputError, did_you_mean
from scaling.config import RunConfig, canonical_json
from scaling.evaluate import EvaluationConfig
from scaling.folder import read_json, write_atomically
from scaling.provenance import digest, software
from sweeps.define import Runs, union
from sweeps.definition import defined, names_in

VERDICTS = ("upheld", "refuted", "undecided")
PACKAGE = "sweeps.studies"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
#: What a claim's hash is of.
STATED = ("name", "text", "metric", "axis", "law", "controls", "holdout", "refuted_by")

RESULT = "result"  #: label of what each run brings along: its validation loss

RunFilter = Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Verdict:
    """What came of a claim. `predicted` with its interval [low, high], and `measured`, are of the claim's metric, or of
    the slope, error or difference that its note names; None where there is none.
    """

    name: str
    verdict: str
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    measured: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise InputError(f"verdict {self.verdict!r} of {self.name!r}: expected one of {', '.join(VERDICTS)}")
        for name in ("predicted", "low", "high", "measured"):
            value = getattr(self, name)
            number = None if value is None or not math.isfinite(value) else float(value)
            object.__setattr__(self, name, number)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """What a study expects, in words that are hashed before the first run, and the rule that gives its verdict.

    name, text: what is claimed, short and in a sentence. metric, axis: what is measured, along what. law: its formula,
    or "none". controls: what is measured beside it to tell an effect from an artefact; each has a claim of its own, or
    stands in the note. holdout: what no fit sees. refuted_by: what would refute it, in numbers. decide(measurements):
    the verdict; InputError where the measurements do not suffice, which makes it undecided. runs, evaluations: those
    (by label) that it stands on, where not on all.
    """

    name: str
    text: str
    metric: str
    axis: str
    law: str
    controls: tuple[str, ...]
    holdout: str
    refuted_by: str
    decide: Callable[[pd.DataFrame], Verdict] = field(compare=False, repr=False)
    runs: RunFilter | None = field(default=None, compare=False, repr=False)
    evaluations: tuple[str, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InputError(f"claim {self.name!r}: expected a short name of a-z, 0-9, _ and -")
        object.__setattr__(self, "controls", tuple(self.controls))
        for name in STATED:
            if name != "controls" and not isinstance(getattr(self, name), str):
                raise InputError(f"claim {self.name!r}: {name} = {getattr(self, name)!r}, expected text")
        if not self.refuted_by:
            raise InputError(f"claim {self.name!r}: refuted_by is empty; say what would refute it")

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATED} | {"controls": list(self.controls)}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()


@dataclass(frozen=True)
class EvaluationSpec:
    """What is asked of the runs: an evaluation of scaling/evaluation by name, with its options.

    runs: a filter on their configurations, None for all. label: what its rows are called in the table of measurements
    (column `evaluation`), where one evaluation is asked with several options; by default its name.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    runs: RunFilter | None = field(default=None, compare=False, repr=False)
    label: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "label", self.label or self.name)
        self.config  # noqa: B018  a name or an option that there is not is found here

    @property
    def config(self) -> EvaluationConfig:
        return EvaluationConfig(self.name, canonical_json(dict(self.options)), self.seed)

    def asks(self, config: RunConfig) -> bool:
        return self.runs is None or self.runs(config)


@dataclass(frozen=True)
class Study:
    """A question, the runs to train, what is asked of them, and the claims. Raises InputError where one is missing.

    then(measurements): the second stage of a study whose later runs follow from what the first measured: a pair (runs,
    evaluations), a pure function of the table. table(measurements): heads and rows of text that are printed below the
    verdicts. figures(measurements): caption -> matplotlib figure, for the page.
    """

    name: str
    question: str
    runs: Runs
    evaluations: tuple[EvaluationSpec, ...]
    claims: tuple[Claim, ...]
    then: Callable[[pd.DataFrame], tuple[Runs, tuple[EvaluationSpec, ...]]] | None = None
    table: Callable[[pd.DataFrame], list[tuple[str, ...]]] | None = None
    figures: Callable[[pd.DataFrame], Mapping[str, Any]] | None = None
    definition: Path | None = None  #: the file that it was loaded from

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", union(self.runs))
        object.__setattr__(self, "evaluations", tuple(self.evaluations))
        object.__setattr__(self, "claims", tuple(self.claims))
        if not self.runs or not self.claims:
            raise InputError(f"study {self.name!r}: has no {'claims' if self.runs else 'runs'}; give it at least one")
        names = {
            "claims": [claim.name for claim in self.claims],
            "evaluations (give them labels)": [spec.label for spec in self.evaluations],
        }
        for what, given in names.items():
            if twice := {name for name in given if given.count(name) > 1}:
                raise InputError(f"study {self.name!r}: two {what} are called {sorted(twice)[0]!r}")
        labels = [spec.label for spec in self.evaluations]
        if RESULT in labels:
            raise InputError(f"study {self.name!r}: the label {RESULT!r} is that of a run's own loss; take another")
        for claim in self.claims:
            for label in () if self.then else claim.evaluations or ():
                if label not in labels:
                    there = did_you_mean(label, labels)
                    raise InputError(f"claim {claim.name!r}: no evaluation is called {label!r}{there}")

    def extended(self, runs: Iterable[RunConfig], evaluations: Iterable[EvaluationSpec]) -> "Study":
        """The study with the runs and evaluations of its second stage, and none to follow."""
        both = (*self.evaluations, *evaluations)
        return replace(self, runs=union(self.runs, runs), evaluations=both, then=None)


def load_study(name: str, dial: float | str | None = None) -> tuple[str, Study]:
    """(short name, Study) of a named study in sweeps/studies or of a file NAME.py.

    dial: a number that multiplies the compute by about that, or "tiny", a form of at most 20 s for tests. Raises
    InputError for an unknown name (with the nearest), a file without `study`, one that fails, or another dial.
    """
    tiny = dial == "tiny"
    try:
        multiple = 1.0 if dial is None or tiny else float(dial)
    except ValueError:
        multiple = math.nan
    if not 0 < multiple < math.inf:
        raise InputError(f"--dial {dial}: expected a positive number, which multiplies the study's compute, or tiny")
    short, path, study = defined("study", PACKAGE, name, Study, lambda module: module.study(dial=multiple, tiny=tiny))
    return short, replace(study, definition=path)


def studies() -> list[str]:
    return names_in(PACKAGE)


def write_claims(study: Study, folder: Path, made_with: str) -> None:
    """claims.json: every claim with its hash; left alone where it already holds the same ones.

    made_with: digest of the study's file, so that a rule that changed after the claims were written can be seen. Raises
    InputError where other claims stand there, or where runs were trained before any.
    """
    if written_claims(study, folder):
        return
    claims = [claim.to_dict() | {"sha256": claim.sha256} for claim in study.claims]
    content = {"study": study.name, "question": study.question, "written": datetime.now(UTC).isoformat("T", "seconds")}
    content |= {"commit": software()["commit"], "definition": made_with, "runs": digest_of(study), "claims": claims}
    write_atomically(folder / "claims.json", json.dumps(content, indent=1) + "\n")


def digest_of(study: Study) -> str:
    """Of the runs that are known before any is trained."""
    return digest(" ".join(sorted(config.run_id for config in study.runs)).encode())


def written_claims(study: Study, folder: Path) -> dict[str, Any] | None:
    """What claims.json of the folder says, None where there is none.

    Raises InputError where it holds other claims, or where there is none and a run has been trained.
    """
    path = folder / "claims.json"
    if not path.exists():
        if any(folder.glob("runs/*/result.json")):
            raise InputError(
                f"{folder}: holds runs that were trained before any claims were written; choose another folder with "
                "--out"
            )
        return None
    content = read_json(path)
    there = content.get("claims")
    try:
        hashes = {claim["name"]: claim["sha256"] for claim in there}
    except (TypeError, KeyError):
        raise InputError(f"{path}: holds no list of claims; choose another folder with --out") from None
    own = {claim.name: claim.sha256 for claim in study.claims}
    if changed := sorted(name for name in hashes.keys() | own.keys() if hashes.get(name) != own.get(name)):
        raise InputError(
            f"{path}: other claims were written here before the runs ({', '.join(map(str, changed[:3]))} differ); "
            "they stand: choose another folder with --out"
        )
    return content
