"""One run, from its configuration to its result: a jitted step over a mesh, and the loop around it.

The compiled programs depend on the model, the batch shape and the optimiser, not on learning rate, schedule, D or seed,
and are kept from run to run in a process: a second run of the same shape starts at once.
"""

import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from scaling.checkpoint import Checkpointer
from scaling.data.order import batch_windows
from scaling.data.store import TokenStore, open_store
from scaling.optim import learning_rates, make_optimizer
from scaling.run import (
    Execution,
    OptimConfig,
    RunConfig,
    canonical_json,
    check_fits,
    check_run_folder,
    open_run,
    read_json,
    read_result,
    write_atomically,
)
from scaling.sharding import batch_sharding, make_mesh, replicated, tree_shardings

CHUNK_STEPS = 32  # most steps in one call of the compiled program: for small models the call costs as much as a step
CHUNK_SECONDS = 0.25  # the calls are kept about this long, so that a signal or a NaN is noticed soon
PROGRESS_SECONDS = 1.0
VALIDATION_TOKENS = 8_192  # per validation batch: bounds the logits in memory


class Preempted(Exception):
    """The run was told to stop; its state is in a checkpoint and the same command continues it."""


class Busy(Exception):
    """Another process is training this run."""


class Program(NamedTuple):
    """Compiled functions for one shape of run on one mesh. State: {"params", "opt"}, donated to `steps`."""

    abstract_state: Any  #: tree of ShapeDtypeStruct with shardings
    init: Callable  #: key -> state
    steps: Callable  #: state, tokens_XBU, lr_X, n -> state, {"loss_X", "grad_norm_X"}: n <= X steps, X = CHUNK_STEPS
    validate: Callable  #: params, tokens_BU, weight_B -> sum of losses over the weighted windows, nats


def train(
    config: RunConfig,
    folder: Path,
    execution: Execution | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[dict], None] = lambda state: None,
) -> dict[str, Any]:
    """Trains the run in `folder`, continuing from its newest checkpoint, and returns the content of its result.json.

    A finished run is not trained again. A loss that is not finite ends the run with status "diverged".
    Raises InputError before anything is made, Preempted once `should_stop()` is true (state saved), Busy where another
    process holds the run.
    """
    execution = execution or Execution()
    mesh = make_mesh(execution.data_parallel, execution.fsdp)
    if config.batch_size % mesh.size:
        raise InputError(f"batch_size = {config.batch_size}: not divisible by the {mesh.size} devices of the mesh")
    store = open_store(config.data.source, config.data.tokenizer, valid_fraction=config.data.valid_fraction)
    check_fits(config, store)
    check_run_folder(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with lease(folder):
        open_run(folder, config)
        check_corpus(folder, store)
        if (result := read_result(folder)) is not None:
            return result
        run = Run(config, folder, execution, mesh, store, should_stop, report, progress)
        try:
            return run.train()
        finally:
            run.checkpointer.close()


class Run:
    """The state of one training loop; `train` is the way in."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        execution: Execution,
        mesh: Mesh,
        store: TokenStore,
        should_stop: Callable[[], bool],
        report: Callable[[str], None],
        progress: Callable[[dict], None],
    ) -> None:
        self.config, self.folder, self.execution, self.mesh, self.store = config, folder, execution, mesh, store
        self.should_stop, self.report, self.progress = should_stop, report, progress
        optim = dataclasses.replace(config.optim, lr=1.0)
        self.program = compile_run(config.model, optim, config.dtype, mesh)
        self.checkpointer = Checkpointer(folder / "checkpoints", execution.keep_checkpoints)
        self.lr = learning_rates(config)
        self.curve = Curve(folder / "curve.parquet", config.tokens_per_step, self.lr)

    def train(self) -> dict[str, Any]:
        started = time.monotonic()
        config, every = self.config, self.execution.checkpoint_seconds
        start, state = self.start()
        eval_steps = -(-self.execution.eval_every // config.tokens_per_step)
        done, chunk, steady = start, 1, None  # steady: (time, step) after the first call, which compiles
        told = saved = time.monotonic()
        while done < config.steps:
            n = min(chunk, config.steps - done, eval_steps - done % eval_steps if eval_steps else CHUNK_STEPS)
            state, metrics = self.program.steps(state, *self.inputs(done, n), n)
            metrics = jax.device_get(metrics)
            bad = np.flatnonzero(~np.isfinite(metrics["loss"][:n]) | ~np.isfinite(metrics["grad_norm"][:n]))
            self.curve.extend(metrics["loss"][:n], metrics["grad_norm"][:n])
            if len(bad):
                return self.diverged(done + int(bad[0]) + 1, time.monotonic() - started)
            done += n
            if eval_steps and done % eval_steps == 0 and done < config.steps:
                self.curve.validated(done, self.validate(state["params"]))
            now = time.monotonic()
            if steady is None:
                steady = now, done
            else:
                seconds_per_step = (now - steady[0]) / (done - steady[1])
                chunk = max(1, min(CHUNK_STEPS, int(CHUNK_SECONDS / seconds_per_step)))
                if now - told >= PROGRESS_SECONDS:
                    told = now
                    self.tell(done, seconds_per_step)
            stop = self.should_stop()
            if (stop or now - saved >= every) and done < config.steps:
                self.curve.write()
                self.checkpointer.save(done, state)
                saved = time.monotonic()
            if stop and done < config.steps:
                self.checkpointer.close()  # waits until the checkpoint is whole
                raise Preempted(f"stopped after step {done} of {config.steps}; the same command continues")
        trained = time.monotonic()
        if start < config.steps:  # the trained model stays with its run
            self.curve.write()
            self.checkpointer.save(config.steps, state)
        loss = self.validate(state["params"])
        if not math.isfinite(loss):
            return self.diverged(config.steps, time.monotonic() - started)
        self.curve.validated(config.steps, loss)
        self.checkpointer.close()  # waits until the model is on disk: the result comes last
        timing = {
            "seconds": round(time.monotonic() - started, 3),
            "first_call_seconds": round(steady[0] - started, 3) if steady else 0.0,
            "validation_seconds": round(time.monotonic() - trained, 3),
            "resumed_at_step": start,
        }
        if steady and done > steady[1]:
            timing["seconds_per_step"] = round((trained - steady[0]) / (done - steady[1]), 6)
        return self.finish("finished", loss, timing)

    def inputs(self, step: int, n: int) -> tuple[Any, Any]:
        """(tokens_XBU, lr_X) of steps step .. step + n - 1, padded to X = CHUNK_STEPS and placed on the mesh.

        Padding keeps one program for every n: the same steps give the same bits however they are cut into calls.
        """
        config, T = self.config, self.config.data.seq_len
        B = config.batch_size
        indices = batch_windows(self.store.n_train_windows(T), config.data.seed, step, B, steps=n)
        tokens_XBU = np.zeros((CHUNK_STEPS, B, T + 1), np.int32)
        tokens_XBU[:n] = self.store.train_windows(indices, T).reshape(n, B, T + 1)
        lr_X = np.zeros(CHUNK_STEPS, np.float32)
        lr_X[:n] = self.lr[step : step + n]
        return jax.device_put(tokens_XBU, batch_sharding(self.mesh, axis=1)), lr_X

    def start(self) -> tuple[int, Any]:
        """(steps done, state): from the newest whole checkpoint, else fresh from the seed."""
        restored = self.checkpointer.restore(self.program.abstract_state, self.report)
        if restored is not None:
            step, state = restored
            if self.curve.read(step):
                self.report(f"continuing from step {step} of {self.config.steps}")
                return step, state
            self.report(f"the curve up to step {step} is missing or damaged; starting from the beginning")
            self.checkpointer.clear()
        return 0, self.program.init(jax.random.key(self.config.seed))

    def validate(self, params: Any) -> float:
        """Mean cross-entropy over every window of the validation split, nats per token."""
        T = self.config.data.seq_len
        windows_NU = self.store.valid_windows(T)
        size = -(-max(1, VALIDATION_TOKENS // T) // self.mesh.size) * self.mesh.size
        sums = []
        for at in range(0, len(windows_NU), size):
            part_BU = windows_NU[at : at + size]
            weight_B = np.zeros(size, np.float32)
            weight_B[: len(part_BU)] = 1.0
            padded_BU = np.pad(part_BU, ((0, size - len(part_BU)), (0, 0)))
            place = functools.partial(jax.device_put, device=batch_sharding(self.mesh))
            sums.append(self.program.validate(params, place(padded_BU), place(weight_B)))
        return float(np.sum(np.asarray(jax.device_get(sums), np.float64))) / (len(windows_NU) * T)

    def tell(self, done: int, seconds_per_step: float) -> None:
        state = {
            "run": self.config.run_id,
            "step": done,
            "steps": self.config.steps,
            "tokens": done * self.config.tokens_per_step,
            "loss": self.curve.recent_loss(),
            "tokens_per_second": round(self.config.tokens_per_step / seconds_per_step, 1),
            "seconds_left": round(seconds_per_step * (self.config.steps - done), 1),
        }
        write_atomically(self.folder / "progress.json", canonical_json(state))
        self.progress(state)

    def diverged(self, step: int, seconds: float) -> dict[str, Any]:
        self.report(f"loss is not finite at step {step}; the run ends as diverged")
        self.checkpointer.clear()
        return self.finish("diverged", None, {"seconds": round(seconds, 3)}, {"diverged_at_step": step})

    def finish(self, status: str, loss: float | None, timing: dict, extra: dict | None = None) -> dict[str, Any]:
        """Writes the curve, then result.json, last and atomically: only then is the run over."""
        self.curve.write()
        config, store, n = self.config, self.store, self.config.counts
        D, T = config.trained_tokens, config.data.seq_len
        result = {
            "run": config.run_id,
            "status": status,
            "loss": loss,
            "bits_per_byte": None if loss is None else store.bits_per_byte(loss),
            "train_loss": self.curve.recent_loss(),
            "steps": config.steps,
            "tokens": D,
            "unique_tokens": min(D, store.n_train_windows(T) * T),
            "n_nonembedding": n.n_nonembedding,
            "n_compute": n.n_compute,
            "n_total": n.n_total,
            "flops": config.flops,
            "flops_6nd": 6.0 * n.n_compute * D,
            "valid_tokens": store.n_valid_windows(T) * T,
            "corpus": store.key,
            **(extra or {}),
            "timing": timing,
            "where": {
                "jax": jax.__version__,
                "python": platform.python_version(),
                "device": jax.devices()[0].device_kind,
                "devices": self.mesh.size,
            },
        }
        write_atomically(self.folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
        (self.folder / "progress.json").unlink(missing_ok=True)
        return result


class Curve:
    """curve.parquet: one row a step (step, tokens, lr, loss, grad_norm, and valid_loss where validated)."""

    def __init__(self, path: Path, tokens_per_step: int, lr: np.ndarray) -> None:
        self.path, self.tokens_per_step, self.lr = path, tokens_per_step, lr
        self.losses, self.grad_norms = np.zeros((2, len(lr)), np.float32)
        self.steps = 0
        self.valid_loss: dict[int, float] = {}

    @property
    def loss(self) -> np.ndarray:
        """Training loss of the steps so far, nats per token."""
        return self.losses[: self.steps]

    def extend(self, loss: np.ndarray, grad_norm: np.ndarray) -> None:
        """Adds the metrics of the next steps."""
        new = slice(self.steps, self.steps + len(loss))
        self.losses[new], self.grad_norms[new] = loss, grad_norm
        self.steps = new.stop

    def validated(self, step: int, loss: float) -> None:
        self.valid_loss[step] = loss

    def recent_loss(self) -> float | None:
        """Mean training loss of the last 5 % of the steps so far, nats per token."""
        tail = self.loss[-max(1, self.steps // 20) :].astype(np.float64)
        return float(tail.mean()) if len(tail) and np.isfinite(tail).all() else None

    def write(self) -> None:
        step = np.arange(1, self.steps + 1)
        table = pa.table(
            {
                "step": pa.array(step, pa.int64()),
                "tokens": pa.array(step * self.tokens_per_step, pa.int64()),
                "lr": pa.array(self.lr[: self.steps]),
                "loss": pa.array(self.loss),
                "grad_norm": pa.array(self.grad_norms[: self.steps]),
                "valid_loss": pa.array([self.valid_loss.get(int(s)) for s in step], pa.float64()),
            }
        )
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(table, temporary)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, steps: int) -> bool:
        """Takes the first `steps` rows from the file; False where it does not hold them."""
        try:
            table = pq.read_table(self.path, columns=["loss", "grad_norm", "valid_loss"]).slice(0, steps)
            loss, grad_norm = (table[name].to_numpy().astype(np.float32) for name in ("loss", "grad_norm"))
            valid = table["valid_loss"].to_pylist()
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return False
        if table.num_rows < steps:
            return False
        self.steps = 0
        self.extend(loss, grad_norm)
        self.valid_loss = {i + 1: v for i, v in enumerate(valid) if v is not None}
        return True


@functools.lru_cache(maxsize=32)
def compile_run(model: ModelConfig, optim: OptimConfig, dtype: str, mesh: Mesh) -> Program:
    """The jitted functions for runs of this model and optimiser on this mesh; shapes compile at their first call."""
    compute = jnp.dtype(dtype)
    optimizer = make_optimizer(optim)

    def boxed_state(key: jax.Array) -> Any:
        params = transformer.init(model, key, boxed=True)
        return {"params": params, "opt": optimizer.init(params)}

    def loss_fn(params: Any, tokens_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss_BT, log_z_BT = transformer.next_token_loss(model, params, tokens_BU, compute)
        loss = jnp.mean(loss_BT)
        return loss + model.z_loss * jnp.mean(jnp.square(log_z_BT)), loss

    def step(state: Any, tokens_BU: jax.Array, lr: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], tokens_BU)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = jax.tree.map(lambda p, u: p - lr * u, state["params"], updates)
        return {"params": params, "opt": opt}, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    def steps(state: Any, tokens_XBU: jax.Array, lr_X: jax.Array, n: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        # A loop whose length is an argument: one compiled body, so that the bits do not depend on how many steps a call
        # makes.
        def body(i: jax.Array, carry: tuple[Any, dict]) -> tuple[Any, dict]:
            state, metrics = carry
            state, new = step(state, tokens_XBU[i], lr_X[i])
            return state, {name: metrics[name].at[i].set(new[name]) for name in metrics}

        zeros_X = jnp.zeros(len(lr_X), jnp.float32)
        return jax.lax.fori_loop(0, n, body, (state, {"loss": zeros_X, "grad_norm": zeros_X}))

    def validate(params: Any, tokens_BU: jax.Array, weight_B: jax.Array) -> jax.Array:
        loss_BT, _ = transformer.next_token_loss(model, params, tokens_BU, compute)
        return jnp.sum(loss_BT * weight_B[:, None])

    boxed = jax.eval_shape(boxed_state, jax.random.key(0))
    shardings = tree_shardings(mesh, boxed)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )
    batch, whole = batch_sharding(mesh), replicated(mesh)
    return Program(
        abstract_state=abstract,
        # Run once, so compiled lightly: the many small random draws took longer to compile than a training step.
        init=jax.jit(
            lambda key: nn.unbox(boxed_state(key)),
            out_shardings=shardings,
            compiler_options={"xla_backend_optimization_level": 1},
        ),
        steps=jax.jit(
            steps,
            in_shardings=(shardings, batch_sharding(mesh, axis=1), whole, whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        ),
        validate=jax.jit(validate, in_shardings=(shardings["params"], batch, batch), out_shardings=whole),
    )


def check_corpus(folder: Path, store: TokenStore) -> None:
    """Pins the run to the corpus it began with. Raises InputError where a newer version of it is installed."""
    path = folder / "corpus.json"
    if not path.exists():
        write_atomically(path, canonical_json({"corpus": store.key}))
    elif (there := read_json(path).get("corpus")) != store.key:
        raise InputError(f"{folder}: was begun on corpus {there}, now {store.key}; move the folder away to begin anew")


@contextmanager
def lease(folder: Path) -> Iterator[None]:
    """Holds the run while this process lives. Raises Busy where another process of this machine does."""
    with open(folder / "lock", "w") as file:
        for attempt in range(20):  # for a second: `scaling status` holds the lock for a moment when it looks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 19:
                    raise Busy(f"{folder}: another process is training this run") from None
                time.sleep(0.05)
        yield
