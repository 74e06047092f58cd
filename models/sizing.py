"""Parameters, FLOPs and bytes from a config, and back: the best-shaped config for a wanted N. No JAX here.

Three counts of N (see docs/conventions.md): which one is used moves a fitted exponent from 0.37 to 0.70 on the same
runs, so all three are always kept side by side.
"""

import math
from typing import NamedTuple

from models.config import LoraConfig, ModelConfig, default_d_ff
from models.errors import InputError


class Counts(NamedTuple):
    """Parameters of a model, in numbers of float32 values."""

    n_nonembedding: int  #: without embedding and head (Kaplan 2001.08361)
    n_compute: int  #: that plus the output head, tied or not: what each token is multiplied with
    n_total: int  #: all arrays


class AdapterCounts(NamedTuple):
    n_trained: int  #: parameters that are trained
    flops_per_step: float  #: of making (alpha / rank) A B, and the gradients of A and B
    flops_saved_per_token: float  #: gradients of matrices without an adapter, which nobody needs


def counts(config: ModelConfig) -> Counts:
    """The three N of `config`; a test asserts that n_total is the number of values `init` makes."""
    D, K = config.d_model, config.head_dim
    H, G = config.n_heads, config.n_kv_heads
    attention = D * (H + 2 * G) * K + H * K * D + (2 * K if config.qk_norm else 0)
    feed_forward = (3 if config.activation == "swiglu" else 2) * D * config.d_ff
    n_nonembedding = config.n_layers * (attention + feed_forward + 2 * D) + D
    head = D * config.vocab_size
    return Counts(n_nonembedding, n_nonembedding + head, n_nonembedding + head * (1 if config.tied else 2))


def matrices(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, int]]:
    """(rows, columns) of every matrix of the model, by its path in the tree of parameters: input axes and output axes
    taken together.
    """
    D, F, V = config.d_model, config.d_ff, config.vocab_size
    heads = config.n_heads * config.head_dim
    layer = {
        "qkv": (D, heads + 2 * config.n_kv_heads * config.head_dim),
        "attention_out": (heads, D),
        "up": (D, (2 if config.activation == "swiglu" else 1) * F),
        "down": (F, D),
    }
    blocks = {(f"block_{i}", name): shape for i in range(config.n_layers) for name, shape in layer.items()}
    return {("embed",): (V, D), **blocks, **({} if config.tied else {("head",): (D, V)})}


def adapter_counts(config: ModelConfig, lora: LoraConfig, logits: bool = True) -> AdapterCounts:
    """What adapters on the model's matrices cost; of a model without adapters, that of training all of it.

    logits: whether the model makes logits, so that its head is a product at all.
    """
    if not lora.rank:
        return AdapterCounts(counts(config).n_total, 0.0, 0.0)
    every = matrices(config)
    shapes = [shape for path, shape in every.items() if path[-1] in lora.targets]
    head = "embed" if config.tied else "head"
    used = [path for path in every if path[-1] not in ("embed", "head") or (logits and path[-1] == head)]
    products = {path: math.prod(every[path]) for path in used}
    plain = sum(size for path, size in products.items() if path[-1] not in lora.targets)
    merging = 3 * 2 * lora.rank * sum(M * N for M, N in shapes)
    return AdapterCounts(lora.rank * sum(M + N for M, N in shapes), float(merging), 2.0 * plain)


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Training FLOPs per token, matrix product by matrix product: forward plus a backward of twice the forward.

    A product of [m, k] with [k, n] counts 2mkn. Attention is causal: a token attends to (T + 1) / 2 positions on
    average (`causal=False`: to all T, what a plain masked implementation computes). Norms, softmax and other
    element-wise work are left out, as in Kaplan et al. (2001.08361, table 1) and Hoffmann et al.
    (2203.15556, appendix F).
    """
    D, K, H, G = config.d_model, config.head_dim, config.n_heads, config.n_kv_heads
    attended = (seq_len + 1) / 2 if causal else seq_len
    layer = (
        2 * D * (H + 2 * G) * K  # queries, keys, values
        + 2 * attended * H * K  # logits
        + 2 * attended * H * K  # weighted values
        + 2 * H * K * D  # output projection
        + 2 * (3 if config.activation == "swiglu" else 2) * D * config.d_ff
    )
    return 3 * (config.n_layers * layer + 2 * D * config.vocab_size)


def training_bytes(config: ModelConfig, batch_size: int, seq_len: int, compute_bytes: int = 4) -> int:
    """An estimate of a training step's memory in bytes: parameters, gradients, two moments, and kept activations.

    Activations are those a backward pass keeps without remat: about 8 D + 3 F values per token and layer, the T x T
    attention weights three times over, and the logits twice in float32.
    """
    tokens = batch_size * seq_len
    per_layer = tokens * (8 * config.d_model + 3 * config.d_ff) * compute_bytes
    attention = 3 * batch_size * config.n_heads * seq_len**2 * 4
    logits = 2 * tokens * config.vocab_size * 4
    return 16 * counts(config).n_total + config.n_layers * (per_layer + attention) + logits


def for_size(
    n: float,
    *,
    vocab_size: int = 256,
    head_dim: int | None = None,
    n_layers: int | None = None,
    activation: str = "swiglu",
    tolerance: float = 0.05,
    **fields,
) -> ModelConfig:
    """The best-shaped model whose n_compute lies within `tolerance` of n, for n from 1e4 to 1e11.

    Best-shaped: width over depth near `aspect_ratio(n)`, feed-forward width near its default, n met closely.
    `head_dim` and `n_layers` pin those; other fields of ModelConfig pass through.
    Raises InputError where n is out of range or nothing fits (a vocabulary whose head alone is too large, say).
    """
    if not 1e4 <= n <= 1e11:
        raise InputError(f"model size n = {n!r}: expected n_compute from 1e4 to 1e11")
    fields |= {"vocab_size": vocab_size, "activation": activation}
    best: tuple[float, ModelConfig] | None = None
    nearest: tuple[float, ModelConfig] | None = None
    for width_head in [head_dim] if head_dim else head_dims(n):
        for d_model in range(width_head, 8 * math.isqrt(int(n)) + width_head, width_head):
            if nearest and d_model * (vocab_size + d_model) > 2 * (1 + tolerance) * n:
                break
            if (d_model // width_head) % (fields.get("n_kv_heads") or 1):
                continue
            of_width = fields | {"d_model": d_model, "n_heads": d_model // width_head}
            for depth in [n_layers] if n_layers else depths_near(n, of_width):
                config = fit_d_ff(n, depth, of_width)
                error = abs(counts(config).n_compute / n - 1)
                if nearest is None or error < nearest[0]:
                    nearest = error, config
                if error <= tolerance:
                    penalty = misshape(n, config, free_depth=not n_layers) + (error / tolerance) ** 2 / 10
                    if best is None or penalty < best[0]:
                        best = penalty, config
    if best is None:
        closest = f"; the closest has {counts(nearest[1]).n_compute:,} ({shape(nearest[1])})" if nearest else ""
        raise InputError(
            f"model size n = {n:.4g} with vocabulary {vocab_size}: no model within {tolerance:.0%}{closest}; "
            "change n, the vocabulary, head_dim or n_layers"
        )
    return best[1]


def depths_near(n: float, fields: dict) -> set[int]:
    """The number of layers that meets n_compute at the default feed-forward width, and its neighbours."""
    n_of_one = counts(ModelConfig(n_layers=1, **fields)).n_compute
    n_of_layer = counts(ModelConfig(n_layers=2, **fields)).n_compute - n_of_one
    ideal = max(1, round(1 + (n - n_of_one) / n_of_layer))
    return {max(1, ideal - 1), ideal, ideal + 1}


def misshape(n: float, config: ModelConfig, free_depth: bool) -> float:
    """How far a model is from its best shape: squared logs of the ratios to the wanted aspect (where the depth is free)
    and to the default feed-forward width.
    """
    stretch = config.d_ff / default_d_ff(config.d_model, config.activation)
    aspect = math.log(config.d_model / config.n_layers / aspect_ratio(n)) ** 2 if free_depth else 0.0
    return aspect + math.log(stretch) ** 2


def fit_d_ff(n: float, n_layers: int, fields: dict) -> ModelConfig:
    """The config of that depth and width whose feed-forward width, in steps of 8 within 40 %, meets n_compute best."""
    config = ModelConfig(n_layers=n_layers, **fields)
    if "d_ff" in fields:
        return config
    per_unit = n_layers * (3 if config.activation == "swiglu" else 2) * config.d_model
    wanted = config.d_ff + (n - counts(config).n_compute) / per_unit
    d_ff = max(8, 8 * round(min(max(wanted, 0.6 * config.d_ff), 1.4 * config.d_ff) / 8))
    return ModelConfig(n_layers=n_layers, **fields, d_ff=d_ff)


def aspect_ratio(n: float) -> float:
    """Width over depth of a well-shaped model: 10 at 1e4 parameters, 128 at 1e11, geometric between.

    The end points are this project's tiny ladder and GPT-3 175B (12,288 / 96); Kaplan et al. (2001.08361, figure 5)
    found the loss flat within a factor of about 2 of the best.
    """
    return 10 * (128 / 10) ** ((math.log10(n) - 4) / 7)


def head_dims(n: float) -> tuple[int, ...]:
    return (8, 16) if n < 1e5 else (16, 32) if n < 1e7 else (64,) if n < 1e9 else (128,)


def shape(config: ModelConfig) -> str:
    """A model's shape in a few characters, for tables: width, layers, heads, feed-forward width, parametrisation."""
    other = "" if config.parametrization == "standard" else f" {config.parametrization}"
    return f"d{config.d_model} L{config.n_layers} H{config.n_heads} F{config.d_ff}{other}"
