"""How fast a trained model writes on this machine: `scaling bench generate`.

A row is a width and a batch: so many prompts of PROMPT tokens, each continued by TOKENS through
`scaling.generate.sample`, as a user would, with random parameters. Prefill is the time to the first token; the steps
are what every further token costs. Beside them stands what the machine would allow: each token's products at the rate
of a large matrix product, or each step's reading of weights and caches at the rate at which so many bytes are read.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.sizing import counts
from scaling.bench.train import device_name, matrix_product
from scaling.generate import sample

PROMPT, TOKENS = 32, 96
MODELS = tuple(
    ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads)
    for d_model, n_layers, n_heads in ((64, 3, 2), (128, 4, 4), (256, 6, 8))
)
BATCHES = (1, 16, 64, 256)


def bench_generate(
    seconds: float, models: tuple[ModelConfig, ...] = MODELS, batches: tuple[int, ...] = BATCHES
) -> list[dict[str, Any]]:
    """A row per model and batch; `seconds` of measurement for each of its two times."""
    peak, rows = matrix_product("float32"), []
    for model in models:
        params, single = transformer.init(model, jax.random.key(0)), None
        for batch in batches:
            first = median_seconds(model, params, batch, 1, seconds)
            whole = median_seconds(model, params, batch, 1 + TOKENS, seconds)
            rate = batch * TOKENS / max(whole - first, 1e-9)
            single = single or rate
            of_arithmetic, of_memory = bounds(model, batch, peak)
            bound = min(of_arithmetic, of_memory)
            rows.append(
                {
                    "d_model": model.d_model,
                    "n_layers": model.n_layers,
                    "batch": batch,
                    "prompt": PROMPT,
                    "tokens": TOKENS,
                    "prefill_seconds": round(first, 6),
                    "prefill_tokens_per_second": round(batch * PROMPT / first, 1),
                    "tokens_per_second": round(rate, 1),
                    "times_smallest_batch": round(rate / single, 2),
                    "bound_tokens_per_second": round(bound, 1),
                    "bound_by": "arithmetic" if bound == of_arithmetic else "memory",
                    "share_of_bound": round(rate / bound, 4),
                    "peak_gflops": round(peak / 1e9, 1),
                    "device": device_name(jax.devices()[0]),
                    "jax": jax.__version__,
                }
            )
    return rows


def median_seconds(model: ModelConfig, params: Any, batch: int, tokens: int, seconds: float) -> float:
    """Of writing so many tokens after each of `batch` prompts, compiled before."""
    prompts = list(np.random.default_rng(0).integers(1, model.vocab_size, (batch, PROMPT)))
    write = functools.partial(sample, model, params, prompts, 1, tokens)
    write()
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        began = time.perf_counter()
        write()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def bounds(model: ModelConfig, batch: int, peak: float) -> tuple[float, float]:
    """Tokens a second at most: by the products of a token, and by what a step reads; at the mean length of a text."""
    length, attended = PROMPT + TOKENS / 2, model.n_heads * model.head_dim
    flops = 2 * counts(model).n_compute + 4 * model.n_layers * attended * length
    caches = 2 * model.n_layers * model.n_kv_heads * model.head_dim * length * batch
    read = 4 * int(counts(model).n_compute + caches)
    return peak / flops, batch * reading_rate(read) / read


@functools.lru_cache(maxsize=64)
def reading_rate(size: int) -> float:
    """Bytes a second at which an array of so many bytes is read again and again: the best of a second's tries."""
    x = jnp.ones((max(1, size // 4096), 1024), jnp.float32)
    y = jnp.ones(1024, jnp.float32)
    read = jax.jit(jnp.matmul)
    jax.block_until_ready(read(x, y))
    best, until = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < until:
        began = time.perf_counter()
        jax.block_until_ready(read(x, y))
        best = min(best, time.perf_counter() - began)
    return x.nbytes / best
