"""What the compiled program is given of a run: batches, rates and decays of the next steps, placed on a mesh."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.errors import InputError
from scaling.chain import Parent
from scaling.config import DataConfig, RunConfig, check_fits
from scaling.data.batches import Store, batch_at, columns, cut, train_starts, valid_starts
from scaling.data.sources import is_task
from scaling.data.store import TokenStore, open_store
from scaling.data.task import TaskStore
from scaling.engine.program import CHUNK_STEPS, objective_of, validation_windows
from scaling.engine.schedules import learning_rates, weight_decays
from scaling.engine.sharding import batch_sharding, replicated
from scaling.objectives import Objective

RESIDENT_BYTES = 2**28  # columns up to this size are kept on the device


@dataclass(frozen=True, eq=False)
class Feed:
    """A run, and all that its batches follow from."""

    config: RunConfig
    store: Store
    objective: Objective
    lr: np.ndarray  #: of every step
    decay: np.ndarray  #: of every step
    valid_starts: np.ndarray  #: where the windows that are validated on begin
    counted: float  #: losses among them: the run's loss is their mean
    parent: Parent | None = None  #: the run that it starts from
    #: what that one gives the rows that are trained on, [steps, B] each, and those that are validated on, [N] each
    reference: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})


def feed(config: RunConfig, store: Store, parent: Parent | None = None) -> Feed:
    """Raises InputError where corpus or task does not have what the objective wants."""
    objective, starts = objective_of(config), valid_starts(config, store)
    batch_at(store, objective, "train", np.zeros(1, int), config.data.seq_len)
    losses = counted(store, objective, replace(config.data, seed=0))
    if not losses:
        raise InputError(
            f"data.valid_fraction = {config.data.valid_fraction}: nothing that the objective counts is in the "
            f"{len(starts) * config.data.seq_len:,} tokens that are validated on; take a larger part or corpus"
        )
    return Feed(config, store, objective, learning_rates(config), weight_decays(config), starts, losses, parent)


@functools.lru_cache(maxsize=8)
def counted(store: Store, objective: Objective, data: DataConfig) -> float:
    """How many losses the objective counts in the windows that runs on `data` validate on."""
    starts, T = valid_starts(RunConfig(data=data), store), data.seq_len
    parts = (starts[at : at + 1024] for at in range(0, len(starts), 1024))
    return sum(objective.counted(batch_at(store, objective, "valid", part, T)) for part in parts)


def n_rows(feed: Feed) -> int:
    """How many rows its parent is asked about: each that is trained on once, and those that are validated on."""
    starts = train_starts(feed.config, feed.store, 0, feed.config.steps)
    return len(np.unique(starts)) + len(feed.valid_starts)


def example_window(config: RunConfig, objective: Objective) -> dict[str, np.ndarray]:
    """What a batch holds of one window, [1, ...], for its shapes and types; made of no corpus, but of a task."""
    T, vocab, data = config.data.seq_len, config.model.vocab_size, config.data
    if is_task(data.source):
        store = open_store(data.source, data.tokenizer, valid_fraction=data.valid_fraction)
        check_fits(config, store)
        given = {name: np.zeros(1, np.float32) for name in objective.reference}
        return batch_at(store, objective, "train", np.zeros(1, int), T) | given
    tokens = np.arange(max(vocab, T + 1)) % vocab
    store = SimpleNamespace(vocab_size=vocab, source=config.data.source)
    return cut({"tokens_BU": tokens, **objective.columns(tokens, store)}, np.zeros(1, int), T)


def inputs(feed: Feed, mesh: Mesh, step: int, n: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """(data, lr_X, decay_X) of steps step .. step + n - 1, padded to X = CHUNK_STEPS and placed on the mesh.

    Padding keeps one program for every n: the same steps give the same bits however they are cut into calls. A small
    corpus lies on the device whole, and only the beginnings of the windows are sent.
    """
    config, T, X = feed.config, feed.config.data.seq_len, CHUNK_STEPS
    starts = train_starts(config, feed.store, step, n)
    lr_X, decay_X = np.zeros((2, X), np.float32)
    lr_X[:n], decay_X[:n] = feed.lr[step : step + n], feed.decay[step : step + n]
    key = {"seed": np.uint32(config.seed), "first": np.int32(step)} if feed.objective.random else {}
    if rests_on(mesh, feed.store, feed.objective):
        start_XB = np.zeros((X, config.batch_size), np.int32)
        start_XB[:n] = starts
        return {"whole": resident(feed.store, feed.objective, mesh), "start_XB": start_XB, **key}, lr_X, decay_X

    @functools.cache
    def rows(first: int | None, last: int | None) -> dict[str, np.ndarray]:
        """What a device holds: of the steps that are run, and of its windows."""
        local = starts[:, first:last]
        batch = made(feed.store, feed.objective, local.tobytes(), T)
        batch = {name: x.reshape(*local.shape, *x.shape[1:]) for name, x in batch.items()}
        given = {name: x[step : step + n, first:last] for name, x in feed.reference[0].items()}
        return {name: pad(x, X) for name, x in (batch | given).items()}

    if mesh.size == 1:
        return {"batch_X": rows(None, None), **key}, lr_X, decay_X

    def array(name: str, shape: tuple[int, ...]) -> jax.Array:
        part = lambda index: rows(index[1].start, index[1].stop)[name]  # noqa: E731
        return jax.make_array_from_callback((X, config.batch_size, *shape), batch_sharding(mesh, axis=1), part)

    shapes = {n: x.shape[1:] for n, x in batch_at(feed.store, feed.objective, "train", starts[0, :1], T).items()}
    shapes |= dict.fromkeys(feed.reference[0], ())
    return {"batch_X": {name: array(name, shape) for name, shape in shapes.items()}, **key}, lr_X, decay_X


@functools.lru_cache(maxsize=1)
def made(store: Store, objective: Objective, starts: bytes, T: int) -> dict[str, np.ndarray]:
    """The training windows that begin at `starts`, int64. Kept, as the members of a swarm often share their order."""
    return batch_at(store, objective, "train", np.frombuffer(starts, np.int64), T)


def rests_on(mesh: Mesh, store: Store, objective: Objective) -> bool:
    """Whether the windows are cut on the device, from columns that lie there."""
    if mesh.size > 1 or isinstance(store, TaskStore) or len(store.train) >= 2**31:
        return False
    return sum(column.nbytes for column in columns(store, objective).values()) <= RESIDENT_BYTES


def pad(x: np.ndarray, length: int) -> np.ndarray:
    """With zeros along the first axis."""
    return np.pad(x, ((0, length - len(x)), *[(0, 0)] * (x.ndim - 1)))


def validation_batches(feed: Feed, mesh: Mesh) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(batch, weight_B) of all windows that are validated on, the last batch padded with windows of no weight."""
    T = feed.config.data.seq_len
    size = validation_windows(T, mesh)
    for at in range(0, len(feed.valid_starts), size):
        start_B = feed.valid_starts[at : at + size]
        batch = batch_at(feed.store, feed.objective, "valid", start_B, T)
        batch |= {name: x[at : at + size] for name, x in feed.reference[1].items()}
        weight_B = pad(np.ones(len(start_B), np.float32), size)
        yield {name: pad(x, size) for name, x in batch.items()}, weight_B


@functools.lru_cache(maxsize=2)
def resident(store: TokenStore, objective: Objective, mesh: Mesh) -> dict[str, jax.Array]:
    """The training columns of a corpus on the mesh's device, kept from run to run."""
    return jax.device_put({n: np.asarray(x) for n, x in columns(store, objective).items()}, replicated(mesh))


def spread(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every host holds, of which each device takes its rows."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])
