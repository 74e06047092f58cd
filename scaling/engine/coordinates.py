"""The coordinate check: how far every activation moves in ten steps, against the width or the depth of the model.

Under a parametrisation that transfers hyperparameters it moves as far at any size (2203.03466, appendix D.1): the slope
of log RMS change against log width (or depth) is near zero. Where one slopes, the learning rate will not carry over.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from models.transformer import Params, Transformer
from scaling.config import ObjectiveConfig, RunConfig
from scaling.engine.program import CHUNK_STEPS, program_for
from scaling.engine.sharding import batch_sharding, make_mesh
from scaling.execution import Execution

STEPS = 10


def slopes(changes: pd.DataFrame, axis: str = "d_model") -> pd.Series:
    """Slope of log RMS change against log size, by activation. changes: as `changes_over` gives it.

    Raises InputError for fewer than three sizes.
    """
    if changes[axis].nunique() < 3:
        raise InputError(f"coordinate check: {changes[axis].nunique()} values of {axis}; give at least three")
    mean = changes.pivot_table(index=axis, columns="activation", values="log_rms", aggfunc="mean")
    if axis == "n_layers":  # what lies within the first block is nearer the bottom the more blocks there are
        mean = mean[[name for name in mean if not name.startswith("first.")]]
    return pd.Series(np.polyfit(np.log(mean.index), mean.to_numpy(), 1)[0], index=mean.columns, name="slope")


def changes_over(configs: Sequence[RunConfig], steps: int = STEPS) -> pd.DataFrame:
    """Rows d_model, n_layers, seed, activation, log_rms: one for each run and activation."""
    rows = []
    for config in configs:
        for name, rms in change(config, steps).items():
            at = {"d_model": config.model.d_model, "n_layers": config.model.n_layers, "seed": config.seed}
            rows.append(at | {"activation": name, "log_rms": math.log(rms)})
    return pd.DataFrame(rows)


def change(config: RunConfig, steps: int = STEPS) -> dict[str, float]:
    """RMS change of every activation after `steps` steps of the run's own optimiser at its peak learning rate.

    The tokens are random, the same for every model of one vocabulary, and the next one is what is learnt, whatever the
    run's objective: no corpus is needed.
    """
    config = dataclasses.replace(config, objective=ObjectiveConfig(), parent="", lora=LoraConfig())
    mesh = make_mesh()
    program = program_for(config, Execution(layers="scanned"), mesh)  # compiles as fast at any depth
    tokens_XBU = topics(config.model.vocab_size, (CHUNK_STEPS, config.batch_size, config.data.seq_len + 1))
    lr = np.full(CHUNK_STEPS, config.optim.lr, np.float32)
    decay = lr * np.float32(config.optim.weight_decay)
    if config.optim.decay == "independent":
        decay = np.full(CHUNK_STEPS, config.optim.weight_decay, np.float32)
    state = program.init(jax.random.key(config.seed))
    look = activations(config.model, jnp.dtype(config.dtype))
    seen = tokens_XBU[0, :, :-1]
    before = look(state["params"], seen)
    data = {"batch_X": {"tokens_BU": jax.device_put(tokens_XBU, batch_sharding(mesh, axis=1))}}
    state, _ = program.steps(state, {}, data, lr, decay, steps)
    after = look(state["params"], seen)
    return {name: float(jnp.sqrt(jnp.mean(jnp.square(after[name] - before[name])))) for name in before}


@functools.lru_cache(maxsize=32)
def activations(model: ModelConfig, dtype: jnp.dtype) -> Callable[[Params, jax.Array], dict[str, jax.Array]]:
    """(params, tokens_BT) -> every activation by name: of the first block, of the middle half, and at the top."""

    def look(params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        def catch(module, method: str) -> bool:
            return method in ("__call__", "attention", "feed_forward")

        _, kept = Transformer(model, dtype).apply(
            {"params": params}, tokens_BT, capture_intermediates=catch, mutable=["intermediates"]
        )
        kept, L = kept["intermediates"], model.n_layers
        blocks = [inside(kept[f"block_{i}"]) for i in range(L)]
        # Places whose mean height is the same at every depth, half-way up, and whose mean scatters less than one block:
        # a feed-forward part lies half a block above its block's input.
        lower, upper = (L // 4, 3 * L // 4) if L >= 4 else (0, L - 1)
        parts = {name: name in ("norm_feed_forward", "up", "feed_forward") for name in blocks[0] if name != "residual"}
        values = {f"first.{name}": blocks[0][name] for name in parts}
        for name, above in parts.items():
            middle = blocks[lower : upper + (0 if above and L >= 4 else 1)]
            values[f"middle.{name}"] = jnp.stack([block[name] for block in middle])
        values |= {"embedding": params["embed"][tokens_BT], "last.residual": blocks[-1]["residual"]}
        return values | {"norm_out": kept["norm_out"]["__call__"][0], "logits": kept["__call__"][0][0]}

    def inside(block: dict) -> dict[str, jax.Array]:
        """The outputs of a block's parts, and its own: the residual stream above it."""
        named = {name: (x["__call__"] if isinstance(x, dict) else x)[0] for name, x in block.items()}
        alone = {name: x[0] if isinstance(x, tuple) else x for name, x in named.items()}  # of (activation, cache)
        return {name.replace("__call__", "residual"): x.astype(jnp.float32) for name, x in alone.items()}

    return jax.jit(look)


def topics(vocab: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Tokens int32, `shape`: half of a window's tokens are of its topic, one of eight, the others say nothing of it.

    So attention too has something to learn, where to look and what to fetch: updates made of noise average out,
    differently at every width.
    """
    rng = np.random.default_rng(seed)
    each = max(1, min(vocab, 64) // 9)
    topic = rng.integers(1, max(2, min(vocab, 64) // each), shape[:-1])[..., None]
    says = rng.random(shape) < 0.5
    return (np.where(says, topic, 0) * each + rng.integers(0, each, shape)).astype(np.int32)


def widths(base: RunConfig, values: Sequence[int], seeds: Sequence[int] = (0,)) -> list[RunConfig]:
    """`base` at other widths, heads of the same size."""
    K = base.model.head_dim
    return [sized(base, seed, d_model=D, n_heads=D // K) for D in values for seed in seeds]


def depths(base: RunConfig, values: Sequence[int], seeds: Sequence[int] = (0,)) -> list[RunConfig]:
    return [sized(base, seed, n_layers=L) for L in values for seed in seeds]


def sized(base: RunConfig, seed: int, **changes) -> RunConfig:
    from models.config import replace

    return dataclasses.replace(base, model=replace(base.model, **changes), seed=seed)
