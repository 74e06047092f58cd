"""Conducts a study: claims written, runs trained, asked, judged, shown. Launched again it does only what is missing.

In the study's folder, which is that of a sweep: claims.json (before the first run), runs/, measurements.csv,
verdicts.json and study.html.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import InputError as AnalysisInputError
from analysis.files import inside, write_text
from analysis.text import text_table
from models.errors import InputError
from scaling.execution import Execution
from scaling.folder import read_json, write_atomically
from scaling.provenance import digest
from scaling.trust import check_links, hooks
from sweeps.asking import Asked, ask
from sweeps.cost import duration
from sweeps.define import Sweep
from sweeps.folder import seconds_of_launches
from sweeps.launch import local
from sweeps.launch.asking import Asking
from sweeps.launch.engine import worker_command
from sweeps.launch.prepare import prepare, write_launch
from sweeps.plan import finished_runs
from sweeps.studies._measure import Measured, measure
from sweeps.studies._study import Claim, EvaluationSpec, Study, Verdict, digest_of, write_claims, written_claims
from sweeps.summary import describe

SHOWN = 3  # most failed runs that a note names


@dataclass(frozen=True)
class Outcome:
    """What came of a study, with its cost: wall-clock seconds, and FLOPs of training and of asking."""

    name: str
    question: str
    seconds: float
    flops: float
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]  #: heads and rows of the study's own table
    whole: bool  #: whether every run and every evaluation that was asked is there

    def to_dict(self) -> dict[str, Any]:
        claims = [verdict.to_dict() for verdict in self.verdicts]
        return {"name": self.name, "seconds": self.seconds, "flops": self.flops, "claims": claims}


def conduct(
    name: str,
    study: Study,
    folder: Path,
    workers: int | None = None,
    show: Callable[[local.State, str], None] = lambda state, line: None,
) -> Outcome:
    """Trains, asks, judges, and writes the study's files. Raises InputError before anything is trained where the folder
    holds other claims, or a run cannot be trained.
    """
    began = time.monotonic()
    notes = []
    made_with = digest(b"".join(path.read_bytes() for path in rules_of(study)))
    written = written_claims(study, folder)
    if written and written.get("runs", digest_of(study)) != digest_of(study):
        notes.append(
            "the study has other runs than when its claims were written, as of another dial; seconds are of both"
        )
    if written and written.get("definition") != made_with:
        notes.append("the study's rules have changed since its claims were written")
    earlier, cost_before = seconds_of_launches(folder), cost_of(folder)
    trained, measured = stage(name, study, folder, workers, show, made_with)
    if study.then is not None and not measured.lacking:
        try:
            study = study.extended(*study.then(measured.table))
        except (InputError, AnalysisInputError) as error:
            raise InputError(f"study {name!r}: its second stage cannot be planned: {error}") from None
        except Exception as error:
            raise InputError(f"study {name!r}: its second stage failed with {type(error).__name__}: {error}") from None
        more, measured = stage(name, study, folder, workers, show, made_with)
        trained += more
    elif study.then is not None:
        notes.append("the second stage was not begun, as the first is not whole")
        study = replace(study, claims=tuple(replace(claim, runs=None, evaluations=None) for claim in study.claims))
    verdicts = tuple(judged(claim, study, measured) for claim in study.claims)
    shown = drawn("table", study.table, (), measured, notes)
    figures = drawn("figures", study.figures, {}, measured, notes)
    spent = time.monotonic() - began + sum(earlier)
    outcome = Outcome(
        name=name,
        question=study.question,
        seconds=round(spent if trained or cost_before is None else cost_before, 1),
        flops=describe(folder)["flops"] + measured.flops,
        verdicts=verdicts,
        notes=tuple(notes),
        table=tuple(tuple(map(str, row)) for row in shown),
        whole=not measured.lacking,
    )
    keep(outcome, study, measured, folder, figures)
    return outcome


def drawn(what: str, make: Callable[[pd.DataFrame], Any] | None, nothing: Any, measured: Measured, notes: list[str]):
    """A study's table or figures; nothing, and a note, where it cannot be made: the verdicts are not lost to it."""
    if make is None or (measured.lacking and not len(measured.table)):
        return nothing
    try:
        return make(measured.table)
    except Exception as error:
        notes.append(f"no {what}: {type(error).__name__}: {error}")
        return nothing


def stage(name, study, folder, workers, show, made_with: str) -> tuple[int, Measured]:
    """(how many runs and evaluations were missing, what is measured) once all that is known of both is made."""
    sweep = Sweep(study.runs, definition=study.definition)
    prepare(name, sweep, folder)
    write_claims(study, folder, made_with)
    ask(folder, [Asked(spec.config, runs) for spec in study.evaluations if (runs := asked_of(spec, study))])
    missing = len(sweep.runs) - len(finished_runs(folder, sweep.runs)) + Asking(folder).standing().left
    if missing:
        units = write_launch(sweep, folder, Execution())
        local.run_pool(units, folder, worker_command(folder, hooks(sweep.runs)), workers, show)
    return missing, measure(folder, study.runs, study.evaluations)


def asked_of(spec: EvaluationSpec, study: Study) -> tuple[str, ...]:
    return tuple(config.run_id for config in study.runs if spec.asks(config))


def rules_of(study: Study) -> list[Path]:
    """The files that say how a study is judged: its own, and those that the studies share."""
    shared = sorted(Path(__file__).parent.glob("_*.py"))
    return [*shared, *([study.definition] if study.definition else [])]


def judged(claim: Claim, study: Study, measured: Measured) -> Verdict:
    """The verdict by the claim's rule; undecided, with what numbers there are, where a run it stands on is lacking."""
    used = [c.run_id for c in study.runs if claim.runs is None or claim.runs(c)]
    lacking = {run: why for run in used if (why := measured.why(run, claim.evaluations))}
    rows = measured.table[measured.table["run"].isin(used)]
    try:
        verdict = claim.decide(rows)
    except (InputError, AnalysisInputError) as error:
        verdict = Verdict(claim.name, "undecided", note=str(error))
    except Exception as error:  # a rule of someone's own: the other claims' verdicts are not lost to it
        verdict = Verdict(claim.name, "undecided", note=f"its rule failed with {type(error).__name__}: {error}")
    if not isinstance(verdict, Verdict):
        verdict = Verdict(claim.name, "undecided", note=f"its rule returned {type(verdict).__name__}, no Verdict")
    if lacking:
        named = "; ".join(f"run {run}: {why}" for run, why in list(lacking.items())[:SHOWN])
        more = "; ..." if len(lacking) > SHOWN else ""
        note = f"{len(lacking)} of {len(used)} runs are lacking ({named}{more})"
        verdict = replace(verdict, verdict="undecided", note=note)
    return replace(verdict, name=claim.name)


def keep(outcome: Outcome, study: Study, measured: Measured, folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes measurements.csv, verdicts.json, study.html, and its figures as files too: figures/1.png, 2.png, ..."""
    from analysis.report.study import write_study

    (folder / "figures").mkdir(exist_ok=True)
    check_links(folder / "figures")
    for i, figure in enumerate(figures.values(), start=1):
        figure.savefig(inside(folder / "figures", f"{i}.png"), dpi=110)

    write_text(inside(folder, "measurements.csv"), telling(measured.table).to_csv(index=False))
    content = outcome.to_dict() | {"notes": list(outcome.notes), "whole": outcome.whole}
    write_atomically(folder / "verdicts.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_study(
        inside(folder, "study.html"),
        f"Study: {outcome.name}",
        outcome.question,
        [claim.to_dict() | {"sha256": claim.sha256} for claim in study.claims],
        [verdict.to_dict() for verdict in outcome.verdicts],
        outcome.table,
        figures,
        [*outcome.notes, cost_text(outcome, len(study.runs))],
    )


def telling(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without the columns of the runs in which all rows are alike: there may be many rows."""
    own = list(frame.columns[frame.columns.get_loc("evaluation") :])
    return frame[[name for name in frame.columns if name in ("run", *own) or len(set(map(str, frame[name]))) > 1]]


def cost_of(folder: Path) -> float | None:
    """The seconds that verdicts.json of the folder says, None where it says none."""
    try:
        seconds = read_json(folder / "verdicts.json").get("seconds")
    except InputError:
        return None
    return float(seconds) if isinstance(seconds, int | float) else None


def last_verdicts(folder: Path) -> Mapping[str, int] | None:
    """How many claims were upheld, refuted, undecided when the study in `folder` was last conducted; None if never."""
    try:
        claims = read_json(folder / "verdicts.json").get("claims")
        return pd.Series([claim["verdict"] for claim in claims], dtype=str).value_counts().to_dict()
    except (InputError, TypeError, KeyError):
        return None


def outcome_text(outcome: Outcome, n_runs: int, page: Path) -> str:
    """The verdicts as people read them, then the study's own table, and the cost."""
    heads = ("claim", "verdict", "predicted", "interval", "measured")
    rows = [verdict_row(verdict) for verdict in outcome.verdicts]
    parts = [outcome.question, text_table([heads, *rows], left=2, indent=2)]
    parts += ["\n".join(f"  {v.name}: {v.note}" for v in outcome.verdicts if v.note)]
    parts += [text_table(list(outcome.table), left=1, indent=2)] if outcome.table else []
    parts += ["\n".join(f"note: {note}" for note in outcome.notes)]
    parts += [f"{cost_text(outcome, n_runs)}\npage: {page}"]
    return "\n\n".join(filter(None, parts))


def verdict_row(verdict: Verdict) -> tuple[str, ...]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    bounded = verdict.low is not None or verdict.high is not None
    interval = f"[{text(verdict.low)}, {text(verdict.high)}]" if bounded else "-"
    return verdict.name, verdict.verdict, text(verdict.predicted), interval, text(verdict.measured)


def cost_text(outcome: Outcome, n_runs: int) -> str:
    return f"{n_runs} runs, {outcome.flops:.4g} FLOPs, {duration(outcome.seconds)}"
