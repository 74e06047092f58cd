"""The compiled programs of a run: initial state, training steps, validation, for one shape of run on one mesh.

They depend on the model, the batch shape, the optimiser and the mesh, not on learning rate, schedule, weight decay, D
or seed, and are kept from run to run in a process: a second run of the same shape starts at once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from models.implementation import Implementation
from scaling.alike import compiled_optim
from scaling.config import OptimConfig, RunConfig
from scaling.engine.optim import decays, make_direction
from scaling.engine.sharding import batch_sharding, like_params, param_shardings, placement, replicated
from scaling.execution import Execution

CHUNK_STEPS = 32  # most steps in one call of the compiled program: for small models the call costs as much as a step
LOGIT_BYTES = 2**28  # a device's part of the logits at a time, in float32


class Program(NamedTuple):
    """Compiled functions for one shape of run on one mesh. State: {"params", "opt"}, donated to `steps`.

    `data` of `steps` is {"tokens_XBU"}, or {"corpus", "start_XB"}: the whole corpus and where each window begins.
    """

    abstract_state: Any  #: tree of ShapeDtypeStruct with shardings
    init: Callable  #: key -> state
    steps: Callable  #: state, data, lr_X, decay_X, n -> state, {"loss", "grad_norm"}: n <= X steps
    validate: Callable  #: params, tokens_BU, weight_B -> sum of losses over the weighted windows, nats


def program_for(config: RunConfig, execution: Execution, mesh: Mesh) -> Program:
    """The programs of this run, compiled at their first call, or kept from an earlier run of the same shape."""
    how = implementation(config, execution, mesh)
    return compile_run(
        config.model, compiled_optim(config), config.dtype, mesh, how, execution.accumulate, config.data.seq_len
    )


def implementation(config: RunConfig, execution: Execution, mesh: Mesh) -> Implementation:
    """How this run is computed on the devices of `mesh`; what `execution` leaves open is chosen by their kind."""
    platform = mesh.devices.flat[0].platform
    model, T = config.model, config.data.seq_len
    attention, layers, chunks = execution.attention, execution.layers, execution.loss_chunks
    if attention == "auto":
        attention = {"cpu": "blocked", "gpu": "cudnn", "tpu": "splash"}.get(platform, "plain")
        cudnn = config.dtype == "bfloat16" and model.head_dim % 8 == 0 and model.head_dim <= 128 and T % 64 == 0
        splash = model.head_dim % 128 == 0 and T % 128 == 0
        # The fused kernels and the blocks want the whole of time on a device.
        if mesh.shape["sequence"] > 1 or {"cudnn": not cudnn, "splash": not splash}.get(attention, False):
            attention = "plain"
    wants = {"cudnn": "gpu", "splash": "tpu"}.get(attention)
    if wants and wants != platform:
        raise InputError(
            f"attention = {attention!r}: wants a {wants.upper()}, this is a {platform.upper()}; auto chooses"
        )
    if layers == "auto":
        layers = "unrolled" if platform == "cpu" else "scanned"
    if chunks == 0:
        ways = math.prod(mesh.shape[a] for a in ("data", "fsdp", "sequence")) * execution.accumulate
        vocab = model.vocab_size // (mesh.shape["tensor"] if model.vocab_size % mesh.shape["tensor"] == 0 else 1)
        chunks = max(1, math.ceil(4 * config.tokens_per_step * vocab / ways / LOGIT_BYTES))
    place = placement(mesh)
    return Implementation(
        attention=attention,
        layers=layers,
        remat=execution.remat,
        loss_chunks=chunks,
        transpose_gradients=platform == "cpu",
        constrain=place.constrain,
        per_device=place.per_device,
    )


def fresh_state(model: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> Any:
    params = transformer.init(model, key)
    return {"params": params, "opt": optimizer.init(params)}


@functools.lru_cache(maxsize=32)
def abstract_state(model: ModelConfig, optim: OptimConfig, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes, dtypes and shardings of a run's state; nothing is computed, and an abstract mesh needs no devices."""
    key, optimizer = jax.random.key(0), make_direction(optim, model)
    boxed = jax.eval_shape(lambda key: transformer.init(model, key, boxed=True), key)
    shapes = jax.eval_shape(lambda key: fresh_state(model, optimizer, key), key)
    params = param_shardings(mesh, boxed)
    shardings = {"params": params, "opt": like_params(mesh, shapes["opt"], nn.unbox(boxed), params)}
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


class Functions(NamedTuple):
    """What a run computes, as plain functions of one member: `Program` has them compiled, a swarm maps over them."""

    fresh: Callable
    steps: Callable
    validate: Callable


def functions(
    model: ModelConfig, optim: OptimConfig, dtype: str, how: Implementation, accumulate: int, seq_len: int
) -> Functions:
    compute = jnp.dtype(dtype)
    optimizer = make_direction(optim, model)
    fresh = functools.partial(fresh_state, model, optimizer)

    def gradients(params: Any, tokens_BU: jax.Array) -> tuple[jax.Array, Any]:
        """(loss, gradients) of the mean over the batch, in `accumulate` parts."""

        def loss_fn(params: Any, tokens_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
            return transformer.mean_loss(model, params, tokens_BU, compute, how)

        if accumulate == 1:
            (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens_BU)
            return loss, grads
        B, U = tokens_BU.shape
        # Every so many-th window, so that a part lies over the devices as the batch does.
        parts_ABU = jnp.moveaxis(tokens_BU.reshape(B // accumulate, accumulate, U), 1, 0)

        def add(total: tuple, tokens: jax.Array) -> tuple[tuple, None]:
            tokens = how.constrain(tokens, "batch", None)
            (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens)
            return jax.tree.map(lambda t, new: t + new / accumulate, total, (loss, grads)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zeros, parts_ABU)[0]

    def step(state: Any, tokens_BU: jax.Array, lr: jax.Array, decay: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        loss, grads = gradients(state["params"], tokens_BU)
        direction, opt = optimizer.update(grads, state["opt"], state["params"])
        params = jax.tree.map(
            lambda p, u, decayed: p - lr * u - decay * p if decayed else p - lr * u,
            state["params"],
            direction,
            decays(state["params"]),
        )
        return {"params": params, "opt": opt}, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    def batch_of(data: dict[str, jax.Array], i: jax.Array) -> jax.Array:
        if "tokens_XBU" in data:
            return data["tokens_XBU"][i]
        start_B = data["start_XB"][i]
        return data["corpus"][start_B[:, None] + jnp.arange(seq_len + 1)].astype(jnp.int32)

    def steps(
        state: Any, data: dict[str, jax.Array], lr_X: jax.Array, decay_X: jax.Array, n: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        # A loop whose length is an argument: one compiled body, so that the bits do not depend on how many steps a call
        # makes.
        def body(i: jax.Array, carry: tuple[Any, dict]) -> tuple[Any, dict]:
            state, metrics = carry
            state, new = step(state, batch_of(data, i), lr_X[i], decay_X[i])
            return state, {name: metrics[name].at[i].set(new[name]) for name in metrics}

        zeros_X = jnp.zeros(len(lr_X), jnp.float32)
        return jax.lax.fori_loop(0, n, body, (state, {"loss": zeros_X, "grad_norm": zeros_X}))

    def validate(params: Any, tokens_BU: jax.Array, weight_B: jax.Array) -> jax.Array:
        loss_BT, _ = transformer.next_token_loss(model, params, tokens_BU, compute, how)
        return jnp.sum(loss_BT * weight_B[:, None])

    return Functions(fresh, steps, validate)


@functools.lru_cache(maxsize=32)
def compile_run(
    model: ModelConfig,
    optim: OptimConfig,
    dtype: str,
    mesh: Mesh,
    how: Implementation,
    accumulate: int = 1,
    seq_len: int = 0,
) -> Program:
    """The jitted functions for runs of this model and optimiser on this mesh; shapes compile at their first call."""
    fresh, steps, validate = functions(model, optim, dtype, how, accumulate, seq_len)
    batch, whole = batch_sharding(mesh), replicated(mesh)
    abstract = abstract_state(model, optim, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return Program(
        abstract_state=abstract,
        # Run once, so compiled lightly: the many small random draws took longer to compile than a training step.
        init=jax.jit(
            fresh,
            out_shardings=shardings,
            compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None,
        ),
        steps=jax.jit(
            steps,
            in_shardings=(shardings, None, whole, whole, whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        ),
        validate=jax.jit(validate, in_shardings=(shardings["params"], batch, batch), out_shardings=whole),
    )
