"""The shape of a transformer, checked where it is made. Importing this file does not import JAX."""

import dataclasses
import math
from dataclasses import dataclass, field

from models.errors import InputError, did_you_mean

ACTIVATIONS = ("swiglu", "gelu", "relu2")
PARAMETRIZATIONS = ("standard", "mup", "completep")
MATRICES = ("embed", "qkv", "attention_out", "up", "down", "head")
ADDED = {"added": True}  # metadata of a field younger than a run's format: its id leaves out the default
SIZE = {"size": True}  # metadata of a field that the size of a model sets (sizing.for_size); the others are its kind


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Fields left None are resolved when the object is made, so equal models compare equal.

    Raises InputError where the sizes do not fit together.
    """

    vocab_size: int = 256  #: V, tokens in the vocabulary; must equal the tokenizer's
    d_model: int = field(default=64, metadata=SIZE)  #: D, width of the residual stream
    n_layers: int = field(default=4, metadata=SIZE)  #: L, number of blocks
    n_heads: int = field(default=4, metadata=SIZE)  #: H, query heads; divides d_model
    n_kv_heads: int | None = field(
        default=None, metadata=SIZE
    )  #: G, key/value heads; divides n_heads (default: n_heads)
    #: F, feed-forward width (default: 8/3 D for swiglu, else 4 D, in steps of 8)
    d_ff: int | None = field(default=None, metadata=SIZE)
    activation: str = "swiglu"  #: swiglu, gelu or relu2 (squared ReLU)
    qk_norm: bool = True  #: RMSNorm on queries and keys, per head
    tied: bool = False  #: the output head is the embedding, transposed
    logit_softcap: float = 0.0  #: c tanh(logits / c); 0 is off
    z_loss: float = 0.0  #: weight of log(Z)^2 in the training loss (PaLM, 2204.02311 section 5); 0 is off
    rope_theta: float = 10_000.0  #: base of the rotary frequencies (2104.09864)
    #: standard, mup or completep (models/parametrization.py)
    parametrization: str = field(default="standard", metadata=ADDED)
    base_width: int = field(default=64, metadata=ADDED)  #: mup, completep: d_model at which they are the standard one
    base_depth: int = field(default=4, metadata=ADDED)  #: completep: n_layers at which it is the standard one
    base_head_dim: int = field(default=16, metadata=ADDED)  #: mup, completep: K at which attention scales as 1/sqrt(K)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        for name in (*sizes, "base_width", "base_depth", "base_head_dim"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value < 2**31):
                raise InputError(f"model.{name} = {value!r}: expected a whole number of at least 1 and below 2^31")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"model.activation = {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.parametrization not in PARAMETRIZATIONS:
            allowed = ", ".join(PARAMETRIZATIONS)
            raise InputError(f"model.parametrization = {self.parametrization!r}: expected one of {allowed}")
        for name in ("logit_softcap", "z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"model.{name} = {getattr(self, name)!r}: expected a number of at least 0")
        if not 1 < self.rope_theta < float("inf"):
            raise InputError(f"model.rope_theta = {self.rope_theta!r}: expected a number above 1")
        if self.d_model % self.n_heads:
            small = [h for h in range(1, math.isqrt(self.d_model) + 1) if self.d_model % h == 0]
            divisors = small + [self.d_model // h for h in small]
            nearest = min(divisors, key=lambda h: abs(h - self.n_heads))
            raise InputError(
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}; "
                f"the nearest that does is {nearest}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"model.d_model / model.n_heads = {self.head_dim}: rotary positions need an even head width; "
                "change model.n_heads"
            )
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"model.n_kv_heads = {self.n_kv_heads} does not divide model.n_heads = {self.n_heads}")
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", default_d_ff(self.d_model, self.activation))

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen model (models/lora.py): W + (alpha / rank) A B. Without a rank all is trained, and
    the other fields say nothing, so they are set to their defaults. Raises InputError.
    """

    rank: int = 0  #: R of every adapter; 0: none, the model itself is trained
    alpha: float = 8.0  #: what adapters add is scaled by alpha / rank
    targets: tuple[str, ...] = MATRICES  #: matrices that have one, as far as the model has them

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 0 <= self.rank < 2**16:
            raise InputError(f"lora.rank = {self.rank!r}: expected a whole number from 0 (no adapters) to 65,535")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"lora.alpha = {self.alpha!r}: expected a number above 0")
        for name in self.targets:
            if name not in MATRICES:
                raise InputError(
                    f"lora.targets: {name!r} is no matrix, expected some of {', '.join(MATRICES)}"
                    f"{did_you_mean(str(name), MATRICES)}"
                )
        if not self.targets:
            raise InputError(f"lora.targets: names no matrix, expected some of {', '.join(MATRICES)}")
        given = MATRICES if self.rank == 0 else tuple(name for name in MATRICES if name in self.targets)
        object.__setattr__(self, "targets", given)
        object.__setattr__(self, "alpha", 8.0 if self.rank == 0 else float(self.alpha))


def default_d_ff(d_model: int, activation: str) -> int:
    """Feed-forward width that keeps a block at 12 D^2 parameters: 8/3 D with a gate, 4 D without, in steps of 8."""
    return max(8, 8 * round(d_model * (8 / 3 if activation == "swiglu" else 4) / 8))


def replace(config: ModelConfig, **changes) -> ModelConfig:
    """`dataclasses.replace`, in which a d_ff or n_kv_heads that follows from other fields follows them again."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.d_ff == default_d_ff(config.d_model, config.activation):
        fields["d_ff"] = None
    if config.n_kv_heads == config.n_heads:
        fields["n_kv_heads"] = None
    return ModelConfig(**(fields | changes))
