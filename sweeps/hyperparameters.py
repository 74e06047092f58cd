"""Rules from (N, D) to learning rate and batch, and how to fit one to a tuning sweep."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from models.errors import InputError
from scaling.run import RunConfig
from sweeps.cost import align


@dataclass(frozen=True)
class PowerRule:
    """lr = c (N / 1e5)^p (D / 1e6)^q at one batch size; N = n_compute, D in tokens.

    The form of Step Law (2503.04715); its published constants do not reach down to these sizes, so each project fits
    its own (`scaling tune`). `n_range` and `d_range`, for the reader, are where it was fitted.
    """

    c: float
    p: float
    q: float
    batch_size: int
    n_range: tuple[float, float]
    d_range: tuple[float, float]

    def lr(self, n: float, d: float) -> float:
        """Peak learning rate, to three digits, so that a rule refitted to the last bit names the same runs."""
        return float(f"{self.c * (n / 1e5) ** self.p * (d / 1e6) ** self.q:.3g}")

    def at(self, d: float) -> "PowerRule":
        """The rule for d tokens at every D: runs of a size that differ in D alone then share a trunk."""
        return dataclasses.replace(self, c=self.c * (d / 1e6) ** self.q, q=0.0)

    def __call__(self, config: RunConfig) -> RunConfig:
        """`config` with the learning rate and batch of its N and D."""
        config = dataclasses.replace(config, batch_size=self.batch_size)
        lr = self.lr(config.counts.n_compute, config.tokens)
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))


def optimum(lr: np.ndarray, loss: np.ndarray) -> tuple[float, float, bool]:
    """(best lr, loss there, whether it lies inside the grid): a parabola in log lr through the best and its neighbours.

    Raises InputError for fewer than three learning rates.
    """
    if len(np.unique(lr)) < 3:
        raise InputError("optim.lr: a tuning sweep needs at least three learning rates for each N, D and batch")
    order = np.argsort(lr)
    x, y = np.log(lr[order]), loss[order]
    i = int(np.argmin(y))
    if i in (0, len(y) - 1):
        return float(np.exp(x[i])), float(y[i]), False
    a, b, c = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    at = -b / (2 * a)
    return float(np.exp(x[i] + at)), float(c - b * b / (4 * a)), True


def optima(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each (N, D, batch) of a tuning sweep: best lr, the loss there, whether the optimum is inside the grid.

    frame: a table of runs (sweeps.table). Runs of several seeds are averaged; diverged runs are left out.
    """
    done = frame[frame["status"] == "finished"]
    if done.empty:
        raise InputError("tuning sweep: no finished runs; train it first with scaling sweep")
    cells = done.groupby(["n_compute", "cell_tokens", "batch_size", "lr"], as_index=False)["loss"].mean()
    rows = []
    for (n, d, batch), cell in cells.groupby(["n_compute", "cell_tokens", "batch_size"]):
        lr, loss, inside = optimum(cell["lr"].to_numpy(), cell["loss"].to_numpy())
        rows.append({"n": n, "d": d, "batch_size": batch, "lr": lr, "loss": loss, "inside": inside})
    return pd.DataFrame(rows)


def fit_rule(frame: pd.DataFrame) -> tuple[PowerRule, pd.DataFrame, float]:
    """(rule, optima, scatter of log lr about it). The batch is the one with the least mean excess of
    the loss over the (N, D) at which most batches were tried; the rule then goes through all optima at that batch.

    Raises InputError where fewer than three optima lie inside their grid of learning rates.
    """
    # D to two digits: runs of different batch sizes train on slightly different whole numbers of steps.
    frame = frame.assign(cell_tokens=[float(f"{d:.2g}") for d in frame["tokens"]])
    found = optima(frame)
    best = found.groupby(["n", "d"])["loss"].transform("min")
    found["excess"] = found["loss"] / best - 1
    tried = found.groupby(["n", "d"])["batch_size"].transform("count")
    by_batch = found[tried == tried.max()].groupby("batch_size")["excess"].agg(["mean", "count"])
    complete = by_batch[by_batch["count"] == by_batch["count"].max()]
    batch = int(complete["mean"].idxmin())
    used = found[(found["batch_size"] == batch) & found["inside"]]
    if len(used) < 3 or len(set(used["n"])) < 2:
        raise InputError(
            f"optim.lr: only {len(used)} optima lie inside the grid at batch {batch}; widen the grid of learning rates "
            "or train more sizes"
        )
    columns = [np.ones(len(used)), np.log(used["n"] / 1e5)]
    if len(set(used["d"])) > 1:
        columns.append(np.log(used["d"] / 1e6))
    design = np.stack(columns, axis=1)
    solution, *_ = np.linalg.lstsq(design, np.log(used["lr"].to_numpy()), rcond=None)
    freedom = max(1, len(used) - len(solution))
    scatter = math.sqrt(float(np.sum((np.log(used["lr"]) - design @ solution) ** 2)) / freedom)
    q = float(solution[2]) if len(solution) > 2 else 0.0
    ranges = [(float(used[k].min()), float(used[k].max())) for k in ("n", "d")]
    return PowerRule(float(np.exp(solution[0])), float(solution[1]), q, batch, *ranges), found, scatter


def tune(frame: pd.DataFrame) -> str:
    """The optima of a tuning sweep and the rule through them, as text."""
    rule, found, scatter = fit_rule(frame)
    rows = [["N", "D", "batch", "best lr", "loss", "over the best batch", ""]]
    rows += [
        [
            f"{r.n:,.0f}",
            f"{r.d:,.0f}",
            f"{r.batch_size}",
            f"{r.lr:.4g}",
            f"{r.loss:.4f}",
            f"{100 * r.excess:+.2f} %",
            "" if r.inside else "edge of the grid: not used",
        ]
        for r in found.itertuples()
    ]
    return (
        f"{align(rows)}\n"
        f"rule: lr = {rule.c:.4g} (N/1e5)^{rule.p:.3f} (D/1e6)^{rule.q:.3f} at batch {rule.batch_size}; "
        f"scatter of the optima about it: x{math.exp(scatter):.2f}\n"
        f"PowerRule(c={rule.c:.4g}, p={rule.p:.3f}, q={rule.q:.3f}, batch_size={rule.batch_size}, "
        f"n_range=({rule.n_range[0]:.4g}, {rule.n_range[1]:.4g}), "
        f"d_range=({rule.d_range[0]:.4g}, {rule.d_range[1]:.4g}))"
    )
