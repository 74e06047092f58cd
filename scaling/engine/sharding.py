"""How arrays lie on devices: the one table from logical axis names to mesh axes, and what follows from it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.config import ModelConfig
from models.errors import InputError
from scaling.execution import AXES, mesh_sizes

# Logical axis -> mesh axes. A batch is split over data and fsdp; a parameter over fsdp along its model-width axis, and
# over tensor along heads, feed-forward width and vocabulary; an activation over sequence along time.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "sequence",
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "kv_heads": "tensor",
    "gate": None,
    "q_per_kv": None,
    "qkv": None,
    "head_dim": None,
}


def make_mesh(line: str = "") -> Mesh:
    """The mesh of one line such as "fsdp=4,tensor=2": all devices, of all processes; "" is one device, or all for data.

    Raises InputError where the sizes do not multiply to the devices.
    """
    devices, sizes = jax.devices(), mesh_sizes(line)
    if not line:
        sizes["data"] = len(devices) if jax.process_count() > 1 else 1
        devices = devices[: sizes["data"]]
    if math.prod(sizes.values()) != len(devices):
        axes = " x ".join(f"{k}={v}" for k, v in sizes.items() if v > 1) or "one device"
        raise InputError(
            f"mesh = {line!r}: {axes} makes {math.prod(sizes.values())} devices, {len(devices)} are here; "
            "the sizes must multiply to all of them (CUDA_VISIBLE_DEVICES shows fewer; a CPU has one a core)"
        )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)


def check_mesh(sizes: dict[str, int], model: ModelConfig, batch_size: int, seq_len: int, accumulate: int = 1) -> None:
    """Raises InputError where batch, heads or length do not divide over a mesh of these sizes. Needs no devices."""
    ways = sizes["data"] * sizes["fsdp"]
    if batch_size % (ways * accumulate):
        parts = f"{ways} devices of the mesh's data and fsdp axes" + (
            f" x {accumulate} parts" if accumulate > 1 else ""
        )
        raise InputError(f"batch_size = {batch_size}: not divisible by the {parts}")
    if model.n_kv_heads % sizes["tensor"]:
        raise InputError(f"mesh tensor = {sizes['tensor']}: does not divide model.n_kv_heads = {model.n_kv_heads}")
    if seq_len % sizes["sequence"]:
        raise InputError(f"mesh sequence = {sizes['sequence']}: does not divide data.seq_len = {seq_len}")


@dataclass(frozen=True)
class Layout:
    """What a model needs to know of a mesh, as functions for `models.implementation.Implementation`."""

    mesh: Mesh

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, laid out as its logical axes say."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(self.mesh, x.shape, axes)))

    def per_device(self, function: Callable, in_axes: Any, out_axes: Any) -> Callable:
        """`function` on each device's part; every named axis must divide."""
        if self.mesh.size == 1:
            return function
        specs = [PartitionSpec(*[RULES[a] if a else None for a in axes]) for axes in in_axes]
        out = PartitionSpec(*[RULES[a] if a else None for a in out_axes])
        return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)


@functools.lru_cache(maxsize=32)
def layout(mesh: Mesh) -> Layout:
    """The one Layout of a mesh: methods of two equal objects differ, and with them the programs they are part of."""
    return Layout(mesh)


def spec(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array by its logical axes; one whose size the mesh does not divide stays whole."""
    placed = []
    for size, name in zip(shape, axes, strict=True):
        axis = RULES[name] if name else None
        ways = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        placed.append(axis if axis is not None and size % ways == 0 else None)
    return PartitionSpec(*placed)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """For arrays whose given axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """A sharding for each parameter of a boxed abstract tree."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(mesh, leaf.value.shape, leaf.names)),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def like_params(mesh: Mesh, state: Any, params: Any, shardings: Any) -> Any:
    """Shardings for an optimiser's state: an array that mirrors a parameter (its path ends in the parameter's path, and
    the shapes agree) lies as that one does; any other, a count or a factored moment, is small and lies whole.
    """
    known = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding_of(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(jax.tree_util.keystr(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, state)
