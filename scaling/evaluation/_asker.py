"""A trained model that is asked about whole rows of tokens, in batches of one shape, its FLOPs counted."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from models.sizing import flops_per_token
from scaling.chain import folder_beside
from scaling.data.task import START
from scaling.generate import Sampling, sample
from scaling.load import Trained, check_writes, load
from scaling.trust import RUN_ID

CALL_TOKENS = 2**14  # of one call of the compiled program, as nearly as whole rows make it
CALL_LOGITS = 2**25  # and at most so many logits


class Stopped(Exception):
    """Asking was told to stop; nothing of it is kept."""


class Asker:
    """`model`, and the forward FLOPs spent on it and on others that were asked beside it. Between two calls of the
    compiled program Stopped is raised once `should_stop()` is true.
    """

    def __init__(self, model: Trained, should_stop: Callable[[], bool] = lambda: False) -> None:
        self.model, self.should_stop = model, should_stop
        self.flops = 0.0

    def targets(self, tokens_BU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(logprob_BT, margin_BT) of tokens_BU[:, 1:], each given those before it: log p, and log p less that of the
        best other token; above 0 where a greedy reader writes it.
        """
        return self.call(target_logprobs, np.asarray(tokens_BU, np.int32), unread=1)

    def next(self, tokens_BT: np.ndarray) -> np.ndarray:
        """logprob_BV of the token after each row."""
        return self.call(next_logprobs, np.asarray(tokens_BT, np.int32))[0]

    def sampled(
        self, prompts: list[np.ndarray], n: int, max_tokens: int, seed: int, temperature: float
    ) -> list[list[np.ndarray]]:
        """n continuations of each prompt, in tokens, up to the end of a document, `max_tokens` or of the window."""
        check_writes(self.model)
        model, params, window = self.model.config.model, self.model.params, self.model.window
        drawn = sample(model, params, prompts, n, max_tokens, seed, Sampling(temperature), [[START]], window)
        for prompt, lengths_n in zip(prompts, drawn.lengths, strict=True):
            once = forward_flops(model, (1, len(prompt)))
            self.flops += once + sum(forward_flops(model, (1, len(prompt) + int(t))) - once for t in lengths_n)
        return [[drawn.ids(i, j) for j in range(n)] for i in range(len(prompts))]

    def divergence(self, other: "Asker", tokens_BU: np.ndarray) -> np.ndarray:
        """kl_BT, nats: KL(model || other) of the next token at each position before the last."""
        tokens_BU = np.asarray(tokens_BU, np.int32)
        self.flops += forward_flops(other.model.config.model, tokens_BU[:, 1:].shape)
        between = functools.partial(divergences, other.model.config.model, other.model.params)
        return self.call(between, tokens_BU, unread=1)[0]

    def beside(self, run: str) -> "Asker":
        """Of the run with this id, which lies beside this one. Raises InputError where it is not there."""
        folder = Path(self.model.folder)
        if not RUN_ID.fullmatch(run):
            raise InputError(f"{run!r}: no run id (12 hex digits); name a run that lies beside {folder}")
        other = load(folder_beside(folder, run))
        if other.tokenizer.identity != self.model.tokenizer.identity:
            raise InputError(f"run {run}: its tokens are not those of {folder.name}: another vocabulary")
        return Asker(other)

    def call(self, function: Any, rows: np.ndarray, unread: int = 0) -> tuple[np.ndarray, ...]:
        """`function` of all rows, in calls of one shape: a number of rows that depends on their length alone. `unread`:
        tokens at the end of a row that are only targets.
        """
        model = self.model.config.model
        length = rows.shape[1]
        size = max(1, min(CALL_TOKENS // length, CALL_LOGITS // (length * model.vocab_size)))
        size = min(size, 2 ** int(np.ceil(np.log2(max(1, len(rows))))))
        parts = []
        for at in range(0, len(rows), size):
            if self.should_stop():
                raise Stopped
            part = rows[at : at + size]
            padded = np.pad(part, ((0, size - len(part)), (0, 0)))
            out = jax.device_get(function(model, self.model.params, padded))
            parts.append([np.asarray(x)[: len(part)] for x in out])
        self.flops += forward_flops(model, (len(rows), length - unread))
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


def forward_flops(model: ModelConfig, shape: tuple[int, ...]) -> float:
    """Of one pass over rows [B, T]: a third of a training step's."""
    B, T = shape
    return B * T * flops_per_token(model, T) / 3


@functools.partial(jax.jit, static_argnums=0)
def target_logprobs(model: ModelConfig, params: Any, tokens_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
    logprob_BTV = jax.nn.log_softmax(transformer.apply(model, params, tokens_BU[:, :-1]))
    target_BT1 = tokens_BU[:, 1:, None]
    logprob_BT1 = jnp.take_along_axis(logprob_BTV, target_BT1, axis=-1)
    is_target_BTV = jnp.arange(logprob_BTV.shape[-1]) == target_BT1
    others_BT = jnp.max(jnp.where(is_target_BTV, -jnp.inf, logprob_BTV), axis=-1)
    return logprob_BT1[..., 0], logprob_BT1[..., 0] - others_BT


@functools.partial(jax.jit, static_argnums=0)
def next_logprobs(model: ModelConfig, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array]:
    return (jax.nn.log_softmax(transformer.apply(model, params, tokens_BT)[:, -1]),)


@functools.partial(jax.jit, static_argnums=(0, 2))
def divergences(
    other: ModelConfig, other_params: Any, model: ModelConfig, params: Any, tokens_BU: jax.Array
) -> tuple[jax.Array]:
    p_BTV = jax.nn.log_softmax(transformer.apply(model, params, tokens_BU[:, :-1]))
    q_BTV = jax.nn.log_softmax(transformer.apply(other, other_params, tokens_BU[:, :-1]))
    return (jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), axis=-1),)
