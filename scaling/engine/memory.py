"""Bytes per device of a run on a mesh: what it needs at the least, counted; and what XLA reports for its program."""

import math
import os
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from models.errors import InputError
from models.sizing import counts, shape
from scaling.config import RunConfig
from scaling.engine.feed import example_window
from scaling.engine.parameters import abstract, frozen, full, parts_of
from scaling.engine.program import (
    CHUNK_STEPS,
    VALIDATION_TOKENS,
    abstract_state,
    logit_chunks,
    objective_of,
    program_for,
    validation_windows,
)
from scaling.engine.sharding import batch_sharding, check_mesh, make_mesh
from scaling.execution import AXES, Execution, mesh_sizes


def least_bytes(config: RunConfig, execution: Execution, sizes: dict[str, int]) -> dict[str, int]:
    """What every device holds at the height of a step whatever XLA does, in bytes: the parameters, the optimiser's
    state, the gradients (their norm wants all of them before the first update) and the layer inputs that even full
    remat keeps. `sizes` are those of the mesh's axes; no devices are needed.
    """
    mesh = AbstractMesh(tuple(sizes[a] for a in AXES), AXES)
    parts = parts_of(config)
    state = abstract_state(parts, config.optim, mesh)
    trained = sum(map(local_bytes, jax.tree.leaves(state["params"])))
    still = sum(map(local_bytes, jax.tree.leaves(frozen(parts, abstract(full(parts), mesh)))))
    ways = sizes["data"] * sizes["fsdp"] * sizes["sequence"] * execution.accumulate
    tokens = math.ceil(config.tokens_per_step / ways)
    inputs = config.model.n_layers * tokens * config.model.d_model * jnp.dtype(config.dtype).itemsize
    return {
        "parameter_bytes": trained + still,
        "optimizer_bytes": sum(map(local_bytes, jax.tree.leaves(state["opt"]))),
        "gradient_bytes": trained,
        "layer_input_bytes": inputs,
    }


def validation_bytes(config: RunConfig, sizes: dict[str, int]) -> int:
    """What every device holds at the least of a validation batch besides the state: the part of its logits that is made
    at a time, in float32.
    """
    mesh = AbstractMesh(tuple(sizes[a] for a in AXES), AXES)
    T, vocab, tensor = config.data.seq_len, config.model.vocab_size, sizes["tensor"]
    tokens = validation_windows(T, mesh) * T / (sizes["data"] * sizes["fsdp"] * sizes["sequence"])
    logits = 4 * tokens * (vocab // tensor if vocab % tensor == 0 else vocab)
    return math.ceil(logits / logit_chunks(config, mesh, tokens))


def needed_bytes(config: RunConfig, execution: Execution, sizes: dict[str, int]) -> int:
    """The least that a device must hold: in a step or in a validation, whichever is more."""
    parts = least_bytes(config, execution, sizes)
    state = parts["parameter_bytes"] + parts["optimizer_bytes"]
    return max(sum(parts.values()), state + validation_bytes(config, sizes))


def member_bytes(config: RunConfig) -> int:
    """Bytes that each member of a swarm takes at the most: in a step, or where all are validated; but for the logits of
    a validation, which are made in parts for all members together.
    """
    model, T, sequences = config.model, config.data.seq_len, objective_of(config).sequences
    tokens = max(T, VALIDATION_TOKENS // T * T)
    width = 4 * model.d_model + 3 * model.d_ff  # the residual stream, and the widest values within one layer
    attention = max(1, tokens // T) * model.n_heads * T**2
    validation = 12 * counts(model).n_total + 4 * (tokens * width + attention)
    return max(config.training_bytes, sequences * validation)


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def check_memory(config: RunConfig, execution: Execution, sizes: dict[str, int], limit: int) -> None:
    """Raises InputError where the least a device must hold is more than `limit` bytes, with what would fit."""
    needs = needed_bytes(config, execution, sizes)
    if needs <= limit:
        return
    options = []
    devices = math.prod(sizes.values())
    for what, execution_, sizes_ in alternatives(config, execution, sizes):
        if needed_bytes(config, execution_, sizes_) <= limit:
            options.append(what)
            if math.prod(sizes_.values()) > devices:
                break
    advice = "; ".join(options[:2]) or "no number of devices up to 65,536 holds it with this batch"
    raise InputError(
        f"model {shape(config.model)}: will not fit, needs at least {gib(needs)} on each device of {gib(limit)}; "
        f"would fit: {advice}"
    )


def alternatives(config: RunConfig, execution: Execution, sizes: dict[str, int]):
    """(words, execution, sizes) of cheaper ways, nearest first: accumulate, shard the same devices, shard over more."""
    fits = lambda s, a: runs_on(config, s, a)  # noqa: E731
    for parts in (2**i for i in range(1, 12)):
        if fits(sizes, parts) and parts > execution.accumulate:
            yield f"--accumulate {parts}", replace(execution, accumulate=parts), sizes
    if sizes["data"] > 1:
        merged = {**sizes, "data": 1, "fsdp": sizes["data"] * sizes["fsdp"]}
        if fits(merged, execution.accumulate):
            yield f"--mesh {line_of(merged)}", execution, merged
    for more in (2**i for i in range(1, 17)):
        wider = {**sizes, "fsdp": sizes["fsdp"] * more}
        if not fits(wider, execution.accumulate):  # the batch is too small to be split so far: split the model
            wider = {**sizes, "tensor": sizes["tensor"] * more}
        if fits(wider, execution.accumulate):
            yield f"--mesh {line_of(wider)} on {math.prod(wider.values())} devices", execution, wider


def runs_on(config: RunConfig, sizes: dict[str, int], accumulate: int) -> bool:
    try:
        check_mesh(sizes, config.model, config.batch_size, config.data.seq_len, accumulate)
    except InputError:
        return False
    return True


def line_of(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "data=1"


def device_limit(device: jax.Device) -> int:
    """Bytes that a program may use on this device: what it reports, else an equal part of the host's memory."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host // jax.local_device_count()


def plan(config: RunConfig, execution: Execution, compiled: bool, limit: int | None = None) -> dict[str, Any]:
    """Bytes per device, by part; with `compiled`, the program of the steps is compiled ahead of time for the devices
    that JAX has (virtual ones do) and XLA's own report stands beside. Nothing is allocated.

    Raises InputError where mesh, batch and model do not go together, or the least is above `limit` bytes.
    """
    sizes = mesh_sizes(execution.mesh)
    check_mesh(sizes, config.model, config.batch_size, config.data.seq_len, execution.accumulate)
    if limit is not None:
        check_memory(config, execution, sizes, limit)
    parts = least_bytes(config, execution, sizes)
    n = config.counts
    result = {
        "model": shape(config.model),
        "n_compute": n.n_compute,
        "n_total": n.n_total,
        "mesh": line_of(sizes),
        "devices": math.prod(sizes.values()),
        **parts,
        "validation_bytes": validation_bytes(config, sizes),
        "least_bytes": needed_bytes(config, execution, sizes),
    }
    return result | (xla_report(config, execution, make_mesh(execution.mesh)) if compiled else {})


def xla_report(config: RunConfig, execution: Execution, mesh: Mesh) -> dict[str, Any]:
    """What XLA says one device needs for the program of the training steps: arguments (the state, donated, and 32 steps
    of tokens), temporaries, and their sum, in bytes.
    """
    program = program_for(config, execution, mesh)
    objective, place = objective_of(config), batch_sharding(mesh, axis=1)
    batch_X = {
        name: jax.ShapeDtypeStruct((CHUNK_STEPS, config.batch_size, *x.shape[1:]), x.dtype, sharding=place)
        for name, x in example_window(config, objective).items()
    }
    key = {"seed": np.uint32(0), "first": np.int32(0)} if objective.random else {}
    scalars = jax.ShapeDtypeStruct((CHUNK_STEPS,), np.float32)
    began = time.perf_counter()
    data = {"batch_X": batch_X, **key}
    still = frozen(program.parts, abstract(full(program.parts), mesh))
    done = program.steps.lower(program.abstract_state, still, data, scalars, scalars, 1).compile()
    seconds = time.perf_counter() - began
    needs = done.memory_analysis()
    arguments, temporaries = int(needs.argument_size_in_bytes), int(needs.temp_size_in_bytes)
    beyond = max(0, int(needs.output_size_in_bytes) - int(needs.alias_size_in_bytes))
    return {
        "argument_bytes": arguments,
        "temporary_bytes": temporaries,
        "total_bytes": arguments + temporaries + beyond,
        "compile_seconds": round(seconds, 1),
        "compiled_for": mesh.devices.flat[0].device_kind,
    }


def plan_text(result: dict[str, Any]) -> str:
    """The plan as a few lines."""
    lines = [
        f"{result['model']}: {result['n_total']:,} parameters on {result['devices']} devices ({result['mesh']}), each:"
    ]
    names = {
        "parameter": "parameters",
        "optimizer": "optimiser",
        "gradient": "gradients",
        "layer_input": "layer inputs",
        "validation": "or validation",
    }
    lines += [f"  {words:14s} {gib(result[name + '_bytes'])}" for name, words in names.items()]
    lines.append(f"  {'at the least':14s} {gib(result['least_bytes'])}")
    if "total_bytes" in result:
        kind, seconds = result["compiled_for"], result["compile_seconds"]
        lines.append(f"XLA's report for {kind}, compiled in {seconds:.0f} s:")
        lines.append(f"  {'arguments':14s} {gib(result['argument_bytes'])}")
        lines.append(f"  {'temporaries':14s} {gib(result['temporary_bytes'])}")
        lines.append(f"  {'total':14s} {gib(result['total_bytes'])}")
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"
