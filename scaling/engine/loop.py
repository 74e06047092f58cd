"""One run, from its configuration to its result: the loop around the compiled step, checkpoints, the run's record.

On several hosts every process runs this loop in step: what depends on a clock or a signal is agreed on between calls of
the compiled program, each host reads its own part of a batch, and process 0 writes the record.
"""

import errno
import functools
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from models.errors import InputError
from scaling.config import RunConfig, canonical_json, check_fits
from scaling.data.order import batch_windows
from scaling.data.store import TokenStore, open_store
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.hosts import agree
from scaling.engine.lease import Busy as Busy
from scaling.engine.lease import Held, lease
from scaling.engine.memory import check_memory, device_limit
from scaling.engine.program import CHUNK_STEPS, implementation, program_for
from scaling.engine.schedules import learning_rates, weight_decays
from scaling.engine.sharding import batch_sharding, check_mesh, make_mesh, replicated
from scaling.engine.tracking import check_sinks, open_sinks
from scaling.execution import Execution
from scaling.folder import check_run_folder, open_run, read_json, write_atomically
from scaling.provenance import software
from scaling.result import RunResult, read_result, result_of
from scaling.trust import check_links

CHUNK_SECONDS = 0.25  # the calls are kept about this long, so that a signal or a NaN is noticed soon
PROGRESS_SECONDS = 1.0
RESIDENT_BYTES = 2**28  # a corpus up to this size is kept on the device
BRANCHES = "branches"
VALIDATION_TOKENS = 8_192  # per validation batch: bounds the logits in memory


class Preempted(Exception):
    """The run was told to stop; its state is in a checkpoint and the same command continues it."""


@dataclass(frozen=True)
class Sharing:
    """What a run leaves for runs that begin as it does, and where it may find the same. None of it changes a result."""

    saves: tuple[int, ...] = ()  #: steps at which the state is kept, in branches/
    sources: tuple[tuple[Path, int], ...] = ()  #: (a run's folder, steps that this run has in common with it)


ALONE = Sharing()


def train(
    config: RunConfig,
    folder: Path,
    execution: Execution | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[dict], None] = lambda state: None,
    sharing: Sharing = ALONE,
    held: Held | None = None,
) -> RunResult:
    """Trains the run in `folder`, continuing from its newest checkpoint, else from the latest state that another run
    of `sharing` kept, and returns its result.

    A finished run is not trained again. A loss that is not finite ends the run with status "diverged".
    Raises InputError before anything is made, Preempted once `should_stop()` is true (state saved), Busy where another
    process holds the run, or took it over while this one was silent. `held`: the lease, where the caller has it.
    """
    execution = execution or Execution()
    mesh = make_mesh(execution.mesh)
    store = check(config, folder, execution, mesh)
    mine = lease(folder, report=report) if first_host() and held is None else nullcontext(held)
    with mine as held:
        if first_host():
            begin(config, folder, store)
        agree(0)  # the others go on once the folder is ready
        if (result := read_result(folder)) is not None:
            return result
        run = Run(config, folder, execution, mesh, store, should_stop, report, progress, sharing, held)
        try:
            return run.train()
        finally:
            run.kept.close()
            run.checkpointer.close()


def check(config: RunConfig, folder: Path, execution: Execution, mesh: Mesh) -> TokenStore:
    """The run's corpus. Raises InputError where the run cannot be trained so; makes nothing."""
    check_sinks(execution.track)
    implementation(config, execution, mesh)
    check_mesh(dict(mesh.shape), config.model, config.batch_size, config.data.seq_len, execution.accumulate)
    store = open_store(config.data.source, config.data.tokenizer, valid_fraction=config.data.valid_fraction)
    check_fits(config, store)
    check_run_folder(folder, config)
    check_memory(config, execution, dict(mesh.shape), device_limit(mesh.local_devices[0]))
    return store


def begin(config: RunConfig, folder: Path, store: TokenStore) -> None:
    """The run's folder, ready to be trained in. The caller holds the lease."""
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder)
    open_run(folder, config)
    check_corpus(folder, store)
    (folder / "failed.json").unlink(missing_ok=True)


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
        sharing: Sharing,
        held: Held | None,  # None on all hosts but the first
    ) -> None:
        self.config, self.folder, self.execution, self.mesh, self.store = config, folder, execution, mesh, store
        self.should_stop, self.report, self.progress = should_stop, report, progress
        self.sharing, self.held = sharing, held
        self.program = program_for(config, execution, mesh)
        self.checkpointer = Checkpointer(folder / "checkpoints", execution.keep_checkpoints)
        self.kept = Checkpointer(folder / BRANCHES, None)
        self.branch: dict[str, Any] = {}  # what branch.json holds: the run and the step that this one continues from
        self.saved = 0  # the step of the run's own newest checkpoint
        self.lr, self.decay = learning_rates(config), weight_decays(config)
        self.curve = Curve(folder / "curve.parquet", config.tokens_per_step, self.lr)

    def train(self) -> RunResult:
        started = time.monotonic()
        config, every = self.config, self.execution.checkpoint_seconds
        start, state = self.start()
        eval_steps = -(-self.execution.eval_every // config.tokens_per_step)
        done, chunk, steady = start, 1, None  # steady: (time, step) after the first call, which compiles
        told = saved = time.monotonic()
        under_way: tuple[int, int, Any] | None = None  # (first step, steps, metrics) of a call not yet looked at
        while done < config.steps:
            if done in self.sharing.saves:
                self.keep(done, state)
            to_save = min((s - done for s in self.sharing.saves if s > done), default=CHUNK_STEPS)
            to_validate = eval_steps - done % eval_steps if eval_steps else CHUNK_STEPS
            n = min(chunk, config.steps - done, to_validate, to_save)
            state, metrics = self.program.steps(state, *self.inputs(done, n), n)
            # While the device computes this call, the host looks at the one before; the first, which compiles, is
            # waited for.
            before, under_way = under_way, (done, n, metrics)
            done += n
            if steady is None:
                before, under_way = under_way, None
            bad = self.record(*before) if before else 0
            now = time.monotonic()
            if steady is None:
                steady = now, done
            elif self.curve.steps > steady[1]:
                seconds_per_step = (now - steady[0]) / (self.curve.steps - steady[1])
                chunk = max(1, min(CHUNK_STEPS, int(CHUNK_SECONDS / seconds_per_step)))
                if now - told >= PROGRESS_SECONDS:
                    told = now
                    self.tell(self.curve.steps, seconds_per_step)
            all_hosts = agree(self.should_stop(), now - saved >= every, chunk)
            stop, save, chunk = bool(all_hosts[:, 0].any()), bool(all_hosts[:, 1].any()), int(all_hosts[0, 2])
            validate = eval_steps and done % eval_steps == 0 and done < config.steps
            keep = done in self.sharing.saves
            if under_way and not bad and (stop or save or validate or keep or done == config.steps):
                bad, under_way = self.record(*under_way), None
            if bad:
                return self.diverged(bad, time.monotonic() - started)
            if validate:
                self.validated(done, self.validate(state["params"]))
            if (stop or save) and done < config.steps:
                self.save(done, state)
                saved = time.monotonic()
            if stop and done < config.steps:
                self.checkpointer.close()  # waits until the checkpoint is whole
                self.sinks.finish("preempted", {})
                raise Preempted(f"stopped after step {done} of {config.steps}; the same command continues")
        trained = time.monotonic()
        self.save(config.steps, state)  # the trained model stays with its run
        if config.steps in self.sharing.saves:
            self.keep(config.steps, state)
        loss = self.validate(state["params"])
        if not math.isfinite(loss):
            return self.diverged(config.steps, time.monotonic() - started)
        self.validated(config.steps, loss)
        self.kept.close()
        self.checkpointer.close()  # waits until the model is on disk: the result comes last
        timing = {
            "seconds": round(time.monotonic() - started, 3),
            "first_call_seconds": round(steady[0] - started, 3) if steady else 0.0,
            "validation_seconds": round(time.monotonic() - trained, 3),
            "resumed_at_step": start,
        }
        if steady and done > steady[1]:
            timing["seconds_per_step"] = round((trained - steady[0]) / (done - steady[1]), 6)
        return self.finish(loss, timing)

    def record(self, first: int, n: int, metrics: Any) -> int:
        """Notes the metrics of a call of n steps from step `first` on; the step whose loss is not finite, or 0."""
        loss, grad_norm = (np.asarray(jax.device_get(metrics[name]))[:n] for name in ("loss", "grad_norm"))
        self.curve.extend(loss, grad_norm)
        self.sinks.log_steps(first + 1, {"train/loss": loss, "train/grad_norm": grad_norm, "lr": self.lr[first:][:n]})
        bad = np.flatnonzero(~np.isfinite(loss) | ~np.isfinite(grad_norm))
        return first + int(bad[0]) + 1 if len(bad) else 0

    def validated(self, step: int, loss: float) -> None:
        self.curve.validated(step, loss)
        self.sinks.log(step, {"valid/loss": loss})

    def check_held(self) -> None:
        """Raises Lost where another process took the run over: this one was paused for longer than a lease lives."""
        if self.held is not None:
            self.held.check()

    def save(self, step: int, state: Any) -> None:
        if step == self.saved:  # resumed there: orbax takes no step twice
            return
        self.check_held()
        if first_host():
            self.curve.write()
        self.kept.close()  # a run that goes on from here has passed its branches: they must be whole
        self.checkpointer.save(step, state)
        self.saved = step

    def keep(self, step: int, state: Any) -> None:
        """Keeps the state as of `step` for runs that branch here; they read the curve up to it as well."""
        self.check_held()
        if step not in self.kept.steps():
            if first_host():
                self.curve.write()
            self.kept.save(step, state)

    def inputs(self, step: int, n: int) -> tuple[Any, Any, Any]:
        """(data, lr_X, decay_X) of steps step .. step + n - 1, padded to X = CHUNK_STEPS and placed on the mesh.

        Padding keeps one program for every n: the same steps give the same bits however they are cut into calls. A
        small corpus lies on the device whole, and only the beginnings of the windows are sent.
        """
        config, T = self.config, self.config.data.seq_len
        B = config.batch_size
        n_windows, data_seed = self.store.n_train_windows(T), config.data.seed
        windows = batch_windows(n_windows, data_seed, step, B, n, config.unique_windows).reshape(n, B)
        scalars = []
        for values in (self.lr, self.decay):
            scalars.append(np.zeros(CHUNK_STEPS, np.float32))
            scalars[-1][:n] = values[step : step + n]
        if self.mesh.size == 1 and self.store.train.nbytes <= RESIDENT_BYTES and len(self.store.train) < 2**31:
            start_XB = np.zeros((CHUNK_STEPS, B), np.int32)
            start_XB[:n] = windows * T
            return {"corpus": resident(self.store, self.mesh), "start_XB": start_XB}, *scalars

        def part(index: tuple[slice, ...]) -> np.ndarray:
            """The tokens of a device: of the steps that are run, and of its windows."""
            mine = windows[:, index[1]]
            tokens_XBU = np.zeros((CHUNK_STEPS, mine.shape[1], T + 1), np.int32)
            tokens_XBU[:n] = self.store.train_windows(mine.ravel(), T).reshape(n, -1, T + 1)
            return tokens_XBU

        sharding = batch_sharding(self.mesh, axis=1)
        return {"tokens_XBU": jax.make_array_from_callback((CHUNK_STEPS, B, T + 1), sharding, part)}, *scalars

    def start(self) -> tuple[int, Any]:
        """(steps done, state): from the newest whole checkpoint, else from a trunk, else fresh from the seed."""
        step, state = self.restored() or self.from_trunk() or (0, None)
        if state is None:
            state = self.program.init(jax.random.key(self.config.seed))
        track = self.execution.track if first_host() else ""
        self.sinks = open_sinks(track, self.config, self.folder, step, self.report)
        return step, state

    def restored(self) -> tuple[int, Any] | None:
        """(steps, state) from the run's own newest whole checkpoint."""
        restored = self.checkpointer.restore(self.program.abstract_state, self.report)
        if restored is not None:
            step, state = restored
            if self.curve.read(step):
                self.saved = step
                if (self.folder / "branch.json").exists():
                    self.branch = read_json(self.folder / "branch.json")
                self.report(f"continuing from step {step} of {self.config.steps}")
                return step, state
            self.report(f"the curve up to step {step} is missing or damaged; starting from the beginning")
            self.checkpointer.clear()
        return None

    def from_trunk(self) -> tuple[int, Any] | None:
        """(steps, state) from the latest state that another run kept of the steps that both have in common."""
        found = [
            (step, i)
            for i, (folder, common) in enumerate(self.sharing.sources)
            for step in Checkpointer(folder / BRANCHES, None).steps()
            if 0 < step <= common
        ]
        # Every host takes what the first saw: a trunk may be keeping another state at this moment.
        found = sorted(found, reverse=True) if first_host() else []
        for n in range(int(agree(len(found))[0, 0])):
            step, i = (int(x) for x in agree(*(found[n] if first_host() else (0, 0)))[0])
            folder = self.sharing.sources[i][0]
            trunk = Checkpointer(folder / BRANCHES, None)
            state = trunk.restore_step(step, self.program.abstract_state, self.report)
            if state is not None and self.curve.read(step, folder / "curve.parquet"):
                self.branch = {"from": folder.name, "at": step}
                if first_host():
                    write_atomically(self.folder / "branch.json", canonical_json(self.branch))
                self.report(f"branching from step {step} of run {folder.name}")
                return step, state
        if first_host():
            (self.folder / "branch.json").unlink(missing_ok=True)
        return None

    def validate(self, params: Any) -> float:
        """Mean cross-entropy over every window of the validation split, nats per token."""
        T = self.config.data.seq_len
        windows_NU = self.store.valid_windows(T)
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = -(-max(1, VALIDATION_TOKENS // T) // ways) * ways
        sums = []
        for at in range(0, len(windows_NU), size):
            part_BU = windows_NU[at : at + size]
            weight_B = np.zeros(size, np.float32)
            weight_B[: len(part_BU)] = 1.0
            padded_BU = np.pad(part_BU, ((0, size - len(part_BU)), (0, 0)))
            place = functools.partial(from_host, sharding=batch_sharding(self.mesh))
            sums.append(self.program.validate(params, place(padded_BU), place(weight_B)))
        return float(np.sum(np.asarray(jax.device_get(sums), np.float64))) / (len(windows_NU) * T)

    def tell(self, done: int, seconds_per_step: float) -> None:
        if not first_host():
            return
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

    def diverged(self, step: int, seconds: float) -> RunResult:
        self.report(f"loss is not finite at step {step}; the run ends as diverged")
        self.checkpointer.close()
        self.check_held()
        if first_host():
            self.checkpointer.clear()
        return self.finish(None, {"seconds": round(seconds, 3)}, step)

    def finish(self, loss: float | None, timing: dict, diverged_at_step: int | None = None) -> RunResult:
        """Writes the curve, then result.json, last and atomically: only then is the run over."""
        config, store, T = self.config, self.store, self.config.data.seq_len
        result = result_of(
            config,
            loss,
            bits_per_byte=None if loss is None else store.bits_per_byte(loss),
            train_loss=self.curve.recent_loss(),
            unique_tokens=min(config.trained_tokens, (config.unique_windows or store.n_train_windows(T)) * T),
            valid_tokens=store.n_valid_windows(T) * T,
            corpus=store.key,
            branched_from=self.branch.get("from"),
            branched_at_step=self.branch.get("at", 0),
            diverged_at_step=diverged_at_step,
            timing=timing,
            where={
                **software(),
                "device": jax.devices()[0].device_kind,
                "devices": self.mesh.size,
                "processes": jax.process_count(),
            },
        )
        self.check_held()
        self.sinks.finish(result.status, {} if loss is None else {"valid/loss": loss})
        if first_host():
            self.curve.write()
            write_atomically(
                self.folder / "result.json", json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
            )
            (self.folder / "progress.json").unlink(missing_ok=True)
        agree(0)  # no host leaves before the record stands
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
        except OSError as error:  # a full disk is reported without a name
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO), str(self.path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, steps: int, path: Path | None = None) -> bool:
        """Takes the first `steps` rows from the file (or from that of a trunk); False where it does not hold them."""
        try:
            table = pq.read_table(path or self.path, columns=["loss", "grad_norm", "valid_loss"]).slice(0, steps)
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


@functools.lru_cache(maxsize=2)
def resident(store: TokenStore, mesh: Mesh) -> jax.Array:
    """The training tokens of a corpus on the mesh's device, kept from run to run."""
    return jax.device_put(np.asarray(store.train), replicated(mesh))


def from_host(array: np.ndarray, sharding: Any) -> jax.Array:
    """An array that every host holds, of which each device takes its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def first_host() -> bool:
    """Whether this process writes the run's record; the others read."""
    return jax.process_index() == 0


def check_corpus(folder: Path, store: TokenStore) -> None:
    """Pins the run to the corpus it began with. Raises InputError where a newer version of it is installed."""
    path = folder / "corpus.json"
    if not path.exists():
        write_atomically(path, canonical_json({"corpus": store.key}))
    elif (there := read_json(path).get("corpus")) != store.key:
        raise InputError(f"{folder}: was begun on corpus {there}, now {store.key}; move the folder away to begin anew")
