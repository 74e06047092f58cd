"""Run folders -> one tidy pandas table, a row a run. Columns and units: docs/conventions.md. No JAX here."""

import dataclasses
import functools
import math
from pathlib import Path

import pandas as pd

from models.errors import InputError
from models.sizing import Counts
from scaling.config import ObjectiveConfig, RunConfig
from scaling.engine.lease import holder
from scaling.fields import leaves, value_at
from scaling.folder import read_config, read_json
from scaling.result import RunResult, read_result, result_of
from scaling.trust import check_sweep_links
from sweeps.folder import read_description
from sweeps.plan import flops_of

# What depends on how a run was executed, if not on when and where: which run it branched from, and what that saved.
EXECUTED = ("trunk", "branched_at_step", "flops_own", "flops_spent", "flops_ancestors")
# What a result holds that its configuration says beforehand.
PLANNED = ("run", "steps", "tokens", "unique_tokens", *Counts._fields, "n_trained", "flops", "flops_6nd")


def run_folders(folder: Path) -> list[Path]:
    """The run folders of a sweep (those its sweep.json names), or of any folder of run folders, or the one run itself.

    Raises InputError where there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a sweep or of a run")
    if (folder / "sweep.json").exists():
        check_sweep_links(folder)
        return [folder / "runs" / run for run in read_description(folder).runs]
    if (folder / "config.json").exists():
        return [folder]
    folders = sorted(p.parent for p in [*folder.glob("*/config.json"), *folder.glob("runs/*/config.json")])
    if not folders:
        raise InputError(f"{folder}: holds no runs (no sweep.json, no config.json); give the folder of a sweep")
    return folders


def table(*folders: Path | str) -> pd.DataFrame:
    """The runs in the folders that have begun, cheapest first. `status`: finished, diverged, failed, running or
    unfinished.

    `loss` is missing unless finished. `trunk`: the run that made its first steps, itself where it did not branch, so
    runs of one trunk share noise. With what a run was made (`RunResult.where`: commit, device, versions) is a column
    where the runs differ in it. But for these and EXECUTED, nothing depends on when or where a run was trained.
    Of several folders: `sweep` says which a run is from, by name, or by path where two have one name; a run that is in
    two is taken where it is finished, else where it diverged. `flops` is missing for a run that has not finished and
    whose objective is not here.
    Raises InputError, naming the file, for a damaged run folder, or where runs saw two versions of a corpus.
    """
    rows: dict[str, dict] = {}
    paths = dict.fromkeys(map(Path, folders))
    names = [path.name for path in paths]
    for folder in paths:
        label = str(folder) if names.count(folder.name) > 1 else folder.name
        for path in run_folders(folder):
            values = row(path)
            if values is not None and (values["run"] not in rows or rank(values) > rank(rows[values["run"]])):
                rows[values["run"]] = values | {"sweep": label}
    columns = list(planned_row(RunConfig())) + (["sweep"] if len(folders) > 1 else [])
    made = [values["where"] for values in rows.values() if values["where"]]
    columns += [name for name in {k: None for m in made for k in m} if len({m.get(name) for m in made}) > 1]
    frame = pd.DataFrame([values["where"] | values for values in rows.values()], columns=columns)
    trunks = {run: values["trunk"] for run, values in rows.items()}
    frame["trunk"] = [first_of(run, trunks) for run in rows]
    for (source, _), runs in frame.groupby(["source", "tokenizer"]):
        versions = runs["corpus"].dropna().unique()
        if len(versions) > 1:
            raise InputError(
                f"{', '.join(map(str, folders))}: runs on {len(versions)} versions of the corpus {source!r} "
                f"({', '.join(versions)}); their losses do not compare; move the older ones away"
            )
    return frame.sort_values(["flops", "run"], kind="stable").reset_index(drop=True)


def rank(values: dict) -> int:
    """Of two rows of one run, the one of the higher rank is taken."""
    return {"finished": 2, "diverged": 1}.get(values["status"], 0)


def row(folder: Path) -> dict | None:
    """One run's row, and `where` of its result; None for a run of a sweep that has not been begun."""
    if not (folder / "config.json").exists():
        if folder.exists() and any(folder.glob("result.json")):
            raise InputError(f"{folder}: has a result but no config.json; move the folder away and launch again")
        return None
    config, result = read_config(folder), read_result(folder)
    if result is not None and result.run != config.run_id:
        raise InputError(f"{folder}: result.json is not of this config; move the folder away and launch again")
    if result is None:
        return planned_row(config) | {"status": unfinished_status(folder), "where": {}}
    return planned_row(config) | result_columns(result) | {"where": result.where}


def planned_row(config: RunConfig) -> dict:
    """What a run's row holds before it is trained: all columns, None where only the result says."""
    unique = min(config.trained_tokens, (config.unique_windows or math.inf) * config.data.seq_len)
    flops = flops_of(config)
    counted = dataclasses.replace(config, objective=ObjectiveConfig()) if flops is None else config
    result = result_columns(result_of(counted, None, unique_tokens=unique, n_trained=counted.n_trained))
    result |= {"run": config.run_id, "flops": flops}
    given = {column: value_at(config, path) for path, column in config_columns().items() if column not in result}
    given = {column: ",".join(value) if isinstance(value, tuple) else value for column, value in given.items()}
    return {name: value if name in PLANNED else None for name, value in result.items()} | {"status": "waiting"} | given


def result_columns(result: RunResult) -> dict:
    """The plain values of a result. Its run, status, N, D, C, loss and corpus have the names of docs/conventions.md."""
    values = {k: v for k, v in result.to_dict().items() if not isinstance(v, dict)}
    values["n_trained"] = result.n_total if result.n_trained is None else result.n_trained
    return {"trunk" if name == "branched_from" else name: value for name, value in values.items()}


@functools.cache
def config_columns() -> dict[str, str]:
    """The column of every field of a configuration, by path: the field's own name, or its part's for a part's `name`
    ("schedule"); where a field nearer to the top or before it has that name, with the part before it ("data_seed").
    """
    columns: dict[str, str] = {}
    for path in sorted(leaves(RunConfig), key=lambda path: path.count(".")):
        part, _, name = path.rpartition(".")
        column = part.replace(".", "_") if name == "name" else name
        columns[path] = path.replace(".", "_") if column in columns.values() else column
    return columns


def first_of(run: str, trunks: dict[str, str | None]) -> str:
    """The run that made the first steps of `run`, through branches of branches."""
    seen = set()
    while trunks.get(run) is not None and run not in seen:
        seen.add(run)
        run = trunks[run]
    return run


def unfinished_status(folder: Path) -> str:
    if is_held(folder):
        return "running"
    return "failed" if (folder / "failed.json").exists() else "unfinished"


def is_held(folder: Path) -> bool:
    """Whether a process is training the run now; of one on another machine, whether it wrote a beat of late."""
    return holder(folder) is not None


def read_progress(folder: Path) -> dict[str, float]:
    """What a running run last said of itself, as far as these are numbers of at least 0: step, steps, tokens, loss,
    tokens_per_second, seconds_left.
    """
    try:
        state = read_json(folder / "progress.json")
    except InputError:
        return {}
    return {name: value for name, value in state.items() if type(value) in (int, float) and 0 <= value < 1e18}
