"""The rows that an evaluation asks about: of a run's own source or another, from the part that is validated on."""

import dataclasses
import functools
from typing import Any

import numpy as np

from models.errors import InputError, did_you_mean
from scaling.config import RunConfig
from scaling.data.batches import cut, valid_starts
from scaling.data.store import open_store
from scaling.data.task import TaskStore


def validation_rows(config: RunConfig, source: str, n: int) -> dict[str, np.ndarray]:
    """tokens_BU of n rows, fewer where there are fewer, and of a task what it says of each target, such as answer_BT.

    source: its spec; "" the run's own. Raises InputError where it does not fit the model.
    """
    store = store_of(config, source)
    T = config.data.seq_len
    if task := getattr(store, "task", None):
        task.check(T)
        rows = rows_of(store, n if task.n_valid is None else min(n, task.n_valid), T)
        if "tokens_BU" not in rows:
            raise InputError(f"source = {store.source!r}: has pairs; name a source of single answers")
        return rows
    data = dataclasses.replace(config.data, source=source or config.data.source, valid_tokens=0, unique_tokens=0)
    starts = valid_starts(dataclasses.replace(config, data=data), store)
    evenly = starts[np.linspace(0, len(starts) - 1, min(n, len(starts))).astype(int)]
    return {"tokens_BU": cut({"tokens_BU": store.valid}, evenly, T)["tokens_BU"]}


@functools.lru_cache(maxsize=8)
def rows_of(store: TaskStore, n: int, T: int) -> dict[str, np.ndarray]:
    """The first n rows that a task is validated on. Kept, as a sweep's runs are asked about the same; not to be written
    to.
    """
    return store.task.rows("valid", np.arange(n), T)


@functools.lru_cache(maxsize=8)
def oracle_of(store: TaskStore, n: int, T: int) -> np.ndarray | None:
    """What the targets of `rows_of` cost who knows the task. Kept likewise."""
    return store.task.oracle("valid", np.arange(n), T)


def store_of(config: RunConfig, source: str) -> Any:
    store = open_store(source or config.data.source, config.data.tokenizer, valid_fraction=config.data.valid_fraction)
    if store.vocab_size != config.model.vocab_size:
        raise InputError(
            f"source = {store.source!r}: has a vocabulary of {store.vocab_size}, the model one of "
            f"{config.model.vocab_size}; name a source of the same symbols"
        )
    return store


def check_source(model: Any, source: str) -> None:
    """Raises InputError where a source is not in the model's tokens, or is its own and has changed since training: part
    of what is validated on now may have been trained on then.
    """
    store = store_of(model.config, source)
    if source in ("", model.config.data.source) and store.key != model.result.corpus:
        raise InputError(f"source = {store.source!r}: has changed since {model.folder} was trained on it")
    if store.tokenizer.identity != model.tokenizer.identity:
        raise InputError(
            f"source = {store.source!r}: its {model.config.data.tokenizer!r} is another than the model's; its tokens "
            "mean something else there"
        )


def task_of(config: RunConfig, source: str) -> Any:
    """The task of a source. Raises InputError where it is a corpus, which asks nothing."""
    store = store_of(config, source)
    if getattr(store, "task", None) is None:
        raise InputError(f"source = {store.source!r}: a text without questions; name a task, such as 'facts:'")
    return store.task


def subset_of(rows: dict[str, np.ndarray], subset: str) -> np.ndarray:
    """Which targets are of the subset, bool [B, T]: "all" but padding, or one that the task names, as "answer"."""
    every = np.ones(rows["tokens_BU"][:, 1:].shape, bool)
    names = ["all", *(name.removesuffix("_BT") for name in rows if name.endswith("_BT"))]
    if subset not in names:
        raise InputError(f"subset = {subset!r}: expected one of {', '.join(names)}{did_you_mean(subset, names)}")
    return rows.get("real_BT", every) if subset == "all" else rows[f"{subset}_BT"].astype(bool)


def answers_of(answer_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, which): of each target that answers its row and the number of its answer; an answer is a run of targets."""
    begins_BT = answer_BT & ~np.pad(answer_BT, ((0, 0), (1, 0)))[:, :-1]
    number_BT = np.cumsum(begins_BT.ravel()).reshape(answer_BT.shape) - 1
    return np.nonzero(answer_BT)[0], number_BT[answer_BT]
