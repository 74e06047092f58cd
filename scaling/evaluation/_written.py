"""Strings that a policy wrote, and what a reward model and the true reward make of them."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.errors import InputError
from models.heads import scalar_at
from scaling.config import RunConfig
from scaling.data.task import START
from scaling.evaluation._asker import Asker, forward_flops
from scaling.evaluation._rows import task_of
from scaling.generate import sample
from scaling.load import check_writes

BATCH = 4096  # strings side by side


def gold_task(config: RunConfig, source: str) -> Any:
    """The task of a source that knows the true reward of strings. Raises InputError for another."""
    task = task_of(config, source)
    if not hasattr(task, "gold"):
        raise InputError(f"source = {task.spec!r}: knows no true reward; name comparisons, such as 'comparisons:b=0.2'")
    return task


def written(asker: Asker, policy: str, M: int, length: int, seed: int) -> np.ndarray:
    """tokens_BU of M strings, START before each, that the run `policy` ("": the one asked) writes at temperature 1."""
    folder = Path(asker.model.folder).absolute()
    key = (str(folder.parent / policy if policy else folder), M, length, seed)
    if key not in POOLS:
        writer = asker.beside(policy).model if policy else asker.model
        check_writes(writer)
        if length > writer.window:
            raise InputError(f"policy = {policy or folder.name}: was trained on {writer.window} tokens, not {length}")
        model = writer.config.model
        samples = sample(model, writer.params, [np.array([START])], M, length, seed, window=writer.window, batch=BATCH)
        asker.flops += forward_flops(model, (M, length))
        while len(POOLS) >= KEPT:
            POOLS.pop(next(iter(POOLS)))
        POOLS[key] = np.pad(samples.tokens[0], ((0, 0), (1, 0)), constant_values=START)
    return POOLS[key]


KEPT = 4
#: The last pools of this process, as many evaluations score the same: (folder, M, length, seed) -> tokens_BU.
POOLS: dict[tuple[str, int, int, int], np.ndarray] = {}


def score(asker: Asker, tokens_BU: np.ndarray) -> np.ndarray:
    """The reward that a reward model gives whole strings, [B]. Raises InputError where it is no reward model."""
    if "reward" not in asker.model.params:
        raise InputError(
            f"proxy = reward: {asker.model.config.run_id} is no reward model; train with objective.name = reward"
        )
    return asker.call(rewards, tokens_BU)[0]


@functools.partial(jax.jit, static_argnums=0)
def rewards(model: ModelConfig, params: Any, tokens_BU: jax.Array) -> tuple[jax.Array]:
    last_B = jnp.full(len(tokens_BU), tokens_BU.shape[1] - 1)
    return (scalar_at(model, params, params["reward"], tokens_BU, last_B),)
