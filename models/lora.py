"""Low-rank adapters (LoRA, 2106.09685): W + (alpha / rank) A B on named matrices, of which only A and B are trained.

A tree of adapters has the shape of the model's: where that has a matrix, it has {"a": A_MR, "b": B_RN}, with M the
matrix's rows (all its input axes) and N its columns. B starts at zero, so that the model starts as its base.

Letters: M rows, N columns, R rank.
"""

from typing import Any

import jax
import jax.numpy as jnp

from models.config import LoraConfig, ModelConfig
from models.sizing import matrices


def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Any:
    """Fresh adapters, float32: A normal with standard deviation M^-1/2, so that x A has the scale of x (of an
    embedding, which picks one row, 1); B zero.
    """
    adapters: dict[str, Any] = {}
    for i, (path, (M, N)) in enumerate(adapted(config, lora).items()):
        std = 1.0 if path[-1] == "embed" else M**-0.5
        pair = {
            "a": std * jax.random.normal(jax.random.fold_in(key, i), (M, lora.rank)),
            "b": jnp.zeros((lora.rank, N)),
        }
        place = adapters
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = pair
    return adapters


def adapted(config: ModelConfig, lora: LoraConfig) -> dict[tuple[str, ...], tuple[int, int]]:
    """(M, N) of each matrix that has an adapter, by its path."""
    return {path: shape for path, shape in matrices(config).items() if path[-1] in lora.targets}


def merged(lora: LoraConfig, base: Any, adapters: Any) -> Any:
    """The whole model's parameters: `base` with what the adapters add; what else stands among these is taken as it is.

    Nothing of `base` is changed; what has no adapter is shared.
    """
    whole = dict(base)
    for name, part in adapters.items():
        if not isinstance(part, dict):
            whole[name] = part
        elif set(part) == {"a", "b"}:
            change_MN = jnp.matmul(part["a"], part["b"], precision=jax.lax.Precision.HIGHEST)
            whole[name] = base[name] + (lora.alpha / lora.rank) * change_MN.reshape(base[name].shape)
        else:
            whole[name] = merged(lora, base[name], part)
    return whole
