"""What every engine does before its workers begin: the sweep is checked, then what they read is written."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import InputError as AnalysisInputError
from models.errors import InputError
from scaling.chain import check_child, check_wants, parent_of
from scaling.config import RunConfig, check_fits
from scaling.data.batches import batch_at
from scaling.data.store import open_store
from scaling.data.task import TaskStore
from scaling.execution import Execution
from scaling.folder import check_run_folder, holds_only
from scaling.objectives import find
from scaling.result import read_result
from scaling.trust import check_sweep_links, hooks
from sweeps.define import Sweep, keep_definition
from sweeps.folder import (
    Description,
    is_sweep,
    lacks_config,
    restore_config,
    set_aside,
    write_description,
    write_execution,
)
from sweeps.launch.queue import mark, unmark
from sweeps.plan import Unit, plan_in, write_plan
from sweeps.table import planned_row


def prepare(name: str, sweep: Sweep, folder: Path) -> None:
    """Checks the sweep, then writes sweep.json. Raises InputError before anything is made.

    A result that cannot be read is set aside, so that its run is trained again; a lost config.json is written anew.
    """
    if folder.exists() and not is_sweep(folder) and not holds_only(folder):
        raise InputError(f"--out {folder}: not empty and not the folder of a sweep; choose another")
    check_sweep_links(folder)
    corpora = check_sweep(sweep, folder)
    over, damaged = [], []
    for config, run in begun_runs(folder, sweep.runs):
        try:
            result = read_result(run)
        except InputError:
            damaged.append(run / "result.json")
            continue
        if result is None:
            continue
        if not lacks_config(run) or result.run != config.run_id:
            check_run_folder(run, config)
        if result.corpus != corpora[config.run_id]:
            raise InputError(f"{run}: was trained on another version of {config.data.source!r}; move it away")
        over.append((config, run))
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for path in damaged:
        set_aside(path)
    for config, run in over:
        restore_config(run, config)
    ids = [config.run_id for config in sweep.runs]
    write_description(folder, Description(name, tuple(ids), sweep.holdout, sweep.law, **keep_definition(sweep, folder)))
    unmark(folder, set(ids).difference(run.name for _, run in over))
    mark(folder, [run.name for _, run in over])


def begun_runs(folder: Path, runs: Iterable[RunConfig]) -> list[tuple[RunConfig, Path]]:
    """The runs that have a folder in a sweep's folder, and that folder."""
    begun = set(os.listdir(folder / "runs")) if (folder / "runs").is_dir() else set()
    return [(config, folder / "runs" / run) for config in runs if (run := config.run_id) in begun]


def check_parents(runs: Iterable[RunConfig], folder: Path | None) -> None:
    """Raises InputError where a run's parent is neither among `runs` nor finished in the sweep's folder, or where the
    two do not go together.
    """
    by_id = {config.run_id: config for config in runs} if any(config.parent for config in runs) else {}
    for config in filter(lambda config: config.parent, runs):
        if config.parent in by_id:
            check_child(config, by_id[config.parent])
        elif folder and (folder / "runs" / config.parent / "config.json").exists():
            parent_of(config, folder / "runs" / config.run_id)
        else:
            nor = f", nor in {folder / 'runs'}" if folder else ""
            raise InputError(
                f"parent = {config.parent!r}: not among the runs of this sweep{nor}; hand it over, as "
                "Sweep(runs, parents=...)"
            )


def check_sweep(sweep: Sweep, folder: Path | None = None) -> dict[str, str]:
    """The key of each run's corpus, by run id. Raises InputError where a run, the hold-out or the law cannot work, or a
    run that others start from is neither in the sweep nor in its folder.
    """
    from analysis.laws.forms import law_named
    from analysis.runs import read_runs

    stores = {}
    corpora = {}
    tried = set()
    for config in sweep.runs:
        key = (config.data.source, config.data.tokenizer, config.data.valid_fraction)
        if key not in stores:
            stores[key] = open_store(key[0], key[1], valid_fraction=key[2])
        check_fits(config, stores[key])
        check_wants(config)
        objective, of = (
            find(config.objective.name, config.objective.options),
            (key, config.objective, config.data.seq_len),
        )
        if of not in tried and (isinstance(stores[key], TaskStore) or objective.sequences > 1):
            batch_at(stores[key], objective, "valid", np.zeros(1, int), config.data.seq_len)
        tried.add(of)
        corpora[config.run_id] = stores[key].key
    check_hooks(sweep.runs)
    check_parents(sweep.runs, folder)
    if sweep.law != "auto":
        law_named(sweep.law)
    if sweep.holdout is not None:
        planned = pd.DataFrame([planned_row(config) for config in sweep.runs])
        try:
            read_runs(planned.assign(status="finished", loss=1.0), holdout=sweep.holdout)
        except AnalysisInputError as error:  # which knows it as an option
            raise InputError(str(error).replace("--holdout", "holdout")) from None
    return corpora


def check_hooks(runs: Iterable[RunConfig]) -> None:
    """Raises InputError where an optimiser's hook cannot be imported, or does not take its options.

    Tried in a process of its own, on the CPU: the launcher takes no accelerator from its workers.
    """
    pairs = {(config.optim.name, config.optim.options) for config in runs if hooks([config])}
    if not pairs:
        return
    command, environment = [sys.executable, "-m", "scaling.engine.optim"], os.environ | {"JAX_PLATFORMS": "cpu"}
    tried = subprocess.run(command, input=json.dumps(sorted(pairs)), env=environment, capture_output=True, text=True)
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or [f"ended its process with exit code {tried.returncode}"])[-1]
        raise InputError(last if last.startswith("optim.name") else f"optim.name: a hook failed: {last}")


def write_launch(sweep: Sweep, folder: Path, execution: Execution, sharing: bool = True) -> dict[str, Unit]:
    """Writes what workers read, plan.json and execution.json; the units by run id, in the order of the sweep."""
    units = plan_in(folder, sweep.runs, sharing)
    write_execution(folder, execution)
    write_plan(folder, units, uuid.uuid4().hex[:12])
    return {unit.run_id: unit for unit in units}
