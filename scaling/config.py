"""What a run is: its configuration, and the identity that follows from it. No JAX here.

All that can change the numbers stands in `RunConfig`; where and how it executes (mesh, checkpoint interval, processes)
stands in `scaling.execution.Execution` and never enters the identity.
"""

import contextlib
import functools
import hashlib
import json
import math
import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.config import ADDED, LoraConfig, ModelConfig
from models.errors import InputError
from models.sizing import Counts, adapter_counts, counts, training_bytes
from scaling.fields import from_plain, to_plain
from scaling.objectives import Objective, find

FORMAT = 1  # raised when the meaning of a field changes: old runs then keep their own identity
OPTIMIZERS = tuple(sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "optimizers")])))
RUN_ID = re.compile(r"[0-9a-f]{12}")
HOOK = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # module:function


@dataclass(frozen=True)
class DataConfig:
    source: str = "sotu"  #: sotu, tfds:NAME, text:GLOB, or a task such as facts:a=0.5
    tokenizer: str = "bytes"  #: bytes, bpe:VOCAB, or symbols, of a task that has its own
    seq_len: int = 128  #: T, tokens predicted per window
    valid_fraction: float = 0.02  #: share of the corpus, by documents, that is only ever validated on
    seed: int = 0  #: of the data order
    repeat: bool = False  #: allow more tokens than the corpus holds
    unique_tokens: int = field(default=0, metadata=ADDED)  #: train on only so many of the corpus; 0: all of it
    #: validate on a fixed part of about so many tokens of the validation split; 0: all of it
    valid_tokens: int = field(default=0, metadata=ADDED)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser; its file in scaling/optimizers/ says which of these fields it uses.

    A hook `module:function` is imported and called with `options`. It returns an optax GradientTransformation from
    gradients to the direction of descent *before* the learning rate and weight decay, as optax's `scale_by_*` do:
    parameters change by -lr times its output. The run's id knows a hook by name and options, not by its code.
    """

    name: str = "adamw"  #: the name of a file of scaling/optimizers/ (adamw, muon, ...), or a hook module:function
    lr: float = 0.01  #: peak learning rate
    b1: float = 0.9  #: decay of the first moment, per step
    b2: float = 0.95  #: decay of the second moment, per step
    eps: float = 1e-8
    weight_decay: float = 0.1  #: on arrays of two or more axes; norm scales do not decay
    clip: float = 1.0  #: largest global gradient norm; 0 is off
    #: coupled: parameters shrink by lr_t * weight_decay a step, as in PyTorch's and optax's AdamW; independent: by
    #: weight_decay * lr_t / lr, whatever the peak, as Loshchilov & Hutter wrote it (1711.05101)
    decay: str = field(default="coupled", metadata=ADDED)
    momentum: float = field(default=0.95, metadata=ADDED)  #: muon: decay of the momentum, per step
    options: str = field(default="", metadata=ADDED)  #: hook: JSON object of its keyword arguments

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", canonical_options("optim.options", self.options, '{"b1": 0.9}'))


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "wsd"  #: wsd (warm-up, stable, decay), cosine, or constant (after warm-up)
    warmup_tokens: int = 20_480  #: linear warm-up from 0; in tokens, so that runs of all D share their beginning
    decay_fraction: float = 0.2  #: wsd: share of the tokens spent decaying, shape 1 - sqrt(x) to zero (2405.18392)
    final: float = 0.0  #: cosine: last learning rate as a share of the peak


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a step minimises; scaling/objectives/ says which there are, and checks the options where a run begins."""

    name: str = "next_token"
    options: str = ""  #: JSON object of what the objective takes

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", canonical_options("objective.options", self.options, '{"beta": 0.1}'))


@dataclass(frozen=True)
class RunConfig:
    """One training run. Raises InputError, naming the field, where a value cannot be trained."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    tokens: int = 1_000_000  #: D; trained on as the nearest whole number of steps
    batch_size: int = 8  #: B, windows per step
    seed: int = 0  #: of the initial parameters
    dtype: str = "float32"  #: of the compute: float32 or bfloat16; parameters stay float32
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig, metadata=ADDED)
    #: id of the run whose final parameters this one starts from, which lies beside it; "": fresh from the seed
    parent: str = field(default="", metadata=ADDED)
    lora: LoraConfig = field(default_factory=LoraConfig, metadata=ADDED)  #: adapters on the parent's model

    def __post_init__(self) -> None:
        whole = {"tokens": self.tokens, "batch_size": self.batch_size, "data.seq_len": self.data.seq_len}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} = {value!r}: expected a whole number of at least 1")
        for name, value in {"seed": self.seed, "data.seed": self.data.seed}.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
                raise InputError(f"{name} = {value!r}: expected a whole number from 0 to 2^32 - 1")
        warmup = self.schedule.warmup_tokens
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise InputError(f"schedule.warmup_tokens = {warmup!r}: expected a whole number of at least 0")
        for name in ("unique_tokens", "valid_tokens"):
            value = getattr(self.data, name)
            if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or value >= self.data.seq_len):
                raise InputError(f"data.{name} = {value!r}: expected 0 (all), or at least one window of seq_len")
        if not isinstance(self.objective.name, str) or not self.objective.name:
            raise InputError(f"objective.name = {self.objective.name!r}: expected the name of an objective")
        if self.parent and not (isinstance(self.parent, str) and RUN_ID.fullmatch(self.parent)):
            raise InputError(f"parent = {self.parent!r}: expected a run's id (12 hex digits)")
        if self.lora.rank and self.model.parametrization != "standard":
            raise InputError(
                f"lora.rank = {self.lora.rank}: only where model.parametrization is standard, not "
                f"{self.model.parametrization}: no rule is known for adapters"
            )
        if self.lora.rank and self.model.tied and self.lora.targets == ("head",):
            raise InputError("lora.targets = head: a tied model has no head of its own; name embed, which is both")
        choices = {
            "dtype": (self.dtype, ("float32", "bfloat16")),
            "optim.decay": (self.optim.decay, ("coupled", "independent")),
            "schedule.name": (self.schedule.name, ("wsd", "cosine", "constant")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise InputError(f"{name} = {value!r}: expected one of {', '.join(allowed)}")
        optim, hook = self.optim, HOOK.fullmatch(str(self.optim.name))
        if optim.name not in OPTIMIZERS and not hook:
            names = ", ".join(OPTIMIZERS)
            raise InputError(f"optim.name = {optim.name!r}: expected one of {names}, or a hook module:function")
        if optim.options and not hook:
            raise InputError(f"optim.options = {optim.options!r}: only for a hook module:function, not {optim.name}")
        ranges = {  # name: (value, lowest, highest, may equal the lowest)
            "data.valid_fraction": (self.data.valid_fraction, 0, 0.5, False),
            "optim.lr": (self.optim.lr, 0, math.inf, False),
            "optim.b1": (self.optim.b1, 0, 1, True),
            "optim.b2": (self.optim.b2, 0, 1, True),
            "optim.eps": (self.optim.eps, 0, math.inf, False),
            "optim.weight_decay": (self.optim.weight_decay, 0, math.inf, True),
            "optim.clip": (self.optim.clip, 0, math.inf, True),
            "optim.momentum": (self.optim.momentum, 0, 1, True),
            "schedule.decay_fraction": (self.schedule.decay_fraction, 0, 1.0000001, True),
            "schedule.final": (self.schedule.final, 0, 1.0000001, True),
        }
        for name, (value, low, high, closed) in ranges.items():
            if not (low <= value < high if closed else low < value < high):
                least = "at least" if closed else "above"
                raise InputError(f"{name} = {value!r}: expected a number {least} {low} and below {high:.3g}")

    @property
    def steps(self) -> int:
        """Optimiser steps: tokens over tokens per step, to the nearest whole step."""
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len

    @property
    def trained_tokens(self) -> int:
        """D as trained: steps times tokens per step, repeats counted."""
        return self.steps * self.tokens_per_step

    @property
    def unique_windows(self) -> int | None:
        """Windows of the corpus that the run may see, whole ones of `data.unique_tokens`; None: all."""
        return self.data.unique_tokens // self.data.seq_len or None

    @functools.cached_property
    def counts(self) -> Counts:
        return counts(self.model)

    @functools.cached_property
    def flops(self) -> float:
        """Training FLOPs, product by product (models.sizing.flops_per_token); validation is not counted."""
        return self.flops_from(0)

    def flops_from(self, step: int) -> float:
        """Training FLOPs of the steps after the first `step`. Raises InputError for an unknown objective."""
        a_token = self.objective_found.flops_per_token(self.model, self.data.seq_len)
        if not self.lora.rank:
            return a_token * (self.steps - step) * self.tokens_per_step
        adapters = adapter_counts(self.model, self.lora, self.objective_found.logits)
        a_token -= self.objective_found.flops_factor * adapters.flops_saved_per_token
        return (a_token * self.tokens_per_step + adapters.flops_per_step) * (self.steps - step)

    @property
    def objective_found(self) -> Objective:
        """Raises InputError for an unknown one."""
        return find(self.objective.name, self.objective.options)

    @property
    def compared(self) -> bool:
        """Whether its parent is asked about its rows; False for an objective that is not here."""
        with contextlib.suppress(InputError):
            return bool(self.objective_found.reference)
        return False

    @property
    def training_bytes(self) -> int:
        """An estimate of a step's memory (models.sizing.training_bytes); of an objective that is not here, a guess."""
        sequences = 1
        with contextlib.suppress(InputError):
            sequences = self.objective_found.sequences
        return training_bytes(self.model, sequences * self.batch_size, self.data.seq_len)

    @property
    def n_trained(self) -> int:
        """Parameters that are trained: all of the model's, or its adapters', and the objective's own."""
        heads = self.objective_found.heads(self.model).values()
        return adapter_counts(self.model, self.lora).n_trained + sum(map(math.prod, heads))

    @functools.cached_property
    def run_id(self) -> str:
        """Twelve hex digits of the SHA-256 of the canonical JSON: the same numbers, the same id, on any machine."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values. A field added after FORMAT is absent while it holds its default: old ids stay."""
        return {"format": FORMAT, **to_plain(self)}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`. Raises InputError on an unknown or missing part, or a value of another type."""
        if fields.get("format") != FORMAT:
            raise InputError(f"config.json: not of format {FORMAT}, which this version reads; move the folder away")
        fields = {name: value for name, value in fields.items() if name != "format"}
        try:
            return from_plain(RunConfig, fields)
        except InputError as error:
            raise InputError(f"config.json: {error}; move the folder away") from None


def canonical_options(path: str, text: str, example: str) -> str:
    """The JSON object `text` in its canonical form, so that equal options are equal runs; "" where it is empty.

    Raises InputError where it is no JSON object.
    """
    if text == "":
        return ""
    try:
        options = json.loads(text)
        canonical = canonical_json(options) if isinstance(options, dict) else None
    except (TypeError, ValueError, RecursionError):
        canonical = None
    if canonical is None:
        raise InputError(f"{path} = {text!r}: expected a JSON object of arguments, such as {example}")
    return canonical if options else ""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks; whole-numbered floats and ints of float fields are written alike."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        return int(v) if isinstance(v, float) and v.is_integer() and abs(v) < 2**53 else v

    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def check_fits(config: RunConfig, store: Any) -> None:
    """Raises InputError where vocabulary, window or number of tokens does not fit `store`, of a corpus or a task."""
    if config.model.vocab_size != store.vocab_size:
        raise InputError(
            f"model.vocab_size = {config.model.vocab_size}: tokenizer {config.data.tokenizer!r} has a vocabulary of "
            f"{store.vocab_size}; set model.vocab_size to that"
        )
    T = config.data.seq_len
    store.n_valid_windows(T)
    held = store.n_train_windows(T) * T
    if config.data.unique_tokens > held:
        raise InputError(
            f"data.unique_tokens = {config.data.unique_tokens:,}: the corpus {config.data.source!r} holds only "
            f"{held:,} training tokens; take fewer, or 0 for all"
        )
    available = (config.unique_windows or held // T) * T
    if config.trained_tokens > available and not config.data.repeat:
        limit = " by data.unique_tokens" if config.unique_windows else ""
        step = f" (a step of batch_size x seq_len is {config.tokens_per_step:,})"
        as_steps = step if config.tokens_per_step > config.tokens else ""
        raise InputError(
            f"tokens = {config.tokens}{as_steps}: the corpus {config.data.source!r} holds {available:,} training "
            f"tokens{limit}; "
            "train on fewer, or allow repeats with --repeat (data.repeat), or take a larger corpus"
        )
