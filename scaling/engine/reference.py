"""What a run's parent gives each row that the run will see, computed once before its first step.

Kept as reference.npz in the run's folder, so that a run that is resumed does not ask again.
"""

import functools
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from scaling.config import canonical_json
from scaling.data.batches import batch_at, train_starts
from scaling.engine.feed import Feed, pad, spread
from scaling.engine.hosts import agree, by_first_host
from scaling.engine.program import Program, validation_windows
from scaling.folder import write_atomically

FILE = "reference.npz"
Columns = dict[str, np.ndarray]


def reference_of(
    feed: Feed, folder: Path, program: Program, mesh: Mesh, parent: Callable[[], Any], report: Callable[[str], None]
) -> tuple[Columns, Columns]:
    """(columns of the rows that are trained on, [steps, B] each; of those that are validated on, [N] each), float32.

    `parent` gives the parent's parameters where they are needed. On several hosts all call it.
    """
    there = read(feed, folder / FILE)
    if agree(there is not None).all():
        return there
    config, params = feed.config, parent()
    starts = train_starts(config, feed.store, 0, config.steps)
    rows, where = np.unique(starts, return_inverse=True)
    report(f"asking the parent about {len(rows) + len(feed.valid_starts):,} rows")
    train = {n: x[where].reshape(starts.shape) for n, x in asked(feed, program, mesh, params, "train", rows).items()}
    valid = asked(feed, program, mesh, params, "valid", feed.valid_starts)
    by_first_host(functools.partial(write, feed, folder / FILE, train, valid))
    return train, valid


def asked(feed: Feed, program: Program, mesh: Mesh, params: Any, split: str, rows: np.ndarray) -> Columns:
    """The columns of the rows of a split, [N] each."""
    T = feed.config.data.seq_len
    size = validation_windows(T, mesh)
    parts = []
    for at in range(0, len(rows), size):
        batch = batch_at(feed.store, feed.objective, split, rows[at : at + size], T)
        given = program.reference(params, {name: spread(pad(x, size), mesh) for name, x in batch.items()})
        parts.append(jax.device_get(given))
    return {name: np.concatenate([part[name] for part in parts])[: len(rows)] for name in feed.objective.reference}


def identity(feed: Feed) -> str:
    """Of what the file is about: another corpus gives other rows under the same id."""
    return canonical_json({"run": feed.config.run_id, "corpus": feed.store.key})


def write(feed: Feed, path: Path, train: Columns, valid: Columns) -> None:
    file = io.BytesIO()
    columns = {f"train_{n}": x for n, x in train.items()} | {f"valid_{n}": x for n, x in valid.items()}
    np.savez(file, of=np.array(identity(feed)), **columns)
    write_atomically(path, file.getvalue())


def read(feed: Feed, path: Path) -> tuple[Columns, Columns] | None:
    """What `write` wrote; None where it is not there, of another run, or not whole (an archive checks its content)."""
    shapes = {"train": (feed.config.steps, feed.config.batch_size), "valid": (len(feed.valid_starts),)}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            if str(file["of"]) != identity(feed):
                return None
            columns = {s: {n: file[f"{s}_{n}"] for n in feed.objective.reference} for s in shapes}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    for split, shape in shapes.items():
        if any(x.shape != shape or x.dtype != np.float32 for x in columns[split].values()):
            return None
    return columns["train"], columns["valid"]
