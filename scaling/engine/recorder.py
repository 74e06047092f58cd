"""What a run records: its curve, its sinks, how far it is, and its result. On several hosts the first one writes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scaling.config import canonical_json
from scaling.data.batches import validation_flops
from scaling.engine.feed import Feed, n_rows
from scaling.engine.hosts import by_first_host, first_host
from scaling.engine.lease import Held
from scaling.engine.tracking import Sinks
from scaling.folder import write_atomically
from scaling.provenance import software
from scaling.result import RunResult, result_of


@dataclass
class Recorder:
    """`devices`: that the run computes on. `held`: the lease, None on all hosts but the first."""

    feed: Feed
    folder: Path
    sinks: Sinks
    devices: int
    report: Callable[[str], None]
    progress: Callable[[dict], None]
    held: Held | None

    def __post_init__(self) -> None:
        config, names = self.feed.config, (*self.feed.objective.metrics, "grad_norm")
        self.curve = CurveFile(
            self.folder / "curve.parquet",
            names,
            config.tokens_per_step,
            self.feed.lr,
            self.feed.objective.weighted_by,
        )

    def check_held(self) -> None:
        """Raises Lost where another process took the run over: this one was paused for longer than a lease lives."""
        by_first_host(lambda: self.held and self.held.check())

    def steps(self, first: int, metrics: dict[str, np.ndarray]) -> int:
        """Notes the metrics of the steps from `first` on; the step at which one is not finite, or 0."""
        self.curve.extend(metrics)
        lr = self.feed.lr[first : self.curve.steps]
        self.sinks.log_steps(first + 1, {f"train/{name}": values for name, values in metrics.items()} | {"lr": lr})
        bad = np.flatnonzero(~np.logical_and.reduce([np.isfinite(values) for values in metrics.values()]))
        return first + int(bad[0]) + 1 if len(bad) else 0

    def validated(self, step: int, loss: float) -> None:
        self.curve.validated(step, loss)
        self.sinks.log(step, {"valid/loss": loss})

    def write_curve(self) -> None:
        """Before a state is saved: whoever continues from it reads the curve up to it."""
        self.check_held()
        by_first_host(self.curve.write)

    def write_progress(self, seconds_per_step: float) -> None:
        if not first_host():
            return
        config, done = self.feed.config, self.curve.steps
        state = {
            "run": config.run_id,
            "step": done,
            "steps": config.steps,
            "tokens": done * config.tokens_per_step,
            "loss": self.curve.recent_loss(),
            "tokens_per_second": round(config.tokens_per_step / seconds_per_step, 1),
            "seconds_left": round(seconds_per_step * (config.steps - done), 1),
        }
        write_atomically(self.folder / "progress.json", canonical_json(state))
        self.progress(state)

    def finish(
        self, loss: float | None, branch: dict[str, Any], timing: dict[str, Any], diverged_at: int | None = None
    ) -> RunResult:
        """Writes the curve, then result.json, last and atomically: only then is the run over. No loss: it diverged."""
        config, store, T = self.feed.config, self.feed.store, self.feed.config.data.seq_len
        validations = sum(step > branch.get("at", 0) for step in self.curve.valid_loss)
        result = result_of(
            config,
            loss,
            bits_per_byte=None if loss is None else store.bits_per_byte(loss),
            train_loss=self.curve.recent_loss(),
            unique_tokens=min(config.trained_tokens, (config.unique_windows or store.n_train_windows(T)) * T),
            valid_tokens=round(self.feed.counted),
            flops_validation=validations * validation_flops(config, len(self.feed.valid_starts) * T),
            corpus=store.key,
            n_trained=config.n_trained,
            flops_reference=validation_flops(config, n_rows(self.feed) * T) if config.compared else 0.0,
            flops_parents=self.feed.parent.flops if self.feed.parent else 0.0,
            branched_from=branch.get("from"),
            branched_at_step=branch.get("at", 0),
            diverged_at_step=diverged_at,
            timing=timing,
            where={
                **software(),
                "device": jax.devices()[0].device_kind,
                "devices": self.devices,
                "processes": jax.process_count(),
            },
        )
        self.check_held()
        self.sinks.finish(result.status, {} if loss is None else {"valid/loss": loss})

        def write() -> None:
            self.curve.write()
            text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
            write_atomically(self.folder / "result.json", text)
            (self.folder / "progress.json").unlink(missing_ok=True)

        by_first_host(write)  # no host leaves before the record stands
        return result


class CurveFile:
    """curve.parquet: one row a step, with step, tokens, lr, the metrics, grad_norm, and valid_loss where validated."""

    def __init__(
        self,
        path: Path,
        metrics: tuple[str, ...],
        tokens_per_step: int,
        lr: np.ndarray,
        weighted_by: str | None = None,
    ) -> None:
        self.path, self.tokens_per_step, self.lr, self.weighted_by = path, tokens_per_step, lr, weighted_by
        self.metrics = {name: np.zeros(len(lr), np.float32) for name in metrics}
        self.steps = 0
        self.valid_loss: dict[int, float] = {}

    def extend(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics of the next steps."""
        first = self.steps
        for name, column in self.metrics.items():
            self.steps = first + len(metrics[name])
            column[first : self.steps] = metrics[name]

    def validated(self, step: int, loss: float) -> None:
        self.valid_loss[step] = loss

    def recent_loss(self) -> float | None:
        """Mean training loss of the last 5 % of the steps so far, nats per token."""
        if "loss" not in self.metrics:
            return None
        last = slice(self.steps - max(1, self.steps // 20), self.steps) if self.steps else slice(0)
        tail = self.metrics["loss"][last].astype(np.float64)
        if not len(tail) or not np.isfinite(tail).all():
            return None
        if self.weighted_by is None:
            return float(tail.mean())
        weight = self.metrics[self.weighted_by][last].astype(np.float64)
        return float(np.average(tail, weights=weight)) if weight.sum() > 0 else None

    def write(self) -> None:
        step = np.arange(1, self.steps + 1)
        columns = {
            "step": pa.array(step, pa.int64()),
            "tokens": pa.array(step * self.tokens_per_step, pa.int64()),
            "lr": pa.array(self.lr[: self.steps]),
            **{name: pa.array(values[: self.steps]) for name, values in self.metrics.items()},
            "valid_loss": pa.array([self.valid_loss.get(int(s)) for s in step], pa.float64()),
        }
        file = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), file)
        write_atomically(self.path, file.getvalue().to_pybytes())

    def read(self, steps: int, path: Path) -> bool:
        """Takes the first `steps` rows from a file, its own or a trunk's; False where it does not hold them."""
        try:
            table = pq.read_table(path, columns=[*self.metrics, "valid_loss"]).slice(0, steps)
            metrics = {name: table[name].to_numpy().astype(np.float32) for name in self.metrics}
            valid = table["valid_loss"].to_pylist()
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return False
        if table.num_rows < steps:
            return False
        self.steps = 0
        self.extend(metrics)
        self.valid_loss = {i + 1: v for i, v in enumerate(valid) if v is not None}
        return True
