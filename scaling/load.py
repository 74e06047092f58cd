"""A trained model from its run's folder, without optimiser or mesh, to be asked: `load(folder)`.

    model = load("runs/mine")
    print(model.generate("the union", n=4).texts)

A folder from someone else may be read: no hook that it names is imported, no link is followed out of it.
"""

import dataclasses
import functools
import gc
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models import transformer
from models.errors import InputError
from models.implementation import Implementation
from scaling.beam import beam_search
from scaling.chain import parent_of
from scaling.config import RunConfig
from scaling.data.sources import is_task
from scaling.data.store import open_tokenizer
from scaling.data.tokenizers import END_OF_DOCUMENT, Symbols, Tokenizer, clean
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.parameters import frozen, parts_of, shapes_of, whole
from scaling.folder import read_config
from scaling.generate import BATCH, Samples, Sampling, sample
from scaling.result import RunResult, read_result
from scaling.shapes import bucket
from scaling.trust import check_no_link_out

Params = Any
TOKENS_AT_ONCE = 8_192  # of a call: bounds the logits, V floats a token


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run's model. Parameters and products are float32, on one device."""

    config: RunConfig
    params: Params = field(repr=False)
    folder: Path
    result: RunResult = field(repr=False)

    @property
    def window(self) -> int:
        """T, the longest input it was trained on."""
        return self.config.data.seq_len

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read at the first use: of a trained tokenizer's store, which is built again where it is not there."""
        data = self.config.data
        return open_tokenizer(data.source, data.tokenizer, self.result.corpus, valid_fraction=data.valid_fraction)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """logits_BTV, float32: what follows each token. Raises InputError where a token is not of the vocabulary."""
        tokens_BT = self._checked(tokens_BT)
        return _in_parts(functools.partial(_logits, self.config.model, self.params), tokens_BT, 0)

    def token_logprobs(self, tokens_BU: np.ndarray) -> np.ndarray:
        """[B, U - 1], float32, nats: the log-probability of each token but the first, given those before it."""
        tokens_BU = self._checked(tokens_BU)
        return _in_parts(functools.partial(_token_logprobs, self.config.model, self.params), tokens_BU, 1)

    def hidden(self, tokens_BT: np.ndarray) -> np.ndarray:
        """x_BTD, float32: the last hidden layer after its norm, of which the head makes logits."""
        tokens_BT = self._checked(tokens_BT)
        return _in_parts(functools.partial(_hidden, self.config.model, self.params), tokens_BT, 0)

    def rewards(self, tokens_BU: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """[B], float32: what a reward model gives sequences of so many tokens, those of the prompt among them.

        Raises InputError where the run trained no reward model.
        """
        if "reward" not in self.params:
            raise InputError(
                f"{self.folder}: objective {self.config.objective.name} trains no reward; take a run of reward"
            )
        (B, U), last_B = np.shape(tokens_BU), np.asarray(length_B) - 1
        if last_B.shape != (B,) or not ((last_B >= 0) & (last_B < U)).all():
            raise InputError(f"lengths: expected one of 1 to {U} for each of {B} sequences")
        head_D, rows = np.asarray(self.params["reward"]), range(0, B, max(1, TOKENS_AT_ONCE // U))
        rewards_B = np.zeros(B, np.float32)
        for part in (slice(at, at + rows.step) for at in rows):
            last = last_B[part]
            rewards_B[part] = self.hidden(tokens_BU[part])[np.arange(len(last)), last] @ head_D
        return rewards_B

    def generate(
        self,
        prompts: str | Sequence[str | np.ndarray],
        n: int = 1,
        max_tokens: int = 64,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        stop: Sequence[str] = (),
        beam: int = 0,
        batch: int = BATCH,
    ) -> Samples:
        """n continuations of each prompt, a text or token ids, with their `texts`: up to a stop text, the end of a
        document, `max_tokens`, or the end of the window. `beam`: the best n that a beam of this width finds.

        A text is taken as `encode` says. Raises InputError: see `scaling.generate.sample` and `check_writes`.
        """
        check_writes(self)
        sampling = Sampling(temperature, top_k, top_p, greedy)
        prompts = [self.encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        model, window, stop = self.config.model, self.window, self.stops(stop)
        if beam:
            samples = beam_search(model, self.params, prompts, beam, max_tokens, stop, window).first(n)
        else:
            samples = sample(model, self.params, prompts, n, max_tokens, seed, sampling, stop, window, batch)
        texts = [[self.tokenizer.decode(samples.ids(i, j)) for j in range(n)] for i in range(len(prompts))]
        return dataclasses.replace(samples, texts=texts)

    def encode(self, prompt: str | np.ndarray) -> np.ndarray:
        """The tokens of a text; tokens as they are. An empty text is the beginning of a document, and a model of a task
        reads every text as the beginning of a row.
        """
        if not isinstance(prompt, str):
            return np.asarray(prompt)
        if clean(prompt) != prompt:
            raise InputError(f"prompt {prompt[:20]!r}: holds NUL or half a character, which no token stands for")
        tokens = self.tokenizer.encode(prompt)
        begins = not len(tokens) or is_task(self.config.data.source)
        return np.concatenate([[END_OF_DOCUMENT], tokens]).astype(np.int32) if begins else tokens

    def stops(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Stop sequences: those texts, and the end of a document. Raises InputError for an empty one."""
        for text in texts:
            if not text or clean(text) != text:
                raise InputError(f"stop = {text!r}: expected text of at least one character, without NUL")
        return [np.array([END_OF_DOCUMENT]), *(self.tokenizer.encode(text) for text in texts)]

    def joined(self, prompt: str, text: str) -> str:
        """A prompt and what follows it as one text."""
        return " ".join(filter(None, (prompt, text))) if isinstance(self.tokenizer, Symbols) else prompt + text

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        tokens, V = np.asarray(tokens), self.config.model.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens: expected whole numbers [B, T], not {tokens.dtype} {list(tokens.shape)}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < V):
            raise InputError(f"tokens: {tokens.min()} to {tokens.max()}: this model's vocabulary is 0 to {V - 1}")
        return tokens.astype(np.int32)


def check_writes(model: Trained) -> None:
    """Raises InputError where training left the head alone that makes next tokens, as that of a reward does."""
    config = model.config
    if not config.objective_found.logits:
        instead = f"its parent, {config.parent}" if config.parent else "a run of another objective, such as next_token"
        raise InputError(
            f"{model.folder}: objective {config.objective.name} trains no head for next tokens; ask {instead}"
        )


def load(folder: Path | str) -> Trained:
    """The model of a finished run. Raises InputError where there is none: the run is not finished, diverged, is not
    whole, or the folder is no run's.
    """
    folder = Path(folder)
    config, result = read_finished(folder)
    return Trained(config, read_params(folder, config), folder, result)


def read_finished(folder: Path) -> tuple[RunConfig, RunResult]:
    """Configuration and result of a finished run. Raises InputError, saying why, where it is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / "config.json").exists():
        if (folder / "runs").is_dir():
            raise InputError(f"{folder}: a sweep, not a run; name one of the runs in {folder / 'runs'}")
        raise InputError(f"{folder}: not a run, as it holds no config.json")
    check_no_link_out(folder)
    config, result = read_config(folder), read_result(folder)
    if result is None:
        raise InputError(f"{folder}: not finished; train it to its end first (the same command continues it)")
    if result.run != config.run_id:
        raise InputError(f"{folder}: result.json is of run {result.run}, config.json of {config.run_id}; train anew")
    if not result.finished:
        raise InputError(f"{folder}: diverged at step {result.last_step}, so it has no trained model; lower optim.lr")
    return config, result


def read_params(folder: Path, config: RunConfig) -> Params:
    """The trained parameters of a finished run, as the model is asked with them. Raises InputError if damaged.

    What a run trains beside or instead of the whole model (adapters, a head of its own) is put together here.
    """
    parts = parts_of(config)
    trained = read_final(folder, config, {"params": shapes_of(parts)})["params"]
    if not config.lora.rank:
        return trained
    parent = parent_of(config, folder)
    params = read_params(parent.folder, parent.config)
    return whole(parts, trained, frozen(parts_of(parent.config)._replace(lora=parts.lora), params))


def read_final(folder: Path, config: RunConfig, shapes: Any) -> Any:
    """Those arrays of the state after the last step that `shapes` has, float32, on one device."""
    checkpoints = Checkpointer(folder / "checkpoints")
    steps = checkpoints.steps()
    again = "remove result.json and train it again, which makes what is missing"
    if config.steps not in steps:
        found = f"only of step {', '.join(map(str, steps))}" if steps else "none"
        raise InputError(f"{folder}: holds no checkpoint of its last step, {config.steps} ({found}); {again}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    try:
        return checkpoints.read_part(config.steps, abstract)
    except (MemoryError, PermissionError):  # no fault of the checkpoint's
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    forget_reads()
    raise InputError(f"{folder}: the checkpoint of step {config.steps} is damaged ({reason}); {again}")


def forget_reads() -> None:
    """Where one array fails to read, orbax leaves the others' tasks to be collected, and asyncio then prints each."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    logger.setLevel(level)


def _in_parts(ask: Callable[[jax.Array], jax.Array], tokens_BT: np.ndarray, more: int) -> np.ndarray:
    """`ask` of so many rows at a time that a call stays below TOKENS_AT_ONCE, in few different shapes.

    Rows and time are padded to sizes that repeat: no position sees what is right of it. `more`: by how much `ask`
    shortens time.
    """
    B, T = tokens_BT.shape
    width = bucket(T - more, 16) + more
    rows = min(bucket(B), max(1, TOKENS_AT_ONCE // width))
    parts = []
    for start in range(0, B, rows):
        part = tokens_BT[start : start + rows]
        padded = np.zeros((rows, width), np.int32)
        padded[: len(part), :T] = part
        parts.append(np.asarray(ask(padded))[: len(part), : T - more])
    return np.concatenate(parts)


HOW = Implementation(attention="blocked")


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Any, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return transformer.apply(model, params, tokens_BT, how=HOW)


@functools.partial(jax.jit, static_argnums=0)
def _token_logprobs(model: Any, params: Params, tokens_BU: jax.Array) -> jax.Array:
    return -transformer.next_token_loss(model, params, tokens_BU, how=HOW)[0]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: Any, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return transformer.Transformer(model, how=HOW).apply({"params": params}, tokens_BT, method="hidden")[0]
