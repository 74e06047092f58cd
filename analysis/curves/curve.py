"""A logged loss curve with its learning-rate schedule: read from a file, or a schedule that was not run.

A schedule is an array with the learning rate of every optimiser step, lr[i] that of step i (lr[0] comes before the
first).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.errors import InputError, nearest_or_all
from analysis.tables import numbers, read_table

SCHEDULES = ("constant", "cosine", "linear", "wsd", "two_stage")
SHAPES = ("linear", "1-sqrt", "exponential")


@dataclass(frozen=True, eq=False)
class LossCurve:
    """A logged loss curve: step (P,), loss (P,) in nats per token, and lr (steps + 1,), or (steps,) from step 1 on."""

    name: str
    step: np.ndarray
    loss: np.ndarray
    lr: np.ndarray

    def __post_init__(self):
        step, loss = np.asarray(self.step), np.asarray(self.loss, float)
        if step.ndim != 1 or loss.shape != step.shape or len(step) < 2:
            raise InputError(
                f"{self.name}: step {step.shape} and loss {loss.shape} must be two columns of 2 or more rows"
            )
        wrong = np.flatnonzero(~(np.isfinite(loss) & (loss > 0)))
        if wrong.size:
            i = wrong[0]
            raise InputError(f"{self.name}: column 'loss' is {loss[i]} in row {i}: drop the rows that are not positive")
        wrong = np.flatnonzero(~(np.diff(step) > 0))
        if wrong.size:
            i = wrong[0]
            raise InputError(
                f"{self.name}: column 'step' goes from {step[i]} to {step[i + 1]} in row {i + 1}: sort the rows, and "
                "keep one row a step"
            )
        if not np.isfinite(step).all() or step[0] < 0 or (step != np.round(step)).any():
            raise InputError(f"{self.name}: column 'step' must hold whole numbers of 0 or more, found {step[0]}")
        step = step.astype(np.int64)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "lr", dense(self.lr, step, self.name))

    @property
    def warmup(self) -> int:
        """The step that ends the warm-up: the last of the rises that the schedule begins with."""
        return warmup_steps(self.lr)

    def take(self, rows) -> LossCurve:
        """Some of the logged points; the schedule ends with the last of them."""
        step = self.step[rows]
        return LossCurve(self.name, step, self.loss[rows], self.lr[: step[-1] + 1])

    def binned(self, bins: int) -> LossCurve:
        """Means of the loss in at most `bins` runs of equally many points, each at its mean step."""
        parts = np.array_split(np.arange(len(self.step)), bins)
        step = np.array([round(self.step[p].mean()) for p in parts])
        return LossCurve(self.name, step, np.array([self.loss[p].mean() for p in parts]), self.lr)


def read_curve(path, warmup: int | None = None, lr=None, name: str | None = None) -> LossCurve:
    """A curve from a CSV or parquet file with columns step, lr, loss, or from a run's folder or its curve.parquet.

    Between the rows lr is interpolated, but a jump from one flat stretch to another falls on the row that first shows
    it. Before the first row lr rises from 0 to its value there, linearly until step `warmup` (default: the first row).
    A dense `lr` replaces all this. Raises InputError.
    """
    path = Path(path)
    path = path / "curve.parquet" if path.is_dir() else path
    frame = read_table(path)
    wanted = ("step", "loss") if lr is not None else ("step", "lr", "loss")
    for column in wanted:
        if column not in frame.columns:
            raise InputError(
                f"{path}: no column {column!r}{nearest_or_all(column, frame.columns)}; rename it to {column!r}"
            )
    columns = {column: numbers(frame, column) for column in wanted}
    for column in wanted:
        wrong = np.flatnonzero(~np.isfinite(columns[column]))
        if wrong.size:
            raise InputError(
                f"{path}: column {column!r} has no number in row {wrong[0]}: drop or repair {wrong.size} rows"
            )
    step = columns["step"]
    if len(step) < 2 or (np.diff(step) <= 0).any() or step[0] < 0:
        raise InputError(
            f"{path}: column 'step' must rise from row to row over at least 2 rows: sort it, one row a step"
        )
    if warmup is not None and not 0 <= warmup <= step[0]:
        raise InputError(
            f"{path}: warmup = {warmup} lies past the first row (step {step[0]:.0f}): the rows show lr there"
        )
    if lr is None:
        rate = columns["lr"]
        end = step[0] if warmup is None else warmup
        known = np.r_[0.0, end, step] if end < step[0] else np.r_[0.0, step] if step[0] > 0 else step
        rates = np.r_[0.0, rate[0], rate] if end < step[0] else np.r_[0.0, rate] if step[0] > 0 else rate
        lr = np.interp(np.arange(int(step[-1]) + 1), known, rates)
        flat = np.diff(rate) == 0
        for i in 1 + np.flatnonzero(~flat[1:-1] & flat[:-2] & flat[2:]):
            lr[int(step[i]) : int(step[i + 1])] = rate[i]
    name = name or (path.parent.name if path.name == "curve.parquet" else path.stem)
    return LossCurve(name, step, columns["loss"], lr)


def schedule(
    kind: str,
    peak: float,
    steps: int,
    warmup: int = 0,
    minimum: float = 0.0,
    cooldown: float = 0.2,
    shape: str = "1-sqrt",
    switch: int | None = None,
    second: float | None = None,
) -> np.ndarray:
    """The learning rate of every step, (steps + 1,): a linear warm-up from 0, then the kind's course.

    constant; cosine and linear, down to `minimum` at the last step; wsd, constant and then over the last share
    `cooldown` of the steps down to `minimum` by `shape` (1-sqrt: 2405.18392); two_stage (also wsdcon), `peak` and from
    step `switch` on `second`. Raises InputError.
    """
    kind = {"wsdcon": "two_stage", "two-stage": "two_stage"}.get(kind, kind)
    if kind not in SCHEDULES:
        raise InputError(f"schedule {kind!r} is unknown{nearest_or_all(kind, SCHEDULES)}")
    if shape not in SHAPES:
        raise InputError(f"cooldown shape {shape!r} is unknown{nearest_or_all(shape, SHAPES)}")
    if not (peak > 0 and steps >= 1 and 0 <= warmup < steps and 0 <= minimum <= peak and 0 < cooldown <= 1):
        raise InputError(
            f"schedule: peak {peak}, steps {steps}, warmup {warmup}, minimum {minimum}, cooldown {cooldown}: needed "
            "are peak > 0, steps > warmup >= 0, 0 <= minimum <= peak, 0 < cooldown <= 1"
        )
    i = np.arange(steps + 1)
    lr = np.full(steps + 1, float(peak))
    if kind == "two_stage":
        if switch is None or second is None or not (warmup <= switch <= steps and second >= 0):
            raise InputError(f"two_stage needs switch (a step, found {switch}) and second (a rate, found {second})")
        lr[switch:] = second
    elif kind != "constant":
        first = max(warmup, steps - round(cooldown * steps)) if kind == "wsd" else warmup
        x = np.clip((i - first) / max(steps - first, 1), 0.0, 1.0)
        if kind == "wsd" and shape == "exponential" and minimum <= 0:
            raise InputError(f"an exponential cooldown needs minimum > 0, found {minimum}")
        if kind == "wsd" and shape == "exponential":
            lr = peak * (minimum / peak) ** x
        else:
            falls = {"cosine": (1 + np.cos(np.pi * x)) / 2, "1-sqrt": 1 - np.sqrt(x), "linear": 1 - x}
            lr = minimum + (peak - minimum) * falls[shape if kind == "wsd" else kind]
    if warmup:
        lr[:warmup] = peak * i[:warmup] / warmup
    return lr


def dense(lr, step, name) -> np.ndarray:
    """The schedule up to the last step, (steps + 1,), checked."""
    lr, last = np.asarray(lr, float), int(step[-1])
    if lr.ndim == 1 and len(lr) == last:
        lr = np.r_[0.0, lr]
    if lr.ndim != 1 or len(lr) <= last:
        raise InputError(f"{name}: lr holds {lr.size} steps, but the last step is {last}: give the rate of every step")
    lr = lr[: last + 1]
    wrong = np.flatnonzero(~(np.isfinite(lr) & (lr >= 0)))
    if wrong.size:
        raise InputError(f"{name}: lr is {lr[wrong[0]]} at step {wrong[0]}: it must be finite and at least 0")
    if not lr[: int(step[0]) + 1].sum() > 0:
        raise InputError(
            f"{name}: lr sums to 0 up to the first step {step[0]}: drop the points before the first update"
        )
    return lr


def warmup_steps(lr) -> int:
    falls = np.flatnonzero(np.diff(lr) <= 0)
    return int(falls[0]) if len(falls) else len(lr) - 1


def drops(lr, step) -> np.ndarray:
    """d_k = lr[k-1] - lr[k] after the warm-up, up to the last step."""
    drop = np.r_[0.0, -np.diff(lr[: step[-1] + 1])]
    drop[: warmup_steps(lr) + 1] = 0.0
    return np.where(np.abs(drop) > 1e-9 * lr.max(), drop, 0.0)
