"""Compute-optimal N and D read off the runs, without a law: approaches 1 and 2 of Hoffmann et al. 2203.15556.

`envelope` takes the best run of each bin of C, `isoflop` the minimum of loss over N in each slice of equal C; power
laws N* = k_N C^a and D* = k_D C^b go through them. Slices that show no minimum are refused, each with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from analysis.errors import InputError, nearest_or_all
from analysis.runs import Runs
from analysis.text import text_table

METHODS = ("parabola", "akima")
LEAST_RUNS = 5  # in a slice
WIDE = 20.0  # largest N over smallest, past which a parabola is a poor picture of the slice
OFF_CENTRE = 0.4  # distance of the optimum from the middle of the slice, in half widths of log N
SCATTER = 0.005  # of log C in a slice, past which the slope of log loss in log C is fitted too
DETERMINED = 0.8  # share of the bootstrap draws that must have a minimum inside the slice


@dataclass(frozen=True)
class Slice:
    """One budget C in FLOPs: its runs, its optimum (None where refused), the bootstrap's sd of log N*, and why."""

    C: float
    runs: int
    N: float | None = None
    D: float | None = None
    loss: float | None = None
    sd_log_N: float | None = None
    width: float | None = None  # largest N over smallest
    offset: float | None = None  # of N* from the middle, in half widths of log N; negative towards small N
    accepted: bool = False
    reason: str = ""  # of a refusal, or a warning where accepted


@dataclass(frozen=True)
class Optimum:
    """N* and D* at one C, with their intervals; `warning` where C lies outside the slices."""

    C: float
    N: float
    D: float
    N_interval: tuple[float, float]
    D_interval: tuple[float, float]
    warning: str | None = None


@dataclass(frozen=True, eq=False)
class PowerLaws:
    """Power laws N* = k_N C^a and D* = k_D C^b through the accepted slices, with bootstrap intervals at `level`."""

    method: str
    a: float
    b: float
    k_N: float
    k_D: float
    intervals: dict[str, tuple[float, float]]
    slices: tuple[Slice, ...]
    level: float
    notes: tuple[str, ...] = ()
    reference: float = 1.0  # C at which the draws' log N* and log D* stand
    draws: np.ndarray = field(default=None, repr=False)  # (draws, 4): log N*, a, log D*, b at the reference

    def at(self, C: float) -> Optimum:
        """N* and D* at C FLOPs. Raises InputError where C is not a positive number."""
        if not (np.isscalar(C) and np.isfinite(C) and C > 0):
            raise InputError(f"C = {C!r}: give the compute as one positive number of FLOPs")
        x = np.log(C / self.reference)
        log_n, log_d = self.draws[:, 0] + self.draws[:, 1] * x, self.draws[:, 2] + self.draws[:, 3] * x
        low, high = (f([s.C for s in self.slices if s.accepted]) for f in (min, max))
        factor, side = max((low / C, "below"), (C / high, "above"))
        warning = f"C = {C:.3g} is {factor:.3g}x {side} the slices ({low:.3g} to {high:.3g}): extrapolated"
        bounds = (tuple(np.exp(_interval(v, self.level)).tolist()) for v in (log_n, log_d))
        return Optimum(
            float(C),
            float(self.k_N * C**self.a),
            float(self.k_D * C**self.b),
            *bounds,
            warning if factor > 1.01 else None,
        )

    def table(self) -> pd.DataFrame:
        """One row per slice, in order of C."""
        return pd.DataFrame([asdict(s) for s in self.slices])

    def summary(self) -> str:
        accepted, share = sum(s.accepted for s in self.slices), f"{100 * self.level:.0f} %"
        lines = [f"Compute-optimal allocation by {self.method}: {accepted} of {len(self.slices)} slices accepted"]
        for symbol, power, scale in (("N*", "a", "k_N"), ("D*", "b", "k_D")):
            low, high = self.intervals[power]
            lines.append(
                f"  {symbol} = {getattr(self, scale):.4g} C^{getattr(self, power):.4f}   "
                f"{power} {share} interval [{low:.4f}, {high:.4f}]"
            )
        rows = [["C", "runs", "N*", "D*", "loss", "sd log N*", ""]]
        for s in self.slices:
            cells = ((s.N, ".3g"), (s.D, ".3g"), (s.loss, ".4f"), (s.sd_log_N, ".3f"))
            shown = ("" if v is None else format(v, f) for v, f in cells)
            rows.append([f"{s.C:.3g}", str(s.runs), *shown, f"{'' if s.accepted else 'refused: '}{s.reason}"])
        return "\n".join([*lines, text_table(rows, left=0, indent=2), *(f"  note: {n}" for n in self.notes)])

    def to_json(self) -> dict:
        values = {k: getattr(self, k) for k in ("method", "a", "b", "k_N", "k_D", "intervals", "level", "notes")}
        return values | {"slices": [asdict(s) for s in self.slices]}


def isoflop(
    runs: Runs,
    method: str = "parabola",
    by: str | Sequence[float] | None = None,
    tolerance: float = 0.15,
    width: float | None = None,
    noise: float | None = None,
    n: int = 400,
    level: float = 0.9,
    seed: int = 0,
) -> PowerLaws:
    """Approach 2: the minimum of log loss over log N in each slice of equal C.

    Slices are the values of the column `by`; or the runs within `tolerance` of each budget of the list `by`; or, where
    `by` is None, found: the window from C to (1 + tolerance) C that holds most runs, then the next, until fewer than
    five are left together. `method` is "parabola" (least squares) or "akima" (a spline through the points, as Porian et
    al. 2406.19146). Where C scatters within a slice a term linear in log C is fitted with the parabola and taken off.
    `width` keeps only the runs whose N is within that factor of the best run's. `noise` is the relative sd of a run's
    loss, where known, else the residuals say it.

    Draws: the parabola resamples runs within slices of 12 and more, residuals in smaller ones; the spline adds noise to
    the points. The power laws are weighted by 1/(sd^2 + tau^2) with tau the scatter between slices (DerSimonian-Laird).
    Only runs that are not held out are used. Raises InputError where fewer than two slices show a minimum.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is not known{nearest_or_all(method, METHODS)}")
    _check(tolerance=tolerance, width=width, noise=noise, n=n, level=level)
    runs, rng = runs.fitted, np.random.default_rng(seed)
    slices, draws = [], []
    for rows in _group(runs, by, tolerance):
        made, log_n, log_d = _slice(runs.take(rows), method, width, noise, n, rng)
        slices.append(made)
        draws.append((log_n, log_d))
    return _through(f"isoFLOP {method}", slices, draws, level, rng)


def envelope(
    runs: Runs, bins: int | None = None, least: int = 3, n: int = 400, level: float = 0.9, seed: int = 0
) -> PowerLaws:
    """Approach 1: the lower envelope of final loss over C, one run per log-spaced bin of C, at that run's own C.

    A bin counts where it holds `least` runs, its best run is beaten by none of lower C, and that run's N is neither the
    smallest nor the largest of the bin. N* is one of the runs' own N, so it is no finer than the runs' spacing. Draws
    resample runs within bins. Only runs that are not held out are used. Raises InputError.
    """
    _check(bins=bins, least=least, n=n, level=level)
    runs, rng = runs.fitted, np.random.default_rng(seed)
    if np.ptp(np.log(runs.flops)) < np.log(2):
        raise InputError(f"the {len(runs)} runs span less than a factor 2 in C: no envelope over C can be drawn")
    bins = bins or max(3, min(12, len(runs) // 6))
    edges = np.geomspace(runs.flops.min() * (1 - 1e-9), runs.flops.max() * (1 + 1e-9), bins + 1)
    slices, draws = [], []
    for low, high in pairwise(edges):
        rows = np.flatnonzero((runs.flops >= low) & (runs.flops < high))
        if not len(rows):
            continue
        best = rows[np.argmin(runs.loss[rows])]
        smallest, largest = runs.n[rows].min(), runs.n[rows].max()
        shape = {"runs": len(rows), "width": float(largest / smallest)}
        reason = None
        if len(rows) < least:
            reason = f"{len(rows)} runs in the bin, {least} needed"
        elif runs.loss[runs.flops < low].min(initial=np.inf) < runs.loss[best]:
            reason = "a run of lower C has a lower loss"
        elif runs.n[best] in (smallest, largest):
            side = "smallest" if runs.n[best] == smallest else "largest"
            reason = f"the best run is the {side} of the bin: the optimum may lie outside"
        if reason:
            slices.append(Slice(float(np.sqrt(low * high)), reason=reason, **shape))
            draws.append((None, None))
            continue
        drawn = rows[rng.integers(len(rows), size=(n, len(rows)))]
        winner = drawn[np.arange(n), np.argmin(runs.loss[drawn], axis=1)]
        # A winner's own C differs from draw to draw: bring it to the slice's C along N, D ~ C^(1/2).
        shift = 0.5 * np.log(runs.flops[best] / runs.flops[winner])
        log_n, log_d = np.log(runs.n[winner]) + shift, np.log(runs.d[winner]) + shift
        optimum = {"C": runs.flops[best], "N": runs.n[best], "D": runs.d[best], "loss": runs.loss[best]}
        slices.append(Slice(**{k: float(v) for k, v in optimum.items()}, accepted=True, **shape))
        draws.append((log_n, log_d))
    return _through("envelope", slices, draws, level, rng)


def _check(**given) -> None:
    """The numbers of the public functions."""
    bounds = {"tolerance": (1e-6, 1.0), "width": (1.01, np.inf), "noise": (0.0, 1.0), "n": (20, np.inf)}
    bounds |= {"level": (0.01, 0.999), "bins": (2, np.inf), "least": (3, np.inf)}
    for name, value in given.items():
        low, high = bounds[name]
        if value is not None and not low <= value <= high:
            raise InputError(f"{name} = {value!r}: expected a number from {low:g} to {high:g}")


def _group(runs: Runs, by, tolerance: float) -> list[np.ndarray]:
    """Row numbers of each slice, in order of C."""
    if isinstance(by, str):
        if by not in runs.frame.columns:
            raise InputError(f"no column {by!r} to slice by{nearest_or_all(by, runs.frame.columns)}")
        groups = [np.asarray(v) for v in runs.frame.reset_index(drop=True).groupby(by).indices.values()]
    elif by is not None:
        if not all(budget > 0 for budget in by):
            raise InputError(f"by = {list(by)}: expected positive budgets in FLOPs, or the name of a column")
        distance = np.abs(np.log(runs.flops)[:, None] - np.log(np.asarray(by, float))[None, :])
        nearest = np.where(distance.min(axis=1) <= np.log1p(tolerance), distance.argmin(axis=1), -1)
        groups = [np.flatnonzero(nearest == i) for i in range(len(by))]
    else:
        groups, left = [], np.argsort(runs.flops, kind="stable")
        while len(left) >= LEAST_RUNS:
            c = runs.flops[left]
            ends = np.searchsorted(c, c * (1 + tolerance) * (1 + 1e-12), side="right")
            first = int(np.argmax(ends - np.arange(len(c))))
            if ends[first] - first < LEAST_RUNS:
                break
            groups.append(left[first : ends[first]])
            left = np.delete(left, np.arange(first, ends[first]))
    groups = sorted((g for g in groups if len(g)), key=lambda g: runs.flops[g].mean())
    if not groups:
        few = f"no {LEAST_RUNS} of the {len(runs)} runs lie within {100 * tolerance:.0f} % in C: no isoFLOP slices"
        raise InputError(f"{few}; name their column with `by`, widen `tolerance`, or use the envelope")
    return groups


def _slice(runs: Runs, method, width, noise, n, rng):
    """The slice and the draws of its log N* and log D* (None where refused)."""
    C = float(np.exp(np.log(runs.flops).mean()))
    if width is not None:
        best = runs.n[np.argmin(runs.loss)]
        runs = runs.take(np.abs(np.log(runs.n / best)) <= np.log(width) * (1 + 1e-9))
    log_n, log_d, y, u = np.log(runs.n), np.log(runs.d), np.log(runs.loss), np.log(runs.flops / C)

    def refused(reason):
        return Slice(C, len(runs), reason=reason, width=float(np.exp(np.ptp(log_n)))), None, None

    scattered = np.ptp(u) > SCATTER
    columns = 4 if scattered else 3
    least = max(LEAST_RUNS, columns + 2)
    if (sizes := len(np.unique(np.round(log_n, 3)))) < least:
        return refused(f"{sizes} sizes in the slice, {least} needed" + (" where C scatters" if scattered else ""))
    if np.ptp(u) > np.log(2):
        return refused(f"C differs by a factor {np.exp(np.ptp(u)):.3g} within the slice: not one budget")
    middle, half = (log_n.max() + log_n.min()) / 2, np.ptp(log_n) / 2
    x = (log_n - middle) / half
    design = np.stack([np.ones_like(x), x, x**2, u][:columns], axis=1)
    solve = np.linalg.pinv(design)
    coefficients = solve @ y
    if scattered:  # what remains is loss at the slice's own C
        y = y - coefficients[3] * u
    if method == "parabola":
        if coefficients[2] <= 0:
            return refused("the parabola is concave: no minimum")
        place, value = _vertex(coefficients[:3])
        drawn = _parabola_draws(design[:, :3], y, noise, n, rng)
    else:
        place, value, drawn = _akima(x, y, noise, n, rng)
    if abs(place) >= 1:
        return refused(f"the optimum lies outside the data, at {'larger' if place > 0 else 'smaller'} N")
    inside = np.abs(drawn) < 1
    if inside.mean() < DETERMINED:
        return refused(f"flat: only {100 * inside.mean():.0f} % of the draws have a minimum inside the data")
    drawn = np.where(inside, drawn, rng.choice(drawn[inside], size=n))
    slope, level = np.polyfit(log_n, log_d - u, 1)  # D at the slice's own C
    star, stars = middle + half * place, middle + half * drawn
    warnings = []
    if np.exp(2 * half) > WIDE:
        warnings.append(f"wide: N spans a factor {np.exp(2 * half):.3g}")
    if abs(place) > OFF_CENTRE:
        warnings.append(f"off-centre: N* is {abs(place):.2f} half widths to {'large' if place > 0 else 'small'} N")
    reason = "; ".join(warnings) + (" (N* is biased)" if warnings and method == "parabola" else "")
    optimum = np.exp([star, level + slope * star, value]).tolist()
    shape = (float(np.std(stars)), float(np.exp(2 * half)), float(place))
    return Slice(C, len(runs), *optimum, *shape, True, reason), stars, level + slope * stars


def _vertex(c):
    """Place and value of the minimum of c0 + c1 x + c2 x^2, whose last axis is the coefficients."""
    c = np.asarray(c)
    with np.errstate(all="ignore"):
        place = np.where(c[..., 2] > 0, -c[..., 1] / (2 * c[..., 2]), np.inf)
        return place, c[..., 0] + c[..., 1] * place / 2


def _parabola_draws(design, y, noise, n, rng):
    """Places of the minimum, shape (n,): infinite where a draw has none."""
    solve = np.linalg.pinv(design)
    fitted = design @ (solve @ y)
    if noise is not None:
        return _vertex((fitted + noise * rng.standard_normal((n, len(y)))) @ solve.T)[0]
    if len(y) >= 12:
        weights = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=n)
        normal = np.einsum("ni,ij,ik->njk", weights, design, design)
        right = np.einsum("ni,ij,i->nj", weights, design, y)
        return _vertex(np.einsum("njk,nk->nj", np.linalg.pinv(normal), right))[0]
    leverage = np.einsum("ij,ji->i", design, solve)
    residual = (y - fitted) / np.sqrt(np.maximum(1 - leverage, 0.05))
    residual -= residual.mean()
    return _vertex((fitted + residual[rng.integers(len(y), size=(n, len(y)))]) @ solve.T)[0]


def _akima(x, y, sd, n, rng):
    """Place and value of the spline's lowest point, and its place in n draws with noise of sd added to the points.

    A place of 2 means: at the edge. The sd is that about a cubic (a parabola up to 6 points) where it is not known.
    Points very near in N are averaged first: a spline through both would follow their noise.
    """
    if sd is None:
        design = np.vander(x, 4 if len(x) > 6 else 3)
        residual = y - design @ (np.linalg.pinv(design) @ y)
        sd = np.sqrt(residual @ residual / (len(x) - design.shape[1]))
    order = np.argsort(x)
    x, y = x[order], y[order]
    group = np.concatenate([[0], np.cumsum(np.diff(x) > 0.02)])
    counts = np.bincount(group)
    x, y = np.bincount(group, x) / counts, np.bincount(group, y) / counts
    noisy = y[:, None] + (sd / np.sqrt(counts))[:, None] * rng.standard_normal((len(x), n))
    grid = np.linspace(x[0], x[-1], 801)
    curves = Akima1DInterpolator(x, np.concatenate([y[:, None], noisy], axis=1))(grid)
    lowest = np.argmin(curves, axis=0)
    near, every = np.clip(lowest, 1, len(grid) - 2), np.arange(curves.shape[1])
    before, at, after = (curves[near + i, every] for i in (-1, 0, 1))
    bend = np.maximum(before + after - 2 * at, 1e-300)
    place = grid[near] + (grid[1] - grid[0]) * np.clip((before - after) / (2 * bend), -1, 1)
    place = np.where(lowest == 0, -2.0, np.where(lowest == len(grid) - 1, 2.0, place))
    return place[0], at[0], place[1:]


def _through(method, slices, draws, level, rng) -> PowerLaws:
    """Power laws through the accepted slices; draws is one (log N*, log D*) per slice, each of shape (draws,)."""
    accepted = [i for i, s in enumerate(slices) if s.accepted]
    if len(accepted) < 2:
        why = "; ".join(f"C = {s.C:.3g}: {s.reason}" for s in slices if not s.accepted)
        raise InputError(f"{method}: {len(accepted)} of {len(slices)} slices show an optimum, 2 are needed ({why})")
    kept = [slices[i] for i in accepted]
    log_c = np.log([s.C for s in kept])
    star = np.log([[s.N, s.D] for s in kept]).T  # (2, slices)
    drawn = np.stack([np.stack(draws[i]) for i in accepted], axis=2)  # (2, draws, slices)
    variance = drawn[0].var(axis=0) + 1e-12
    tau2 = _between(log_c, star[0], variance)
    weights = 1 / (variance + tau2)
    middle = float(weights @ log_c / weights.sum())
    x = log_c - middle
    spread = np.sqrt(tau2) * rng.standard_normal(drawn.shape[1:])
    drawn = drawn + np.stack([spread, -spread])  # at fixed C, D* falls as N* rises
    height, slope = star @ weights / weights.sum(), (star * x) @ weights / (weights @ x**2)
    heights, slopes = drawn @ weights / weights.sum(), (drawn * x) @ weights / (weights @ x**2)  # (2, draws)
    bounds = {"a": slopes[0], "b": slopes[1], "k_N": heights[0] - slopes[0] * middle}
    bounds["k_D"] = heights[1] - slopes[1] * middle
    intervals = {k: _interval(v, level) for k, v in bounds.items()}
    intervals |= {k: np.exp(intervals[k]) for k in ("k_N", "k_D")}
    notes = ["two slices only: nothing checks that N* and D* are power laws of C"] if len(kept) == 2 else []
    offsets = [s.offset for s in kept if s.offset is not None]
    if offsets and max(offsets) - min(offsets) > 0.5:
        notes.append(
            f"the optimum moves from {min(offsets):+.2f} to {max(offsets):+.2f} half widths across the slices: a bias "
            "of N* that moves with it enters a and b; let the grid of N follow C^0.5"
        )
    return PowerLaws(
        method=method,
        a=float(slope[0]),
        b=float(slope[1]),
        k_N=float(np.exp(height[0] - slope[0] * middle)),
        k_D=float(np.exp(height[1] - slope[1] * middle)),
        intervals={k: tuple(float(e) for e in v) for k, v in intervals.items()},
        slices=tuple(slices),
        level=level,
        notes=tuple(notes),
        reference=float(np.exp(middle)),
        draws=np.stack([heights[0], slopes[0], heights[1], slopes[1]], axis=1),
    )


def _between(x, y, variance) -> float:
    """Variance of y about a weighted line in x beyond its own (DerSimonian and Laird 1986)."""
    if len(x) < 3:
        return 0.0
    design = np.stack([np.ones_like(x), x], axis=1)
    weighted = design / variance[:, None]
    covariance = np.linalg.inv(design.T @ weighted)
    residual = y - design @ (covariance @ (weighted.T @ y))
    excess = residual @ (residual / variance) - (len(x) - 2)
    scale = (1 / variance).sum() - np.trace(covariance @ (weighted.T @ weighted))
    return float(max(0.0, excess / scale))


def _interval(values, level):
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
