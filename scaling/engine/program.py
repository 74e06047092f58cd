"""The compiled programs of a run: initial state, training steps, validation, for one shape of run on one mesh.

They depend on the model, the batch shape, the optimiser and the mesh, not on learning rate, schedule, weight decay, D
or seed, and are kept from run to run in a process: a second run of the same shape starts at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from models import transformer
from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from models.heads import scalar_at
from models.implementation import Implementation
from scaling.alike import compiled_optim
from scaling.config import OptimConfig, RunConfig
from scaling.data.batches import cut
from scaling.engine.optim import decays, make_direction
from scaling.engine.parameters import Parts, abstract, fresh, inherited, shapes_of, whole
from scaling.engine.sharding import batch_sharding, layout, like_params, replicated
from scaling.execution import Execution
from scaling.objectives import Objective, find

CHUNK_STEPS = 32  # most steps in one call of the compiled program: for small models the call costs as much as a step
LOGIT_BYTES = 2**28  # a device's part of the logits at a time, in float32
VALIDATION_TOKENS = 8_192  # per validation batch, as nearly as whole windows make it


class Program(NamedTuple):
    """Compiled functions for one shape of run on one mesh. State: {"params", "opt"}, donated to `steps`.

    `data` of `steps` is {"batch_X": tree of arrays stacked over X steps}, or {"whole": columns of a corpus, "start_XB":
    where each window begins}; for an objective with a key also "seed" and "first", the number of the call's first step.
    """

    abstract_state: Any  #: tree of ShapeDtypeStruct with shardings
    init: Callable  #: key -> state
    inherit: Callable  #: the parameters that a run takes over from its parent, key -> state
    parts: Parts  #: what the parameters are made of
    steps: Callable  #: state, frozen, data, lr_X, decay_X, n -> state, {metric: [X]}: n <= X steps
    validate: Callable  #: params, frozen, batch, weight_B -> sum of losses over the weighted windows
    reference: Callable  #: a parent's params, batch -> what it gives each row, by name, [B]


@dataclass(frozen=True)
class Apply:
    """The model as an objective sees it: params, tokens_BT -> logits_BTV, and losses that need not make them whole."""

    model: ModelConfig
    dtype: jnp.dtype
    how: Implementation

    def __call__(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        return transformer.apply(self.model, params, tokens_BT, self.dtype, self.how)

    def mean_loss(
        self, params: Any, tokens_BU: jax.Array, weight_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(objective, loss): see `models.transformer.mean_loss`."""
        return transformer.mean_loss(self.model, params, tokens_BU, self.dtype, self.how, weight_BT)

    def token_losses(self, params: Any, tokens_BU: jax.Array) -> jax.Array:
        """loss_BT in nats. In training the logits are kept whole, in as many parts as they may be made."""
        return transformer.next_token_loss(self.model, params, tokens_BU, self.dtype, self.how)[0]

    def scalars(self, params: Any, head: str, tokens_BU: jax.Array, last_B: jax.Array) -> jax.Array:
        """[B]: the head of that name, at the token with the number last_B."""
        return scalar_at(self.model, params, params[head], tokens_BU, last_B, self.dtype, self.how)


def objective_of(config: RunConfig) -> Objective:
    """What the run minimises. Raises InputError for an unknown name or option."""
    return find(config.objective.name, config.objective.options)


def program_for(config: RunConfig, execution: Execution, mesh: Mesh) -> Program:
    """The programs of this run, compiled at their first call, or kept from an earlier run of the same shape."""
    return compile_run(recipe(config, execution, mesh), mesh)


@dataclass(frozen=True)
class Recipe:
    """All that the compiled functions depend on besides the mesh: equal recipes share a program."""

    model: ModelConfig
    lora: LoraConfig
    optim: OptimConfig  #: as `compiled_optim` gives it
    objective: Objective
    dtype: str
    how: Implementation
    validation_chunks: int  #: parts that the logits of a validation batch are made in
    accumulate: int
    seq_len: int

    @property
    def parts(self) -> Parts:
        return Parts(self.model, self.lora, tuple(self.objective.heads(self.model).items()))


def recipe(config: RunConfig, execution: Execution, mesh: Mesh, members: int = 1) -> Recipe:
    """The recipe of this run on this mesh. members: how many runs a device holds side by side."""
    T = config.data.seq_len
    ways = math.prod(mesh.shape[a] for a in ("data", "fsdp", "sequence"))
    sequences = objective_of(config).sequences
    return Recipe(
        model=config.model,
        lora=config.lora,
        optim=compiled_optim(config),
        objective=objective_of(config),
        dtype=config.dtype,
        how=implementation(config, execution, mesh),
        validation_chunks=logit_chunks(config, mesh, members * sequences * validation_windows(T, mesh) * T / ways),
        accumulate=execution.accumulate,
        seq_len=T,
    )


def validation_windows(T: int, mesh: Mesh) -> int:
    """Windows of a validation batch: about VALIDATION_TOKENS, and as many on each device."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-max(1, VALIDATION_TOKENS // T) // ways) * ways


def logit_chunks(config: RunConfig, mesh: Mesh, tokens: float) -> int:
    """Parts in which to make a device's logits of so many tokens, for a part to stay within LOGIT_BYTES."""
    vocab, tensor = config.model.vocab_size, mesh.shape["tensor"]
    return max(1, math.ceil(4 * tokens * (vocab // tensor if vocab % tensor == 0 else vocab) / LOGIT_BYTES))


def implementation(config: RunConfig, execution: Execution, mesh: Mesh) -> Implementation:
    """How this run is computed on the devices of `mesh`; what `execution` leaves open is chosen by their kind."""
    platform = mesh.devices.flat[0].platform
    model, objective = config.model, objective_of(config)
    T = config.data.seq_len + objective.reads_last
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
        chunks = logit_chunks(config, mesh, objective.sequences * config.tokens_per_step / ways)
    place = layout(mesh)
    return Implementation(
        attention=attention,
        layers=layers,
        remat=execution.remat,
        loss_chunks=chunks,
        transpose_gradients=platform == "cpu",
        constrain=place.constrain,
        per_device=place.per_device,
    )


def fresh_state(parts: Parts, optimizer: optax.GradientTransformation, key: jax.Array) -> Any:
    params = fresh(parts, key)
    return {"params": params, "opt": optimizer.init(params)}


@functools.lru_cache(maxsize=32)
def abstract_state(parts: Parts, optim: OptimConfig, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes, dtypes and shardings of a run's state; nothing is computed, and an abstract mesh needs no devices."""
    params = abstract(parts, mesh)
    opt = jax.eval_shape(make_direction(optim, parts.model).init, shapes_of(parts))
    places = like_params(mesh, opt, params, jax.tree.map(lambda x: x.sharding, params))
    of_opt = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), opt, places)
    return {"params": params, "opt": of_opt}


class Functions(NamedTuple):
    """What a run computes, as plain functions of one member: `Program` has them compiled, a swarm maps over them."""

    fresh: Callable
    inherit: Callable
    steps: Callable
    validate: Callable
    reference: Callable


def functions(recipe: Recipe) -> Functions:
    parts, objective, accumulate = recipe.parts, recipe.objective, recipe.accumulate
    apply = Apply(recipe.model, jnp.dtype(recipe.dtype), recipe.how)
    optimizer = make_direction(recipe.optim, recipe.model)

    def gradients(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> tuple[dict[str, jax.Array], Any]:
        """(metrics, gradients) of a batch or of a part of it."""

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective.loss(apply, whole(parts, params, frozen), frozen, batch, key)

        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return metrics, grads

    def accumulated(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> tuple[dict[str, jax.Array], Any]:
        """The means of `gradients` over `accumulate` parts of the batch."""

        def parts_of(x: jax.Array) -> jax.Array:
            # Every so many-th row, so that a part lies over the devices as the batch does.
            return jnp.moveaxis(x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]), 1, 0)

        def add(total: tuple, part: tuple[Any, jax.Array | None]) -> tuple[tuple, None]:
            rows, part_key = part
            rows = jax.tree.map(lambda x: recipe.how.constrain(x, "batch", *[None] * (x.ndim - 1)), rows)
            new = gradients(params, frozen, rows, part_key)
            return jax.tree.map(lambda t, new: t + new / accumulate, total, new), None

        zeros = ({name: jnp.zeros(()) for name in objective.metrics}, jax.tree.map(jnp.zeros_like, params))
        keys = None if key is None else jax.random.split(key, accumulate)
        return jax.lax.scan(add, zeros, (jax.tree.map(parts_of, batch), keys))[0]

    def step(state: Any, frozen: Any, batch: Any, key: jax.Array | None, lr: jax.Array, decay: jax.Array) -> tuple:
        of = gradients if accumulate == 1 else accumulated
        metrics, grads = of(state["params"], frozen, objective.whole(batch), key)
        direction, opt = optimizer.update(grads, state["opt"], state["params"])
        params = jax.tree.map(
            lambda p, u, decayed: p - lr * u - decay * p if decayed else p - lr * u,
            state["params"],
            direction,
            decays(state["params"]),
        )
        return {"params": params, "opt": opt}, {**metrics, "grad_norm": optax.tree.norm(grads)}

    def steps(
        state: Any, frozen: Any, data: Any, lr_X: jax.Array, decay_X: jax.Array, n: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        # A loop whose length is an argument: one compiled body, so that the bits do not depend on how many steps a call
        # makes.
        def body(i: jax.Array, carry: tuple[Any, dict]) -> tuple[Any, dict]:
            state, metrics = carry
            state, new = step(state, frozen, *of_step(recipe, data, i), lr_X[i], decay_X[i])
            return state, {name: metrics[name].at[i].set(new[name]) for name in metrics}

        zeros_X = jnp.zeros(len(lr_X), jnp.float32)
        metrics = dict.fromkeys((*objective.metrics, "grad_norm"), zeros_X)
        return jax.lax.fori_loop(0, n, body, (state, metrics))

    def validate(params: Any, frozen: Any, batch: Any, weight_B: jax.Array) -> jax.Array:
        how = dataclasses.replace(recipe.how, loss_chunks=recipe.validation_chunks)
        asked = whole(parts, params, frozen)
        losses = objective.losses(dataclasses.replace(apply, how=how), asked, frozen, batch)
        return jnp.sum(losses * weight_B.reshape(-1, *[1] * (losses.ndim - 1)))

    def reference(params: Any, batch: Any) -> dict[str, jax.Array]:
        how = dataclasses.replace(recipe.how, loss_chunks=recipe.validation_chunks)
        return objective.of_reference(dataclasses.replace(apply, how=how), params, batch)

    def inherit(params: Any, key: jax.Array) -> Any:
        params = inherited(parts, params, key)
        return {"params": params, "opt": optimizer.init(params)}

    return Functions(functools.partial(fresh_state, parts, optimizer), inherit, steps, validate, reference)


def of_step(recipe: Recipe, data: Any, i: jax.Array) -> tuple[Any, jax.Array | None]:
    """(batch, key) of step i of a call. The key is of the run's seed and the step's number, however calls are cut."""
    key = None
    if recipe.objective.random:
        key = jax.random.fold_in(jax.random.key(data["seed"]), data["first"] + i)
    if "batch_X" in data:
        return jax.tree.map(lambda x: x[i], data["batch_X"]), key
    return cut(data["whole"], data["start_XB"][i], recipe.seq_len, jnp), key


@functools.lru_cache(maxsize=32)
def compile_run(recipe: Recipe, mesh: Mesh) -> Program:
    """The jitted functions for runs of this recipe on this mesh; shapes compile at their first call."""
    of_one = functions(recipe)
    batch, everywhere = batch_sharding(mesh), replicated(mesh)
    state = abstract_state(recipe.parts, recipe.optim, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    lightly = {"xla_backend_optimization_level": 1} if on_cpu else None
    return Program(
        abstract_state=state,
        # Run once, so compiled lightly: the many small random draws took longer to compile than a training step.
        init=jax.jit(of_one.fresh, out_shardings=shardings, compiler_options=lightly),
        inherit=jax.jit(of_one.inherit, out_shardings=shardings, compiler_options=lightly),
        parts=recipe.parts,
        steps=jax.jit(
            of_one.steps,
            in_shardings=(shardings, None, None, everywhere, everywhere, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        validate=jax.jit(
            of_one.validate, in_shardings=(shardings["params"], None, batch, batch), out_shardings=everywhere
        ),
        reference=jax.jit(of_one.reference, in_shardings=(None, batch), out_shardings=everywhere),
    )
