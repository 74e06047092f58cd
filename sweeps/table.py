"""Run folders -> one tidy pandas table, a row a run. Columns and units: docs/conventions.md. No JAX here."""

import json
import math
from pathlib import Path

import pandas as pd

from models.errors import InputError
from scaling.config import RunConfig
from scaling.engine.lease import holder
from scaling.folder import read_config, read_json, read_result
from scaling.trust import check_run_id, check_sweep_links

COLUMNS = [
    "run", "status", "n_nonembedding", "n_compute", "n_total", "tokens", "unique_tokens", "flops", "flops_6nd",
    "loss", "bits_per_byte", "train_loss", "d_model", "n_layers", "n_heads", "d_ff", "vocab_size", "parametrization",
    "seq_len",
    "batch_size", "steps", "lr", "weight_decay", "b2", "schedule", "dtype", "seed", "data_seed", "source", "tokenizer",
    "corpus",
]  # fmt: skip


def run_folders(folder: Path) -> list[Path]:
    """The run folders of a sweep (those its sweep.json names), or of any folder of run folders, or the one run itself.

    Raises InputError where there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a sweep or of a run")
    if (folder / "sweep.json").exists():
        runs = read_json(folder / "sweep.json").get("runs")
        if not isinstance(runs, list):
            raise InputError(f"{folder / 'sweep.json'}: has no list of runs; launch the sweep again")
        check_sweep_links(folder)
        return [folder / "runs" / check_run_id(run, folder / "sweep.json") for run in runs]
    if (folder / "config.json").exists():
        return [folder]
    found = sorted(p.parent for p in [*folder.glob("*/config.json"), *folder.glob("runs/*/config.json")])
    if not found:
        raise InputError(f"{folder}: holds no runs (no sweep.json, no config.json); give the folder of a sweep")
    return found


def table(folder: Path | str) -> pd.DataFrame:
    """The runs of a folder that have begun, cheapest first. `status`: finished, diverged, failed, running, unfinished.

    `loss` is missing unless finished. Nothing in it depends on when or where a run was trained.
    Raises InputError, naming the file, for a damaged run folder, or where runs saw two versions of a corpus.
    """
    rows = [row(path) for path in run_folders(Path(folder))]
    frame = pd.DataFrame([r for r in rows if r is not None], columns=COLUMNS)
    for (source, _), runs in frame.groupby(["source", "tokenizer"]):
        versions = runs["corpus"].dropna().unique()
        if len(versions) > 1:
            raise InputError(
                f"{folder}: runs on {len(versions)} versions of the corpus {source!r} ({', '.join(versions)}); "
                "their losses do not compare; move the older ones away"
            )
    return frame.sort_values(["flops", "run"], kind="stable").reset_index(drop=True)


def row(folder: Path) -> dict | None:
    """One run's row; None for a run of a sweep that has not been begun."""
    if not (folder / "config.json").exists():
        if folder.exists() and any(folder.glob("result.json")):
            raise InputError(f"{folder}: has a result but no config.json; move the folder away and launch again")
        return None
    config, result = read_config(folder), read_result(folder)
    if result is not None and result.get("run") != config.run_id:
        raise InputError(f"{folder}: result.json is not of this config; move the folder away and launch again")
    return planned_row(config) | {
        "status": unfinished_status(folder) if result is None else result.get("status"),
        **{name: (result or {}).get(name) for name in ("loss", "bits_per_byte", "train_loss", "corpus")},
        **({"unique_tokens": result["unique_tokens"]} if result and "unique_tokens" in result else {}),
    }


def planned_row(config: RunConfig) -> dict:
    """What a run's row holds before it is trained."""
    counts = config.counts
    return {
        "run": config.run_id,
        "status": "waiting",
        **counts._asdict(),
        "tokens": config.trained_tokens,
        "unique_tokens": min(config.trained_tokens, (config.unique_windows or math.inf) * config.data.seq_len),
        "flops": config.flops,
        "flops_6nd": 6.0 * counts.n_compute * config.trained_tokens,
        "d_model": config.model.d_model,
        "n_layers": config.model.n_layers,
        "n_heads": config.model.n_heads,
        "d_ff": config.model.d_ff,
        "vocab_size": config.model.vocab_size,
        "parametrization": config.model.parametrization,
        "seq_len": config.data.seq_len,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "b2": config.optim.b2,
        "schedule": config.schedule.name,
        "dtype": config.dtype,
        "seed": config.seed,
        "data_seed": config.data.seed,
        "source": config.data.source,
        "tokenizer": config.data.tokenizer,
    }


def unfinished_status(folder: Path) -> str:
    if is_held(folder):
        return "running"
    return "failed" if (folder / "failed.json").exists() else "unfinished"


def is_held(folder: Path) -> bool:
    """Whether a process is training the run now; of one on another machine, whether it wrote a beat of late."""
    return holder(folder) is not None


def read_progress(folder: Path) -> dict:
    """What a running run last said of itself: step, steps, tokens, loss, tokens_per_second, seconds_left."""
    try:
        return json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
