"""Which arrays of a run are trained and which are frozen, and where they begin: fresh, or as a parent left them."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from models import lora as adapters
from models import transformer
from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from scaling.chain import Parent, parent_of
from scaling.config import RunConfig
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.hosts import agree
from scaling.engine.sharding import param_shardings
from scaling.objectives import find


class Parts(NamedTuple):
    """What the parameters of a run are made of. Hashable."""

    model: ModelConfig
    lora: LoraConfig  #: with a rank, adapters are trained and the model is frozen
    heads: tuple[tuple[str, tuple[int, ...]], ...] = ()  #: arrays beside the model's, by name; they start at zero


def parts_of(config: RunConfig) -> Parts:
    objective = find(config.objective.name, config.objective.options)
    return Parts(config.model, config.lora, tuple(objective.heads(config.model).items()))


def fresh(parts: Parts, key: jax.Array, boxed: bool = False) -> Any:
    """What is trained, from random numbers; boxed: each array in its box of logical axis names."""

    def box(x: jax.Array) -> Any:
        return nn.Partitioned(x, (None,) * x.ndim) if boxed else x

    if parts.lora.rank:
        trained = jax.tree.map(box, adapters.init(parts.model, parts.lora, key))
    else:
        trained = transformer.init(parts.model, key, boxed)
    return trained | {name: box(jnp.zeros(shape)) for name, shape in parts.heads}


def inherited(parts: Parts, params: Any, key: jax.Array) -> Any:
    """What is trained by a run that starts from `params`, as `whole` gives them."""
    if not parts.lora.rank:
        return params
    return fresh(parts, key) | {name: params[name] for name, _ in parts.heads}


def frozen(parts: Parts, params: Any) -> Any:
    """What is not trained of the parameters that a run starts from; {} where all are."""
    heads = dict(parts.heads)
    return {name: x for name, x in params.items() if name not in heads} if parts.lora.rank else {}


def whole(parts: Parts, trained: Any, frozen: Any) -> Any:
    """The parameters that the model is asked with, the heads among them."""
    return adapters.merged(parts.lora, frozen, trained) if parts.lora.rank else trained


@functools.lru_cache(maxsize=128)
def shapes_of(parts: Parts, boxed: bool = False) -> Any:
    """Shapes and dtypes of what is trained, a tree of ShapeDtypeStruct. Kept: the model is traced for them."""
    if not boxed:
        return nn.unbox(shapes_of(parts, boxed=True))
    return jax.eval_shape(lambda: fresh(parts, jax.random.key(0), boxed=True))


def abstract(parts: Parts, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes and shardings of what is trained, a tree of ShapeDtypeStruct."""
    places = param_shardings(mesh, shapes_of(parts, boxed=True))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes_of(parts), places
    )


def full(parts: Parts) -> Parts:
    """Those of a run that trains all of the model: what `whole` gives."""
    return parts._replace(lora=LoraConfig())


def taken_over(parent: Parent, parts: Parts, mesh: Mesh) -> Any:
    """The final parameters of a run's parent on the mesh, with the heads that `parts` has: the parent's, else zeros.

    On several hosts all call it. Raises InputError, on all, where they do not read back whole.
    """
    there = parts_of(parent.config)
    shared = tuple(head for head in parts.heads if head in there.heads)
    wanted = abstract(full(parts)._replace(heads=shared), mesh)
    if there.lora.rank:
        trained = read(parent, abstract(there._replace(heads=shared), mesh))
        base = taken_over(parent_of(parent.config, parent.folder), Parts(there.model, LoraConfig()), mesh)
        merge = jax.jit(adapters.merged, static_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))
        params = merge(there.lora, base, trained)
    else:
        params = read(parent, wanted)
    lacking = tuple(head for head in parts.heads if head not in shared)
    places = abstract(full(parts)._replace(heads=lacking), mesh)
    return params | {name: jax.device_put(jnp.zeros(shape), places[name].sharding) for name, shape in lacking}


def read(parent: Parent, wanted: Any) -> Any:
    """Those of the arrays that the parent trained that `wanted` names, as of its last step."""
    step, reason, params = parent.config.steps, "", None
    try:
        params = Checkpointer(parent.folder / "checkpoints").read_part(step, {"params": wanted})["params"]
    except (MemoryError, PermissionError):  # no fault of the checkpoint's
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    if agree(params is None).any():
        raise InputError(
            f"parent = {parent.config.run_id!r}: its checkpoint of step {step} in {parent.folder} is missing or "
            f"damaged ({reason or 'as another host says'}); remove its result.json and train it again"
        )
    return params
