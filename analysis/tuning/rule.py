"""From a tuning sweep to a rule: the best learning rate of each (N, D), alone or with the batch, and a rule.

Where only learning rates were varied, or few batches, a parabola in log lr at each batch. On a grid of at least three
batches too, a quadratic in (log lr, log batch) with the confidence ellipse of its optimum. An optimum at the edge of
its grid is an error: it is shown and not used.
"""

import contextlib
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import InputError
from analysis.files import write_text
from analysis.text import text_table

LEVEL = 0.9  # of the ellipses
WINDOW = 4.2  # the quadratic is fitted within this factor of the best run, in lr and batch: two steps of a x2 grid


@dataclass(frozen=True)
class Tuned:
    """What a tuning sweep says. `rule` is the one later sweeps should use; `text` shows how it came about.

    A rule is plain data: {"rule": "power", c, p, q, batch_size, n_range, d_range} for lr = c (N / 1e5)^p (D / 1e6)^q at
    one batch, or {"rule": "grid", c, p, q, b, r, n_range, d_range} with a batch of b (D / 1e6)^r tokens.
    """

    rule: dict[str, Any]
    text: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Ellipse:
    """The optimum of one (N, D) in (log lr, log batch) and its confidence region, of level LEVEL."""

    n: float
    d: float
    lr: float
    batch: float  #: tokens
    loss: float
    lr_factor: float  #: the region reaches from lr / lr_factor to lr * lr_factor; inf where it is not known
    batch_factor: float
    covariance: np.ndarray  #: 2x2, of (log lr, log batch)
    freedom: int
    problem: str  #: "", or why it is not used


def ellipse(lr: np.ndarray, batch: np.ndarray, loss: np.ndarray, n: float = math.nan, d: float = math.nan) -> Ellipse:
    """Least squares of log loss on a quadratic in (log lr, log batch), around the best of the grid.

    The covariance of the optimum -H^-1 g / 2 is that of the coefficients through its derivative (delta method); the
    region is Hotelling's, 2 F(LEVEL; 2, freedom). Raises InputError for fewer than three learning rates or batches.
    """
    rates, batches = np.unique(lr), np.unique(batch)
    if len(rates) < 3 or len(batches) < 3:
        raise InputError(f"optim.lr, batch_size: {len(rates)} x {len(batches)} values; a grid needs at least 3 x 3")
    best = int(np.argmin(loss))

    def failed(problem: str) -> Ellipse:
        nothing = np.full((2, 2), math.nan)
        return Ellipse(n, d, lr[best], batch[best], loss[best], math.inf, math.inf, nothing, 0, problem)

    edges = [name for name, x, all_x in (("lr", lr, rates), ("batch", batch, batches)) if x[best] in all_x[[0, -1]]]
    if edges:
        return failed(f"edge of the grid in {' and '.join(edges)}: not used, widen the grid")
    near = (np.abs(np.log(lr / lr[best])) < math.log(WINDOW)) & (np.abs(np.log(batch / batch[best])) < math.log(WINDOW))
    u, v, y = np.log(lr[near] / lr[best]), np.log(batch[near] / batch[best]), np.log(loss[near])
    design = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    freedom = len(y) - 6
    if freedom < 1 or np.linalg.matrix_rank(design) < 6:
        return failed(f"{len(y)} runs around the best: a quadratic and its scatter need 7 or more")
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = float(np.sum((y - design @ coefficients) ** 2)) / freedom * np.linalg.inv(design.T @ design)
    g = coefficients[1:3]
    hessian = np.array([[2 * coefficients[3], coefficients[4]], [coefficients[4], 2 * coefficients[5]]])
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return failed("no minimum: the quadratic is not convex")
    at = -np.linalg.solve(hessian, g)
    # d at / d coefficient = -H^-1 (d g + dH at)
    (x, z), zero = at, 0.0
    derivative = -np.linalg.solve(hessian, np.array([[zero, 1, zero, 2 * x, z, zero], [zero, zero, 1, zero, x, 2 * z]]))
    covariance = derivative @ variance @ derivative.T
    reach = np.sqrt(2 * stats.f.ppf(LEVEL, 2, freedom) * np.diag(covariance))
    at_lr, at_batch = lr[best] * math.exp(x), batch[best] * math.exp(z)
    outside = not (rates[0] <= at_lr <= rates[-1] and batches[0] <= at_batch <= batches[-1])
    level = math.exp(coefficients[0] + g @ at / 2)
    problem = "optimum outside the grid: not used, widen the grid" if outside else ""
    factors = [math.exp(min(r, 50.0)) for r in reach]
    return Ellipse(n, d, at_lr, at_batch, level, *factors, covariance, freedom, problem)


def ellipses(frame: pd.DataFrame) -> list[Ellipse]:
    """One for each (N, D) of a table of runs at which a grid of at least three rates and batches was finished.

    batch is in tokens where the table has `seq_len`, else in windows.
    """
    done = with_cells(frame)
    done = done.assign(batch=done["batch_size"] * done.get("seq_len", 1))
    done = done.groupby(["n_compute", "cell_tokens", "batch", "lr"], as_index=False)["loss"].mean()
    grids = []
    for (n, d), cell in done.groupby(["n_compute", "cell_tokens"]):
        if cell["lr"].nunique() >= 3 and cell["batch"].nunique() >= 3:
            values = (cell[k].to_numpy(float) for k in ("lr", "batch", "loss"))
            grids.append(ellipse(*values, float(n), float(d)))
    return grids


def with_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Finished runs, D to two digits: runs of different batch sizes train on slightly different numbers of steps."""
    done = frame[frame["status"] == "finished"]
    if done.empty:
        raise InputError("tuning sweep: no finished runs; train it first with scaling sweep")
    return done.assign(cell_tokens=[float(f"{d:.2g}") for d in done["tokens"]])


def by_parametrization(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs of each parametrisation: a learning rate of one means something else in another."""
    if frame.empty or "parametrization" not in frame:
        return {"": frame}
    return dict(tuple(frame.groupby("parametrization")))


def fit_grid_rule(grids: list[Ellipse]) -> tuple[dict[str, Any], dict[str, float]]:
    """(rule, scatter of log lr and of log batch about it) through the optima inside their grids.

    Raises InputError where fewer than three are, or all at one size.
    """
    used = [e for e in grids if not e.problem]
    n, d = np.array([e.n for e in used]), np.array([e.d for e in used])
    if len(used) < 3 or len(set(n)) < 2:
        raise InputError(
            f"optim.lr, batch_size: only {len(used)} optima lie inside their grids; widen them or train more sizes"
        )
    lr, lr_scatter = line(np.log([e.lr for e in used]), n, d)
    batch, batch_scatter = line(np.log([e.batch for e in used]), np.full(len(used), 1e5), d)
    rule = {
        "rule": "grid",
        "c": float(np.exp(lr[0])),
        "p": lr[1],
        "q": lr[2],
        "b": float(np.exp(batch[0])),
        "r": batch[2],
    }
    rule |= {"n_range": [float(n.min()), float(n.max())], "d_range": [float(d.min()), float(d.max())]}
    return rule, {"lr": lr_scatter, "batch": batch_scatter}


def line(y: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[tuple[float, float, float], float]:
    """((a, p, q), scatter) of y = a + p log(N / 1e5) + q log(D / 1e6); the exponent of what does not vary is 0."""
    columns = {0: np.ones(len(y))}
    columns |= {i: np.log(x / unit) for i, x, unit in ((1, n, 1e5), (2, d, 1e6)) if len(set(x)) > 1}
    design = np.stack(list(columns.values()), axis=1)
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    scatter = math.sqrt(float(np.sum((y - design @ solution) ** 2)) / max(1, len(y) - len(solution)))
    by_column = dict(zip(columns, map(float, solution), strict=True))
    return (by_column[0], by_column.get(1, 0.0), by_column.get(2, 0.0)), scatter


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

    frame: of `tuning_table`. Runs of several seeds are averaged; diverged runs are left out.
    """
    cells = with_cells(frame).groupby(["n_compute", "cell_tokens", "batch_size", "lr"], as_index=False)["loss"].mean()
    rows = []
    for (n, d, batch), cell in cells.groupby(["n_compute", "cell_tokens", "batch_size"]):
        lr, loss, inside = optimum(cell["lr"].to_numpy(), cell["loss"].to_numpy())
        rows.append({"n": n, "d": d, "batch_size": batch, "lr": lr, "loss": loss, "inside": inside})
    return pd.DataFrame(rows)


def fit_rule(frame: pd.DataFrame) -> tuple[dict[str, Any], pd.DataFrame, float]:
    """(rule, optima, scatter of log lr about it). The batch is the one with the least mean excess of
    the loss over the (N, D) at which most batches were tried; the rule then goes through all optima at that batch.

    Raises InputError where fewer than three optima lie inside their grid of learning rates.
    """
    table = optima(frame)
    best = table.groupby(["n", "d"])["loss"].transform("min")
    table["excess"] = table["loss"] / best - 1
    tried = table.groupby(["n", "d"])["batch_size"].transform("count")
    by_batch = table[tried == tried.max()].groupby("batch_size")["excess"].agg(["mean", "count"])
    complete = by_batch[by_batch["count"] == by_batch["count"].max()]
    batch = int(complete["mean"].idxmin())
    used = table[(table["batch_size"] == batch) & table["inside"]]
    if len(used) < 3 or len(set(used["n"])) < 2:
        raise InputError(
            f"optim.lr: only {len(used)} optima lie inside the grid at batch {batch}; widen the grid of learning rates "
            "or train more sizes"
        )
    (c, p, q), scatter = line(np.log(used["lr"].to_numpy()), used["n"].to_numpy(), used["d"].to_numpy())
    rule = {"rule": "power", "c": math.exp(c), "p": p, "q": q, "batch_size": batch}
    rule |= {f"{k}_range": [float(used[k].min()), float(used[k].max())] for k in ("n", "d")}
    return rule, table, scatter


def tune(frame: pd.DataFrame, sweep: str = "") -> Tuned:
    """The rule of a tuning sweep, whose table of runs is `frame`: of learning rate and batch where a grid allows it.

    Raises InputError where neither that nor a rule at one batch can be fitted, and for several parametrisations.
    """
    if len(several := by_parametrization(frame)) > 1:
        raise InputError(f"runs of {len(several)} parametrisations ({', '.join(several)}): each has a rule of its own")
    grids = ellipses(frame)
    texts, rules, errors = [], [], []
    try:
        rule, table, scatter = fit_rule(frame)
        texts.append(power_text(rule, table, scatter))
        rules.append((rule, {"scatter_log_lr": scatter, "optima": table.to_dict("records")}))
    except InputError as error:
        errors.append(error)
    if grids:
        texts.append(ellipse_text(grids))
        try:
            rule, scatters = fit_grid_rule(grids)
            texts.append(grid_text(rule, scatters))
            kept = [{k: v for k, v in vars(e).items() if k != "covariance"} for e in grids]
            kept = [{k: None if v == math.inf else v for k, v in e.items()} for e in kept]
            rules.append((rule, {f"scatter_log_{k}": v for k, v in scatters.items()} | {"optima": kept}))
        except InputError as error:
            errors.append(error)
    if not rules:
        raise errors[-1]
    texts += [f"note: {error}" for error in errors]
    rule, fitted = rules[-1]
    return Tuned(rule, "\n\n".join(texts), provenance(frame, sweep) | fitted)


def provenance(frame: pd.DataFrame, sweep: str) -> dict[str, Any]:
    """Which runs a rule comes from, on what data, and by which versions."""
    done = frame[frame["status"] == "finished"]
    record: dict[str, Any] = {"sweep": sweep, "runs": sorted(done["run"]) if "run" in done else len(done)}
    columns = ("source", "tokenizer", "corpus", "parametrization", "schedule", "seq_len", "weight_decay", "b2", "dtype")
    for column in (*columns, "seed"):
        if column in done:
            record[column] = sorted(set(done[column].dropna().tolist()))
    versions = {"python": platform.python_version()}
    for package in ("jax", "flax", "optax", "numpy", "scipy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # runs of other training code need no JAX
            versions[package] = importlib.metadata.version(package)
    return record | {"versions": versions}


def save(tuned: Tuned, path: Path | str) -> None:
    """Writes the rule and where it comes from, for `sweeps.hyperparameters.load_rule`."""
    write_text(path, json.dumps(tuned.rule | {"provenance": tuned.provenance}, indent=1, allow_nan=False) + "\n")


def ellipse_text(grids: list[Ellipse]) -> str:
    rows = [["N", "D", "best lr", f"{LEVEL:.0%} region", "best batch", f"{LEVEL:.0%} region", "loss", ""]]
    for e in grids:
        within = [f"x/ {f:.2f}" if f < 1e3 else "-" for f in (e.lr_factor, e.batch_factor)]
        cells = [f"{e.n:,.0f}", f"{e.d:,.0f}", f"{e.lr:.4g}", within[0], f"{e.batch:,.0f}", within[1]]
        rows.append([*cells, f"{e.loss:.4f}", e.problem])
    return text_table(rows)


def grid_text(rule: dict[str, Any], scatter: dict[str, float]) -> str:
    return (
        f"rule: lr = {rule['c']:.4g} (N/1e5)^{rule['p']:.3f} (D/1e6)^{rule['q']:.3f}, "
        f"batch = {rule['b']:,.0f} (D/1e6)^{rule['r']:.3f} tokens; "
        f"scatter of the optima about it: lr x{math.exp(scatter['lr']):.2f}, "
        f"batch x{math.exp(scatter['batch']):.2f}"
    )


def power_text(rule: dict[str, Any], table: pd.DataFrame, scatter: float) -> str:
    """The optima by learning rate alone and the rule through those at the best batch, to be read and pasted."""
    rows = [["N", "D", "batch", "best lr", "loss", "over the best batch", ""]]
    rows += [
        [
            f"{r.n:,.0f}",
            f"{r.d:,.0f}",
            f"{r.batch_size:g}",
            f"{r.lr:.4g}",
            f"{r.loss:.4f}",
            f"{100 * r.excess:+.2f} %",
            "" if r.inside else "edge of the grid: not used",
        ]
        for r in table.itertuples()
    ]
    return (
        f"{text_table(rows)}\n"
        f"rule: lr = {rule['c']:.4g} (N/1e5)^{rule['p']:.3f} (D/1e6)^{rule['q']:.3f} at batch {rule['batch_size']}; "
        f"scatter of the optima about it: x{math.exp(scatter):.2f}\n"
        f"PowerRule(c={rule['c']:.4g}, p={rule['p']:.3f}, q={rule['q']:.3f}, batch_size={rule['batch_size']}, "
        f"n_range=({rule['n_range'][0]:.4g}, {rule['n_range'][1]:.4g}), "
        f"d_range=({rule['d_range'][0]:.4g}, {rule['d_range'][1]:.4g}))"
    )
