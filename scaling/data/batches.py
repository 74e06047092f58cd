"""The batches of a run as functions of (data seed, step): which windows of the corpus, and what is cut there.

What a batch holds is cut from columns, arrays over the positions of a corpus: its tokens, and what an objective adds to
them. The same cut is made on the host and, where the columns lie there, on the device. Of a task it is what the
objective takes of the task's rows; there a window begins at the number of its row.
"""

import functools
import hashlib
from typing import Any

import numpy as np

from scaling.config import RunConfig
from scaling.data.order import batch_windows, window_indices
from scaling.data.store import TokenStore
from scaling.data.task import VALID_ROWS, TaskStore
from scaling.objectives import Objective

Store = TokenStore | TaskStore


@functools.lru_cache(maxsize=4)
def columns(store: TokenStore, objective: Objective, split: str = "train") -> dict[str, np.ndarray]:
    """The columns of a split, train or valid."""
    tokens = getattr(store, split)
    return {"tokens_BU": tokens, **objective.columns(tokens, store)}


def cut(columns: dict[str, Any], start_B: Any, T: int, numpy: Any = np) -> dict[str, Any]:
    """The windows that begin at `start_B`: T + 1 values of a column whose name ends in U, else T.

    `numpy` is that of the columns, NumPy or jax.numpy.
    """

    def window(name: str, column: Any) -> Any:
        length = T + 1 if name.endswith("U") else T
        part = column[start_B[:, None] + numpy.arange(length)]
        return part.astype(numpy.float32 if column.dtype == bool else numpy.int32)

    return {name: window(name, column) for name, column in columns.items()}


def batch_at(store: Store, objective: Objective, split: str, start_B: np.ndarray, T: int) -> dict[str, np.ndarray]:
    """What a batch of the windows that begin at `start_B` holds, made on the host.

    Raises InputError where corpus or task does not have what the objective wants.
    """
    if isinstance(store, TaskStore):
        return objective.batch(store.rows(split, start_B, T))
    return cut(columns(store, objective, split), start_B, T)


def train_starts(config: RunConfig, store: Store, step: int, n: int) -> np.ndarray:
    """Where the windows of the batches of n steps from `step` on begin, int64 [n, B]."""
    T, B = config.data.seq_len, config.batch_size
    windows = batch_windows(store.n_train_windows(T), config.data.seed, step, B, n, config.unique_windows)
    return windows.reshape(n, B) * stride(store, T)


def n_valid_windows(config: RunConfig, store: Store) -> int:
    """How many windows a run validates on: as many as `data.valid_tokens` holds, or all of the split, or of a task that
    does not end VALID_ROWS.
    """
    T, wanted = config.data.seq_len, config.data.valid_tokens
    n = store.n_valid_windows(T)
    if not wanted and endless(store, T):
        return VALID_ROWS
    return max(1, wanted // T) if 0 < wanted < n * T else n


def valid_starts(config: RunConfig, store: Store) -> np.ndarray:
    """Where the windows that a run validates on begin, int64 [N]: all of the split, or a fixed part of it.

    The part is chosen by the corpus and its size alone, so it is the same for all runs of a sweep.
    """
    T, wanted = config.data.seq_len, config.data.valid_tokens
    n, part = store.n_valid_windows(T), n_valid_windows(config, store)
    if part == n or endless(store, T):
        return np.arange(part) * stride(store, T)
    seed = int.from_bytes(hashlib.sha256(f"{store.key} {wanted}".encode()).digest()[:8])
    return np.sort(window_indices(n, seed, 0, part)) * stride(store, T)


def stride(store: Store, T: int) -> int:
    """From where a window begins to where the next one does."""
    return 1 if isinstance(store, TaskStore) else T


def endless(store: Store, T: int) -> bool:
    """Whether it is a task whose rows do not end: validation takes the first of its split."""
    return isinstance(store, TaskStore) and store.endless(T)


def validation_flops(config: RunConfig, tokens: int) -> float:
    """FLOPs of validating once on so many tokens: a forward pass, a third of a training step's."""
    return tokens * config.objective_found.flops_per_token(config.model, config.data.seq_len) / 3
