"""Fits a law of the whole loss curve to a few curves of one model, and predicts schedules that were not run.

Losses are in nats per token. Shape letters: P logged points, Z free coordinates of a law, M several such at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from scipy.stats import t as student

from analysis.curves.curve import LossCurve, dense, drops, warmup_steps
from analysis.curves.forms import CURVE_LAWS, GRID, CurveModel, natural
from analysis.errors import InputError, nearest_or_all
from analysis.fitting.optimise import gradient_and_curvature, minimise
from analysis.fitting.problem import noise_of
from analysis.fitting.search import objective_value, solve
from analysis.text import text_table

WEIGHTS = ("curves", "points")
# Most points of a curve that enter one by one.
_MOST = 400
# Shares of a curve kept before a cut, and shares of its start that may be skipped.
_CUTS, _SKIPS = (0.5, 0.7), (0.0, 0.1, 0.2)


@dataclass(frozen=True, eq=False)
class CurveFit:
    """A fitted law of the curve. Losses in nats per token, `noise`, `misfit` and errors as shares of the loss.

    `scale` turns the free coordinates `z` (Z,) and `draws` (M, Z) into the law's parameters: the peak lr, the mean log
    S, and the units of S and of steps. `folds` holds a row for each prediction of what its fit had not seen; `scores`
    the mean absolute error of each law over the folds that all of them can fit.
    """

    law: str
    params: dict[str, float]
    intervals: dict[str, list[float]]
    objective: float
    delta: float
    weights: str
    skip: float
    curves: list[dict]
    diagnostics: dict
    noise: dict[str, float]
    misfit: dict[str, float]
    folds: list[dict]
    scores: dict[str, float]
    scale: dict[str, float]
    z: np.ndarray = field(repr=False)
    draws: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()

    def predict(self, lr, step=None) -> np.ndarray:
        """The loss (P,) at the steps (default: all from the end of the warm-up on) of a schedule (steps + 1,)."""
        return np.exp(self._log_loss(lr, step, self.z[None])[0])

    def final_loss(self, lr, step=None) -> tuple[float, float, float]:
        """(predicted, low, high): the mean loss over `step` (default: the last step alone) and its 90 % interval.

        The interval is Student's, on log loss, and joins three variances: the noise of a logged loss (averaged over
        the steps as an AR(1) series), the scatter of the block bootstrap's predictions, and the mean square error of
        the folds at the ends of what they had not seen, which grows by itself with every doubling of S past the curves.
        """
        step = [len(np.atleast_1d(lr)) - 1] if step is None else step
        losses = np.exp(self._log_loss(lr, step, np.vstack([self.z, self.draws]))).mean(axis=1)
        n, rho = len(np.atleast_1d(step)), self.noise["rho"]
        lag = np.arange(1, n)
        averaged = (1 + 2 * np.sum((1 - lag / n) * rho**lag)) / n
        spread = np.var(np.log(losses[1:]))
        past = np.log2(max(np.sum(lr) / (25 * self.scale["unit"]), 1.0))
        sd = np.sqrt(self.noise["sigma"] ** 2 * averaged + spread + self.misfit["sigma"] ** 2 * (1 + past))
        reach = np.exp(student.ppf(0.95, max(self.misfit["count"], 1)) * sd)
        return float(losses[0]), float(losses[0] / reach), float(losses[0] * reach)

    def _log_loss(self, lr, step, z_MZ):
        if step is None:
            lr = dense(lr, np.array([len(np.atleast_1d(lr)) - 1]), "schedule")
            step = np.arange(warmup_steps(lr), len(lr))
        step = np.atleast_1d(np.asarray(step, np.int64))
        if not len(step) or (np.diff(step) <= 0).any() or step[0] < 0:
            raise InputError(f"step {step[:3]}...: the steps to predict must rise and be at least 0")
        lr = dense(lr, step, "schedule")
        chunks = np.array_split(step, 1 + len(step) // 250)
        parts = [CurveModel(self.law, [(lr, part)], self.scale, cells=4 * GRID) for part in chunks]
        return np.concatenate([part(z_MZ)[0] for part in parts], axis=-1)

    def summary(self) -> str:
        """Estimate, interval, diagnostics, and what was assumed, for a reader."""
        law, info = CURVE_LAWS[self.law], self.diagnostics
        points = sum(c["points"] for c in self.curves)
        lines = [
            f"{self.law}: L(t) = {law.formula}",
            f"  {law.source}",
            f"  {len(self.curves)} curves, {points} points from {100 * self.skip:g} % of the steps on, equal weight "
            f"for each {self.weights[:-1]}: {', '.join(c['name'] for c in self.curves)}",
            "",
        ]
        rows = [["parameter", "estimate", "90 % interval"]]
        for name, value in self.params.items():
            low, high = self.intervals[name]
            rows.append([name, f"{value:.6g}", f"[{low:.5g}, {high:.5g}]"])
        second = info["second_best"]
        compared = ", ".join(f"{k} {100 * v:.3f} %" for k, v in self.scores.items())
        lines += [
            text_table(rows, left=1, indent=2),
            "",
            f"  objective  {self.objective:.8g} (sum of Huber, delta {self.delta:g}, on log loss)",
            f"  optimum    {info['starts_agree']} of {info['starts']} starts agree; gradient "
            f"{info['gradient_norm']:.1e}; condition number {info['condition_number']:.1e}; "
            + ("converged" if info["converged"] else "NOT CONVERGED"),
            f"  next local minimum  {'none found' if second is None else f'{100 * second:.2f} % higher'}",
            f"  residuals  {100 * self.noise['sigma']:.3f} % of the loss, correlation {self.noise['rho']:.2f} point to "
            "point",
            f"  misfit     {100 * self.misfit['sigma']:.3f} % at the ends of {self.misfit['count']} parts that their "
            "fit had not seen",
            f"  unseen     {compared or 'not computed'} (mean error over curves left out or cut short)",
        ]
        if info["at_bound"]:
            lines.append(f"  warning    at the edge of the allowed range: {', '.join(info['at_bound'])}")
        lines += [f"  note       {note}" for note in self.notes]
        lines.append("  assumed    one model, data order and batch size for all schedules; the form of the law")
        return "\n".join(lines)

    def to_json(self) -> dict:
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return record | {"z": self.z.tolist(), "draws": self.draws.tolist()}


def fit_curves(
    curves: Sequence[LossCurve],
    law: str = "auto",
    delta: float = 1e-3,
    weights: str = "curves",
    skip: float | None = None,
    draws: int = 40,
    seed: int = 0,
) -> CurveFit:
    """Fits a law jointly to curves of one model under different schedules.

    Minimises the sum of Huber (delta) on log loss. weights: "curves" gives each curve the same total, "points" each
    point. Points in the warm-up and in the first share `skip` of a curve's steps are left out; a curve of more than
    400 points enters as 200 means. lambda is fitted. law "auto" and skip None (0, 0.1 or 0.2) take what predicts best
    the parts that a fit has not seen: each curve from the others, and what follows a cut of all curves at 50 and 70 %
    from what comes before; first the law, at the middle skip, then the skip. The intervals come from `draws` refits
    under random weights of twelve blocks a curve. Raises InputError where the curves cannot identify the law.
    """
    if law != "auto" and law not in CURVE_LAWS:
        raise InputError(f"law {law!r} is unknown{nearest_or_all(law, ['auto', *CURVE_LAWS])}")
    if weights not in WEIGHTS:
        raise InputError(f"weights {weights!r} is unknown{nearest_or_all(weights, WEIGHTS)}")
    if not (delta > 0 and (skip is None or 0 <= skip < 1) and draws >= 2):
        raise InputError(
            f"delta = {delta}, skip = {skip}, draws = {draws}: needed are delta > 0, 0 <= skip < 1, draws > 1"
        )
    skips = _SKIPS if skip is None else (skip,)
    middle = skips[len(skips) // 2]
    used, _ = _usable(curves, middle)
    names = [law] if law != "auto" else [k for k in CURVE_LAWS if _unidentified(k, used) is None] or ["tissue"]
    if problem := _unidentified(names[0], used):
        raise InputError(problem)
    tried = {(k, middle): _folds(k, curves, middle, skips[-1], delta, weights) for k in names}
    name = _best(tried)[0]
    tried |= {(name, k): _folds(name, curves, k, skips[-1], delta, weights) for k in skips if k != middle}
    common = set.intersection(*({f["fold"] for f in rows} for rows in tried.values()))
    scores = {f"{k} skip {v:g}": _score(rows, common) for (k, v), rows in tried.items() if common}
    skip = _best({k: v for k, v in tried.items() if k[0] == name})[1]
    folds = tried[name, skip]
    used, notes = _usable(curves, skip)
    if law == "auto" and len(names) == 1:
        notes.append(f"multi_power was not tried: {_unidentified('multi_power', used)}")
    ends = np.array([f["final"] for f in folds])
    if not len(ends):
        notes.append("no part of the curves could be left out: the intervals hold no misfit; add a curve")

    form = CURVE_LAWS[name]
    problem, target, w = _problem(name, used, weights)
    coarse, rows = problem.thinned(used)
    z_SZ, met = _solve(coarse, target[rows], w[rows], delta)
    z_SZ, merged = _solve(problem, target, w, delta, z_SZ, met)
    cost = objective_value(problem, z_SZ, target, w, "huber", delta)
    floor = float(cost.min())
    same = cost <= floor * (1 + 1e-7) + 1e-18
    z = z_SZ[cost.argmin()]
    gradient, pull, condition = gradient_and_curvature(problem, z, target, w, delta)
    residual = problem(z)[0] - target
    parts = np.split(residual, np.cumsum([len(c.step) for c in used])[:-1])
    boot = _bootstrap(coarse, target[rows], w[rows], [len(p) for p in coarse.steps], z, delta, draws, seed)
    params = {k: float(v) for k, v in natural(form, z, problem.scale).items()}
    return CurveFit(
        law=name,
        params=params,
        intervals=_intervals(params, natural(form, boot, problem.scale), 12 * len(used) - form.size),
        objective=floor,
        delta=float(delta),
        weights=weights,
        skip=float(skip),
        curves=[
            {"name": c.name, "points": len(c.step), "steps": int(c.step[-1]), "rms": float(np.sqrt(np.mean(r * r)))}
            for c, r in zip(used, parts, strict=True)
        ],
        diagnostics={
            "gradient_norm": float(np.abs(gradient).max()),
            "converged": bool(np.abs(gradient).max() <= 1e-6 * pull + 1e-14),
            "starts": int(met.sum()),
            "starts_agree": int(merged[same].sum()),
            "second_best": None if same.all() else float(cost[~same].min() / max(floor, 1e-300) - 1),
            "condition_number": condition,
            "at_bound": [form.parameters[i] for i in range(form.size) if not problem.low[i] < z[i] < problem.high[i]],
        },
        noise={"sigma": noise_of(residual, form.size)["sigma"], "rho": _correlation(parts)},
        misfit={"sigma": float(np.sqrt(np.mean(ends**2))) if len(ends) else 0.0, "count": len(ends)},
        folds=folds,
        scores=scores,
        scale=problem.scale,
        z=z,
        draws=boot,
        notes=tuple(notes),
    )


def _usable(curves, skip):
    names = [c.name for c in curves]
    if not names:
        raise InputError("no curves to fit: give at least one, better three with different schedules")
    if len(set(names)) < len(names):
        raise InputError(f"two curves have the name {max(names, key=names.count)!r}: give each its own with name=")
    used, notes = [], []
    for c in curves:
        rows = c.step >= max(c.warmup, skip * c.step[-1])
        if rows.sum() < 10:
            raise InputError(
                f"{c.name}: {rows.sum()} points after the warm-up (step {c.warmup}): at least 10 are needed"
            )
        if not rows.all():
            notes.append(f"{c.name}: {(~rows).sum()} points of the warm-up or the skipped start left out")
        c = c.take(rows)
        if len(c.step) > _MOST:
            notes.append(f"{c.name}: {len(c.step)} points enter as {_MOST // 2} means")
            c = c.binned(_MOST // 2)
        used.append(c)
    return used, notes


def _unidentified(name, curves) -> str | None:
    """Why these schedules do not pin down the law, and what to add; None where they do."""
    rates = [rate for c in curves for rate in c.lr[np.flatnonzero(drops(c.lr, c.step))]]
    names = ", ".join(c.name for c in curves[:4])
    if not rates:
        which = "C and lambda" if name == "tissue" else "B, C, beta and gamma"
        return (
            f"law {name!r}: {which} cannot be told from curves of constant lr ({names}): add one whose lr falls after "
            "the warm-up, such as cosine or wsd"
        )
    if name == "multi_power" and np.ptp(rates) <= 1e-3 * max(rates):
        return (
            f"law {name!r}: gamma needs two rates that lr falls to, and there is {rates[0]:.3g} alone ({names}): add a "
            "cosine or wsd curve, or choose 'tissue'"
        )
    return None


def _problem(name, curves, weights):
    loss = np.concatenate([c.loss for c in curves])
    each = [len(loss) / len(curves) / len(c.step) if weights == "curves" else 1.0 for c in curves]
    w = np.concatenate([np.full(len(c.step), one) for c, one in zip(curves, each, strict=True)])
    return CurveModel(name, [(c.lr, c.step) for c in curves], floor=float(loss.min())), np.log(loss), w


def _solve(problem, target, w, delta, z=None, met=None):
    """Distinct local minima from the starts, or from z that stand for `met` starts each, and how many reached each."""
    starts = problem.starts(np.exp(target)) if z is None else z
    z, count = solve(problem, target, starts, w, "huber", delta, merge=True, warm=met is not None)
    if met is None:
        return z, count
    nearest = [np.abs(z - start).max(axis=1).argmin() for start in starts]
    return z, np.bincount(nearest, met, minlength=len(z))


def _score(rows, common) -> float:
    return float(np.mean([f["error"] for f in rows if f["fold"] in common]))


def _best(tried):
    """The key of the least mean error over the folds that all of them have."""
    common = set.intersection(*({f["fold"] for f in rows} for rows in tried.values()))
    return min(tried, key=lambda k: _score(tried[k], common)) if common else next(iter(tried))


def _folds(name, curves, skip, scored, delta, weights):
    """What a fit to part of the curves makes of the rest: each curve left out, and all of them cut.

    Scored are the points past the share `scored` of a curve's steps, the same for every skip.
    """
    curves, _ = _usable(curves, skip)
    last = [c.step[-1] for c in curves]
    tests = [(f"{c.name} left out", curves[:i] + curves[i + 1 :], [(c, scored)]) for i, c in enumerate(curves)]
    for cut in _CUTS:
        rows = [c.step <= cut * end for c, end in zip(curves, last, strict=True)]
        seen = [c.take(row) for c, row in zip(curves, rows, strict=True) if row.sum() >= 7]
        tests.append((f"cut at {cut:g}", seen, [(c, max(cut, scored)) for c in curves]))
    out = []
    for title, seen, unseen in tests:
        if not seen or _unidentified(name, seen) is not None:
            continue
        problem, target, w = _problem(name, seen, weights)
        problem, keep = problem.thinned(seen)
        target, w = target[keep], w[keep]
        z, _ = minimise(problem, target, problem.starts(np.exp(target))[::2], w, 10 * delta, 30)
        z, cost = minimise(problem, target, z, w, delta, 300)
        z = z[cost.argmin()]
        for c, share in unseen:
            later = c.step > share * c.step[-1]
            error = CurveModel(name, [(c.lr, c.step[later])], problem.scale)(z)[0] - np.log(c.loss[later])
            fold = title if title.endswith("out") else f"{c.name} {title}"
            final = float(error[-window(c) :].mean())
            out.append({"fold": fold, "error": float(np.abs(error).mean()), "final": final})
    return out


def _correlation(parts) -> float:
    """Correlation of residuals from point to point, pooled over curves, winsorised at three median scales."""
    clip = 4.45 * np.median(np.abs(np.concatenate(parts))) + 1e-300
    parts = [np.clip(p, -clip, clip) for p in parts]
    return float(np.clip(sum(p[1:] @ p[:-1] for p in parts) / max(sum(p @ p for p in parts), 1e-300), 0.0, 0.98))


def _bootstrap(problem, target, w, sizes, z, delta, draws, seed):
    """Refits (M, Z) under random exponential weights of twelve blocks of neighbouring points a curve."""
    rng = np.random.default_rng(seed)
    blocks = np.concatenate([np.arange(n) * 12 // n + 12 * i for i, n in enumerate(sizes)])
    random = rng.exponential(size=(draws, 12 * len(sizes)))
    start = minimise(problem, target, z[None], w, delta, 60)[0]
    return minimise(problem, target, np.repeat(start, draws, axis=0), w * random[:, blocks], delta, 40)[0]


def _intervals(params, draws, dof) -> dict[str, list[float]]:
    """90 % Student intervals from the scatter of the draws, in the log of all but gamma, for lambda of 1 - lambda."""
    reach = student.ppf(0.95, max(dof, 2))
    out = {}
    for name, value in params.items():
        if name == "gamma":
            out[name] = [value - reach * np.std(draws[name]), value + reach * np.std(draws[name])]
        elif name == "lambda":
            factor = np.exp(reach * np.std(np.log1p(-draws[name])))
            out[name] = [1 - (1 - value) * factor, 1 - (1 - value) / factor]
        else:
            factor = np.exp(reach * np.std(np.log(draws[name])))
            out[name] = [value / factor, value * factor]
    return {name: [float(low), float(high)] for name, (low, high) in out.items()}


def window(curve: LossCurve) -> int:
    return min(len(curve.step), max(5, round(0.02 * len(curve.step))))
