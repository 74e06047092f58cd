"""Was each size of a sweep trained with good settings? Checks on the finished runs, and a verdict per size.

Two kinds of evidence. Where learning rates were varied: whether the best lies inside its grid. On any ladder: the loss
curves, normalised to their ends, fall on one another when every size is tuned (supercollapse, 2507.02119), and the
final losses on one line; a wrong learning rate at one size breaks both. Here a size is judged by how far it lies from a
line in log N through the other sizes, in units of how far those lie from it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.text import text_table
from analysis.tuning.rule import optimum

MIDDLE = (0.4, 0.8)  # of the tokens: after the warm-up at any D, before the cooldown
LEAST_SIZES = 4
DOUBTFUL, UNTUNED = 4.5, 7.0  # scores; chosen on simulated ladders other than those of the test
VERDICTS = ("tuned", "doubtful", "untuned")
NOISE = 2e-3  # of a loss, between seeds: 0.05 to 0.7 % for most tasks
PRIOR = 16.0  # how many degrees of freedom the stated errors count for, beside the scatter of the other sizes


@dataclass(frozen=True)
class SizeCurve:
    """Training loss of every step of one run, nats per token, where it is known, and its N."""

    n: float
    loss: np.ndarray | None
    final: float  #: loss at the end, nats per token: of the validation where it is known


def normalised(curve: SizeCurve, floor: float) -> tuple[float, float]:
    """(log l, its standard error), l(x) = (L(x t*) - L0) / (L(t*) - L0) for the mean L over MIDDLE.

    The error is a seed's, and that of a mean over steps: of neighbours' differences, so that the curve's own fall does
    not count.
    """
    first, last = (round(share * len(curve.loss)) for share in MIDDLE)
    part = curve.loss[first:last]
    if len(part) < 8:
        raise InputError(f"loss curve of {len(curve.loss)} steps: too short to be compared")
    mean = part.mean()
    error = math.hypot(np.diff(part).std() / math.sqrt(2 * len(part)), NOISE * mean)
    return math.log(max(mean - floor, 1e-9) / (curve.final - floor)), error / (mean - floor)


def scores(curves: Sequence[SizeCurve]) -> pd.DataFrame:
    """Rows n, collapse, final, score: how far each size's curve and its last loss lie from a line in log N through
    those of the others, in standard errors or, where that is larger, in the others' own scatter; and both together.

    The curve counts half: among sizes that are tuned it varies more than its errors say. Where some curve is not known
    the last losses are judged alone, and collapse is NaN. Raises InputError for fewer than LEAST_SIZES sizes.
    """
    curves = sorted(curves, key=lambda c: c.n)
    n = np.array([c.n for c in curves])
    if len(set(n)) < LEAST_SIZES:
        raise InputError(f"collapse: {len(set(n))} sizes; at least {LEAST_SIZES} can be compared")
    x, last = np.log(n), np.array([c.final for c in curves])
    floor = irreducible(x, last)
    y, error = np.log(last - floor)[:, None], (NOISE * last / (last - floor))[:, None]
    if all(c.loss is not None for c in curves):
        middle = np.array([normalised(c, floor) for c in curves])
        y, error = np.hstack([middle[:, :1], y]), np.hstack([middle[:, 1:], error])
    *collapse, final = np.abs(deviations(x, y, error)).T
    collapse = collapse[0] if collapse else np.full(len(n), math.nan)
    score = np.hypot(np.nan_to_num(collapse) / 2, final)
    return pd.DataFrame({"n": n, "collapse": collapse, "final": final, "score": score})


def irreducible(x: np.ndarray, last: np.ndarray) -> float:
    """L0 for which log(L - L0) is nearest to a line in log N, whichever one size is left out."""

    def misfit(floor: float) -> float:
        y = np.log(last - floor)
        return min(residual(np.delete(x, i), np.delete(y, i)[:, None]) for i in range(len(x)))

    candidates = np.linspace(0.0, 0.9, 46) * last.min()
    return float(candidates[int(np.argmin([misfit(c) for c in candidates]))])


def residual(x: np.ndarray, y: np.ndarray) -> float:
    """RMS residual of straight lines in x, freedom counted."""
    design = np.stack([np.ones_like(x), x], axis=1)
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return math.sqrt(float(np.sum(left**2)) / (max(1, len(x) - 2) * y.shape[1]))


def deviations(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> np.ndarray:
    """How far each of y [sizes, parts] lies from the line through the other sizes, over what is expected of it.

    Lines are weighted by 1 / error^2. Expected is the error, times what the others scatter about their lines over what
    is expected of them. As the one judged is left out of both, one bad size does not hide, nor does it blame the
    others: their own scatter holds it.
    """
    standardised = []
    for i in range(len(x)):
        others = np.delete(np.arange(len(x)), i)
        chi2, misses = 0.0, []
        for k in range(y.shape[1]):
            design = np.stack([np.ones(len(others)), x[others] - x[i]], axis=1) / error[others, k, None]
            inverse = np.linalg.inv(design.T @ design)
            line = inverse @ design.T @ (y[others, k] / error[others, k])
            chi2 += float(np.sum((y[others, k] / error[others, k] - design @ line) ** 2))
            misses.append((y[i, k] - line[0]) / math.sqrt(error[i, k] ** 2 + inverse[0, 0]))
        excess = math.sqrt((PRIOR + chi2) / (PRIOR + (len(others) - 2) * y.shape[1]))
        standardised.append(np.array(misses) / excess)
    return np.array(standardised)


def verdict(score: float) -> str:
    return VERDICTS[int(score >= DOUBTFUL) + int(score >= UNTUNED)]


def health(frame: pd.DataFrame, curve_of: Callable[[str], np.ndarray | None] | None = None) -> pd.DataFrame:
    """A row a parametrisation and size: parametrization, n, runs, lr (what its grid says), collapse, final, score (of
    `scores`), verdict, reason. Sizes are compared within a parametrisation.

    frame: of `tuning_table`. curve_of: the loss of every step of a run, None where it cannot be read; without it sizes
    are compared by their last losses. Raises InputError where nothing is finished.
    """
    parts = [part for _, part in frame.groupby("parametrization") if (part["status"] == "finished").any()]
    if not parts:
        raise InputError("no finished runs to check; train the sweep first")
    return pd.concat([verdicts(part, curve_of) for part in parts], ignore_index=True)


def verdicts(frame: pd.DataFrame, curve_of: Callable[[str], np.ndarray | None] | None) -> pd.DataFrame:
    """The rows of `health` of runs of one parametrisation."""
    done = frame[frame["status"] == "finished"]
    done = done.assign(cell=[float(f"{d:.2g}") for d in done["tokens"]])
    grids = {n: grid_check(runs) for n, runs in done.groupby("n_compute")}
    best = done.loc[done.groupby(["n_compute", "cell"])["loss"].idxmin()]
    curves = {run: curve_of(run) if curve_of else None for run in best["run"]}
    unread = {run for run, curve in curves.items() if curve_of and curve is None}
    ladder = compare_ladders(best, {run: curve for run, curve in curves.items() if run not in unread})
    unread = set(best.loc[best["run"].isin(unread), "n_compute"])
    rows = []
    for n, runs in done.groupby("n_compute"):
        diverged = int(((frame["n_compute"] == n) & (frame["status"] == "diverged")).sum())
        size = {"parametrization": frame["parametrization"].iloc[0], "n": n, "runs": len(runs)}
        rows.append(size | judge(grids[n], ladder.get(n), diverged, n in unread))
    return pd.DataFrame(rows)


def judge(grid: str, ladder: tuple[float, float, float] | None, diverged: int, unread: bool) -> dict:
    collapse, final, score = ladder or (math.nan,) * 3
    row = {"lr": grid, "collapse": collapse, "final": final, "score": score}
    if grid == "edge":
        return row | {"verdict": "untuned", "reason": "best learning rate at the edge of its grid"}
    if grid == "none" and diverged:
        return row | {"verdict": "untuned", "reason": f"{diverged} runs diverged"}
    if ladder is None:
        if grid == "inside":
            return row | {"verdict": "tuned", "reason": "best learning rate inside its grid"}
        if unread:
            return row | {"verdict": "doubtful", "reason": "a loss curve is missing or damaged: not compared"}
        return row | {"verdict": "doubtful", "reason": f"fewer than {LEAST_SIZES} sizes to compare: nothing vouches"}
    judged = verdict(score)
    what = "curve" if collapse >= final else "final loss"
    reason = "in line with the other sizes" if judged == "tuned" else f"{what} out of line with the other sizes"
    return row | {"verdict": judged, "reason": reason}


def grid_check(runs: pd.DataFrame) -> str:
    """Of one size: "inside", "edge", or "none" where no three learning rates were tried at one (D, batch)."""
    optima = []
    for _, cell in runs.groupby(["cell", "batch_size"]):
        cell = cell.groupby("lr", as_index=False)["loss"].mean()
        if len(cell) >= 3:
            _, loss, inside = optimum(cell["lr"].to_numpy(), cell["loss"].to_numpy())
            optima.append((loss, inside))
    return "none" if not optima else "inside" if min(optima)[1] else "edge"


def compare_ladders(best: pd.DataFrame, losses: dict) -> dict[float, tuple[float, float, float]]:
    """n -> (collapse, final, score), the median over ladders: the k-th shortest run of each size is the k-th ladder.

    losses: of every step of a run, None where they are not known; a run that is missing there is left out.
    """
    ladders: dict[float, list[list[float]]] = {}
    rank = best.sort_values("tokens").groupby("n_compute").cumcount()
    for _, ladder in best.groupby(rank):
        runs = zip(*(ladder[k] for k in ("run", "n_compute", "loss")), strict=True)
        try:
            table = scores([SizeCurve(float(n), losses[run], float(loss)) for run, n, loss in runs if run in losses])
        except InputError:
            continue
        for n, *three in table.itertuples(index=False):
            ladders.setdefault(n, []).append(three)
    return {n: tuple(np.median(values, axis=0)) for n, values in ladders.items()}


def health_text(judged: pd.DataFrame) -> str:
    """The verdicts as a table."""
    labels = labelled(judged, "{:,.0f}")
    rows = [["N", "verdict", "learning-rate grid", "curve", "final loss", "both", ""]]
    for r in judged.itertuples():
        numbers = ["-" if math.isnan(v) else f"{v:.1f}" for v in (r.collapse, r.final, r.score)]
        rows.append([labels[r.Index], r.verdict, r.lr, *numbers, r.reason])
    return "Tuning of each size (distance from the other sizes, in their own scatter)\n" + text_table(rows)


def labelled(judged: pd.DataFrame, number: str) -> pd.Series:
    """How each row's size is called: its N, with the parametrisation where there are several."""
    several = len(set(judged["parametrization"])) > 1
    return judged.apply(lambda r: number.format(r.n) + (f" {r.parametrization}" if several else ""), axis=1)


def health_line(judged: pd.DataFrame) -> str:
    """The verdicts in one line."""
    labels = labelled(judged, "{:.3g}")
    by = {v: labels[judged["verdict"] == v] for v in VERDICTS}
    return "; ".join(f"{v}: N {', '.join(sizes)}" for v, sizes in by.items() if len(sizes))
