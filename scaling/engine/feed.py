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
from scaling.config import DataConfig, RunConfig
from scaling.data.batches import columns, cut, train_starts, valid_starts
from scaling.data.store import TokenStore
from scaling.engine.program import CHUNK_STEPS, objective_of, validation_windows
from scaling.engine.schedules import learning_rates, weight_decays
from scaling.engine.sharding import batch_sharding, replicated
from scaling.objectives import Objective

RESIDENT_BYTES = 2**28  # columns up to this size are kept on the device


@dataclass(frozen=True, eq=False)
class Feed:
    """A run, and all that its batches follow from."""

    config: RunConfig
    store: TokenStore
    objective: Objective
    lr: np.ndarray  #: of every step
    decay: np.ndarray  #: of every step
    valid_starts: np.ndarray  #: where the windows that are validated on begin
    counted: float  #: losses among them: the run's loss is their mean


def feed(config: RunConfig, store: TokenStore) -> Feed:
    """Raises InputError where the corpus does not have what the objective wants."""
    objective, starts = objective_of(config), valid_starts(config, store)
    columns(store, objective, "train")
    losses = counted(store, objective, replace(config.data, seed=0))
    if not losses:
        raise InputError(
            f"data.valid_fraction = {config.data.valid_fraction}: nothing that the objective counts is in the "
            f"{len(starts) * config.data.seq_len:,} tokens that are validated on; take a larger part or corpus"
        )
    return Feed(config, store, objective, learning_rates(config), weight_decays(config), starts, losses)


@functools.lru_cache(maxsize=8)
def counted(store: TokenStore, objective: Objective, data: DataConfig) -> float:
    """How many losses the objective counts in the windows that runs on `data` validate on."""
    starts, part, T = valid_starts(RunConfig(data=data), store), columns(store, objective, "valid"), data.seq_len
    return sum(objective.counted(cut(part, starts[at : at + 1024], T)) for at in range(0, len(starts), 1024))


def example_window(config: RunConfig, objective: Objective) -> dict[str, np.ndarray]:
    """What a batch holds of one window, [1, ...], made of no corpus: for its shapes and types."""
    T, vocab = config.data.seq_len, config.model.vocab_size
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
    whole = columns(feed.store, feed.objective)
    fits = sum(column.nbytes for column in whole.values()) <= RESIDENT_BYTES
    if mesh.size == 1 and fits and len(feed.store.train) < 2**31:
        start_XB = np.zeros((X, config.batch_size), np.int32)
        start_XB[:n] = starts
        return {"whole": resident(feed.store, feed.objective, mesh), "start_XB": start_XB, **key}, lr_X, decay_X

    def array(name: str) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            """What a device holds: of the steps that are run, and of its windows."""
            local = starts[:, index[1]]
            windows = cut({name: whole[name]}, local.ravel(), T)[name]
            part_X = np.zeros((X, local.shape[1], windows.shape[1]), windows.dtype)
            part_X[:n] = windows.reshape(n, *part_X.shape[1:])
            return part_X

        shape = (X, config.batch_size, T + 1 if name.endswith("U") else T)
        return jax.make_array_from_callback(shape, batch_sharding(mesh, axis=1), part)

    return {"batch_X": {name: array(name) for name in whole}, **key}, lr_X, decay_X


def validation_batches(feed: Feed, mesh: Mesh) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(batch, weight_B) of all windows that are validated on, the last batch padded with windows of no weight."""
    T = feed.config.data.seq_len
    size = validation_windows(T, mesh)
    part = columns(feed.store, feed.objective, "valid")
    for at in range(0, len(feed.valid_starts), size):
        batch = cut(part, feed.valid_starts[at : at + size], T)
        weight_B = np.zeros(size, np.float32)
        weight_B[: len(batch["tokens_BU"])] = 1.0
        yield {name: np.pad(x, ((0, size - len(x)), (0, 0))) for name, x in batch.items()}, weight_B


@functools.lru_cache(maxsize=2)
def resident(store: TokenStore, objective: Objective, mesh: Mesh) -> dict[str, jax.Array]:
    """The training columns of a corpus on the mesh's device, kept from run to run."""
    return jax.device_put({n: np.asarray(x) for n, x in columns(store, objective).items()}, replicated(mesh))


def spread(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every host holds, of which each device takes its rows."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])
