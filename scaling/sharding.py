"""How arrays lie on devices: the one table from logical axis names to mesh axes, and what follows from it."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import InputError

AXES = ("data", "fsdp")

# Logical axis -> mesh axis. A batch is split over all devices; a parameter over fsdp along its model-width axis.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": None,
    "mlp": None,
    "gate": None,
    "kv_heads": None,
    "q_per_kv": None,
    "qkv": None,
    "head_dim": None,
}


def make_mesh(data: int = 1, fsdp: int = 1) -> Mesh:
    """A mesh of data x fsdp devices. Raises InputError where the machine has fewer, or a size is below 1."""
    devices = jax.devices()
    if data < 1 or fsdp < 1:
        raise InputError(f"mesh of data = {data} x fsdp = {fsdp}: expected sizes of at least 1")
    if data * fsdp > len(devices):
        raise InputError(f"mesh of data = {data} x fsdp = {fsdp}: {data * fsdp} devices wanted, {len(devices)} here")
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp), AXES, axis_types=auto, devices=devices[: data * fsdp])


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """For arrays whose given axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, abstract: Any) -> Any:
    """A sharding for each array of a boxed abstract tree (parameters, or an optimiser state made from them).

    An axis whose size the mesh axis does not divide stays whole; so does an array without axis names.
    """

    def one(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        axes = []
        for size, name in zip(leaf.value.shape, leaf.names, strict=True):
            axis = RULES[name]
            axes.append(axis if axis is not None and size % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(one, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
