"""evaluations.json in a sweep's folder, what is to be asked of its runs; and what came of it, as one long table.

Workers of any engine read the file and ask what is not answered yet (sweeps/launch/asking.py).
"""

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from models.errors import InputError
from scaling.data.cache import locked
from scaling.evaluate import EvaluationConfig, read_evaluations
from scaling.fields import from_plain, to_plain
from scaling.folder import read_json, write_atomically
from scaling.trust import check_run_id
from sweeps.table import run_folders, table

FILE, LOCK = "evaluations.json", ".evaluations.lock"


@dataclass(frozen=True)
class Asked:
    """One evaluation of some runs of a sweep."""

    evaluation: EvaluationConfig
    runs: tuple[str, ...] = ()  #: ids; empty: all runs of the sweep


@dataclass(frozen=True)
class Wanted:
    """What evaluations.json says."""

    launch: str = ""  #: which counts attempts of its own: asked for again, what failed is tried again
    asked: tuple[Asked, ...] = ()


def read_wanted(folder: Path) -> Wanted:
    """What is to be asked of the sweep in `folder`; empty where nothing is. Raises InputError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return Wanted()
    try:
        wanted = from_plain(Wanted, read_json(path))
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise InputError(f"{path}: {reason}; remove it and evaluate again") from None
    for asked in wanted.asked:
        for run in asked.runs:
            check_run_id(run, path)
    return wanted


def ask(folder: Path, asked: Iterable[Asked] = ()) -> Wanted:
    """Adds to what is to be asked of a sweep, as a new launch; returns all that is then. What failed before is asked
    again: `unask` takes back what turned out to be no question.
    """
    with locked(folder / LOCK):
        whole: dict[EvaluationConfig, tuple[str, ...]] = {}
        for one in (*read_wanted(folder).asked, *asked):
            before = whole.get(one.evaluation)
            everything = before == () or not one.runs
            whole[one.evaluation] = () if everything else tuple(dict.fromkeys((*(before or ()), *one.runs)))
        return write_wanted(folder, [Asked(evaluation, runs) for evaluation, runs in whole.items()])


def unask(folder: Path, evaluation: EvaluationConfig) -> None:
    """Takes back what turned out to be no question for the runs of a sweep. What is answered stays."""
    with locked(folder / LOCK):
        write_wanted(folder, [asked for asked in read_wanted(folder).asked if asked.evaluation != evaluation])


def write_wanted(folder: Path, asked: Sequence[Asked]) -> Wanted:
    wanted = Wanted(uuid.uuid4().hex[:12], tuple(asked))
    if wanted.asked or (folder / FILE).exists():
        write_atomically(folder / FILE, json.dumps(to_plain(wanted), indent=1) + "\n")
    return wanted


def pairs(asked: Sequence[Asked], runs: Iterable[str]) -> list[tuple[str, EvaluationConfig]]:
    """(run id, evaluation) of all that is to be asked of these runs, by run."""
    return [(run, one.evaluation) for run in runs for one in asked if not one.runs or run in one.runs]


def measurements(*folders: Path | str) -> pd.DataFrame:
    """The long table: a row for each measurement of each run, with all columns of the run (sweeps.table) beside it.

    Columns of its own: evaluation, options, evaluation_seed, metric, value, stderr, n, the axes of the evaluations, and
    flops_evaluation, the last; an axis that has the name of a column of the run is called asked_NAME. The loss after
    training is no row: it is a column. Raises InputError for a damaged file.
    """
    runs = table(*folders)
    places = {path.name: path for folder in folders for path in run_folders(Path(folder))}
    by_id = {run: places.get(run) for run in runs["run"]}
    if len(runs) == 1 and len(places) == 1:  # the folder of one run may have any name
        by_id = {runs["run"][0]: next(iter(places.values()))}
    rows, axes_seen = [], {}
    for run, folder in by_id.items():
        for result in read_evaluations(folder, run) if folder else ():
            asked = {"evaluation": result.name, "options": result.options, "evaluation_seed": result.seed}
            for row in result.rows:
                axes = {f"asked_{k}" if k in runs.columns else k: v for k, v in row.items()}
                axes_seen |= dict.fromkeys(axes)
                rows.append({"run": run, **asked, **axes, "flops_evaluation": result.flops})
    own = ["metric", "value", "stderr", "n"]
    axes = [name for name in axes_seen if name not in own]
    columns = ["run", "evaluation", "options", "evaluation_seed", *own, *axes, "flops_evaluation"]
    frame = pd.DataFrame(rows, columns=columns)
    clash = [name for name in runs.columns if name in frame.columns and name != "run"]
    return frame.merge(runs.drop(columns=clash), on="run", how="left", validate="many_to_one")
