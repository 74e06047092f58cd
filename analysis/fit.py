"""Fits a law to runs: the global optimum of a robust objective, with a certificate, and the fitted object.

The objective is the sum of Huber on log loss. With N and D centred, delta is lowered step by step from a small grid of
starts (methods: centred continuation); every derivative is analytic, everything float64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from analysis.errors import InputError
from analysis.files import write_text
from analysis.laws import Law, law_named
from analysis.optimise import gradient_and_curvature, huber, minimise
from analysis.runs import Runs

OBJECTIVES = ("huber", "lad", "lsq")
FORMAT = 1


@dataclass(frozen=True, eq=False)
class LawFit:
    """A fitted law. Until `uncertainty.bootstrap` has run, `draws` is None and `intervals` empty.

    `z` and `draws` are the law's free core coordinates, (size,) and (draws, size), at `centre` = mean (log N, log D).
    `objective` is the sum of Huber, or the mean of |r| (lad) or r^2 (lsq), r the residual of log loss. `noise` holds
    the scale of the residuals (relative loss) and its degrees of freedom; `discrepancy` the law's own misfit, `k` per
    squared decade of compute past `origin`, the median fitted run (log10 of 6ND).
    """

    law: str
    params: dict[str, float]
    objective: float
    n_runs: int
    delta: float
    n_column: str
    diagnostics: dict
    objective_name: str
    z: np.ndarray = field(repr=False)
    centre: tuple[float, float]
    fitted_range: dict[str, list[float]]
    noise: dict[str, float]
    intervals: dict[str, list[float]] = field(default_factory=dict)
    discrepancy: dict[str, float] = field(default_factory=dict)
    draws: np.ndarray | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def predict(self, n, d):
        """The loss, nats per token, at N parameters and D tokens; broadcasts."""
        log_loss = self._log_loss(self.z, n, d)
        return float(np.exp(log_loss[0])) if log_loss.size == 1 and np.ndim(n) == np.ndim(d) == 0 else np.exp(log_loss)

    def predict_draws(self, n, d) -> np.ndarray:
        """The loss under each bootstrap draw, (draws, points); n and d are scalars or one-dimensional."""
        if self.draws is None:
            raise ValueError("this fit has no bootstrap draws: call uncertainty.bootstrap(fit, runs) first")
        return np.exp(self._log_loss(self.draws, n, d))

    def _log_loss(self, z, n, d):
        n, d = np.broadcast_arrays(np.atleast_1d(np.asarray(n, float)), np.asarray(d, float))
        for name, values in (("n", n), ("d", d)):
            wrong = values[~(np.isfinite(values) & (values > 0))]
            if wrong.size:
                raise InputError(f"{name} = {wrong.flat[0]:g}: must be positive and finite")
        return law_named(self.law).log_loss(z, np.log(n) - self.centre[0], np.log(d) - self.centre[1])[0]

    def outside(self, n: float, d: float, flops: float | None = None) -> str | None:
        """A line that says in what N, D and C (default 6ND) lie outside the fitted runs, or None."""
        values = {"C": 6.0 * n * d if flops is None else flops, "N": n, "D": d}
        spans = {name: self.fitted_range[key] for name, key in (("C", "flops"), ("N", "n"), ("D", "d"))}
        wrong = [
            f"{name} = {value:.3g} (fitted {spans[name][0]:.3g} to {spans[name][1]:.3g})"
            for name, value in values.items()
            if not spans[name][0] * 0.999 <= value <= spans[name][1] * 1.001
        ]
        return f"outside the fitted range: {', '.join(wrong)}" if wrong else None

    def params_of(self, z) -> dict:
        """The law's own parameters at free coordinates z, (..., size); values have the shape of z without its end."""
        return natural_params(law_named(self.law), z, self.centre)

    def summary(self) -> str:
        """Estimate, interval, diagnostics, and what was assumed, for a reader."""
        law = law_named(self.law)
        what = {"huber": f"sum of Huber (delta {self.delta:g}) on log loss", "lad": "mean |log residual|"}
        lines = [
            f"{self.law}: L = {law.formula}",
            f"  {law.source}",
            f"  N is {self.n_column}; {self.n_runs} runs fitted, "
            f"N {_span(self.fitted_range['n'])}, D {_span(self.fitted_range['d'])}, "
            f"C {_span(self.fitted_range['flops'])} FLOPs",
            "",
            f"  {'parameter':<10}{'estimate':>14}    90 % interval",
        ]
        for name, value in self.params.items():
            low_high = self.intervals.get(name)
            shown = f"[{low_high[0]:.5g}, {low_high[1]:.5g}]" if low_high else "not computed"
            lines.append(f"  {name:<10}{value:>14.6g}    {shown}")
        info = self.diagnostics
        second, misfit = info["second_best"], self.discrepancy.get("k")
        lines += [
            "",
            f"  objective  {self.objective:.10g} ({what.get(self.objective_name, 'mean squared log residual')})",
            f"  optimum    {info['starts_agree']} of {info['starts']} starts agree; "
            f"gradient {info['gradient_norm']:.1e}; condition number {info['condition_number']:.1e}; "
            f"{'converged' if info['converged'] else 'NOT CONVERGED'}",
            f"  next local minimum  {'none found' if second is None else f'{100 * second:.2f} % higher'}",
            f"  noise      {100 * self.noise['sigma']:.2f} % of the loss ({self.noise['dof']:.0f} degrees of freedom)",
        ]
        if misfit is not None:
            lines.append(f"  misfit     {100 * misfit:.2f} % per squared decade of compute past the median run")
        at_bound = info.get("at_bound", [])
        if at_bound:
            lines.append(f"  warning    at the edge of the allowed range: {', '.join(at_bound)}")
        lines += [f"  note       {note}" for note in self.notes]
        lines.append("  assumed    final losses; relative, independent noise; the form of the law")
        return "\n".join(lines)

    def save(self, path) -> Path:
        """Writes fit.json: all that prediction and allocation need, intervals included, without the data."""
        record = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self)}
        record["z"] = self.z.tolist()
        record["draws"] = None if self.draws is None else self.draws.tolist()
        return write_text(path, json.dumps(record, allow_nan=False) + "\n")


def load_fit(path) -> LawFit:
    """The fit that `save` wrote. Raises InputError where the file is missing or damaged."""
    path = Path(path)
    again = "make it again with: scaling fit RUNS --out fit.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise InputError(f"{path} cannot be read as a fit ({reason}); {again}") from error
    try:
        if record.pop("format") != FORMAT:
            raise InputError(f"{path} was written by another version; {again}")
        law = law_named(record["law"])
        z = np.array(record.pop("z"), dtype=np.float64)
        draws = record.pop("draws")
        draws = None if draws is None else np.array(draws, dtype=np.float64)
        loaded = LawFit(
            z=z,
            draws=draws,
            centre=tuple(map(float, record.pop("centre"))),
            notes=tuple(record.pop("notes")),
            **record,
        )
        ok = z.shape == (law.size,) and np.isfinite(z).all() and len(loaded.centre) == 2
        ok &= draws is None or (draws.ndim == 2 and draws.shape[1] == law.size and np.isfinite(draws).all())
        ok &= set(loaded.params) == set(law.parameters) and {"sigma", "dof"} <= set(loaded.noise)
        ok &= {"n", "d", "flops"} <= set(loaded.fitted_range)
        stated, meant = loaded.params, natural_params(law, z, loaded.centre)
        ok &= all(np.isclose(float(stated[name]), float(meant[name]), rtol=1e-6, atol=1e-9) for name in law.parameters)
        if not ok:
            raise ValueError("shapes")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a fit of ours, or is damaged; {again}") from error
    return loaded


def fit(runs: Runs, law: str, delta: float = 1e-3, weights=None, objective: str = "huber") -> LawFit:
    """Fits the law to the runs that are not held out.

    objective: "huber" (sum, at delta), "lad" (mean absolute) or "lsq" (mean square), all of log loss. weights: one per
    run, held-out runs included, or None. Raises InputError where the runs cannot identify the law.
    """
    form = law_named(law)
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    if not delta > 0:
        raise InputError(f"delta = {delta}: must be positive")
    used = runs.fitted
    check_identifiable(used, form)
    x, y, target, centre = centred(used)
    w = np.ones(len(used)) if weights is None else np.asarray(weights, float)[~runs.holdout]
    if w.shape != (len(used),) or not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise InputError("weights: one finite weight of at least 0 is needed per run, and not all may be 0")

    starts = form.starts(used.loss)
    z, agree = solve(form, x, y, target, starts, w, objective, delta, merge=True)
    cost = objective_value(form, z, x, y, target, w, objective, delta)
    best = int(np.argmin(cost))
    floor = cost[best]
    same = cost <= floor + 1e-7 * abs(floor) + 1e-18
    z, second = z[best], None if same.all() else float(cost[~same].min() / max(floor, 1e-300) - 1.0)

    final = {"huber": delta, "lad": 1e-12, "lsq": np.inf}[objective]
    gradient, pull, condition = gradient_and_curvature(form, z, x, y, target, w, final)
    low, high = np.array(form.bounds).T
    gradient_norm = float(np.abs(gradient).max())
    residual = form.log_loss(z, x, y)[0] - target
    return LawFit(
        law=form.name,
        params={k: float(v) for k, v in natural_params(form, z, centre).items()},
        objective=float(floor),
        n_runs=len(used),
        delta=float(delta),
        n_column=runs.n_column,
        diagnostics={
            "gradient_norm": gradient_norm,
            "starts": len(starts),
            "starts_agree": int(agree[same].sum()),
            "condition_number": condition,
            "converged": bool(gradient_norm <= (1e-3 if objective == "lad" else 1e-6) * pull + 1e-14),
            "second_best": second,
            "at_bound": [form.parameters[i] for i in range(form.size) if z[i] <= low[i] or z[i] >= high[i]],
        },
        objective_name=objective,
        z=z,
        centre=centre,
        fitted_range={
            "n": [float(used.n.min()), float(used.n.max())],
            "d": [float(used.d.min()), float(used.d.max())],
            "flops": [float((6 * used.n * used.d).min()), float((6 * used.n * used.d).max())],
        },
        noise=noise_of(residual, form.size),
        notes=(*runs.notes, *_doubts(used, condition)),
    )


def _doubts(used: Runs, condition: float) -> list[str]:
    few = [
        f"{quantity} takes {len(np.unique(values))} values"
        for quantity, values in (("N", used.n), ("D", used.d))
        if len(np.unique(values)) < 3
    ]
    if few:
        return [f"{' and '.join(few)}: at least 3 are needed to tell its exponent from the floor E"]
    if condition > 1e12:
        return ["these runs do not pin down every parameter (see the condition number): add runs at other N and D"]
    return []


def check_identifiable(used: Runs, law: Law) -> None:
    """Raises InputError where the runs are too few, or all at one N or one D."""
    if len(used) <= law.size:
        simpler = "" if law.size <= 5 else ", or choose --law chinchilla (5 parameters)"
        raise InputError(
            f"{len(used)} runs to fit, but law {law.name!r} has {law.size} parameters: at least {law.size + 1} are "
            f"needed{simpler}"
        )
    for values, quantity, column in ((used.n, "N", used.n_column), (used.d, "D", used.d_column)):
        if np.ptp(np.log(values)) < 1e-6:
            raise InputError(
                f"column {column!r} ({quantity}): all {len(used)} fitted runs have the same value {values[0]:.6g}; "
                f"add runs at another {quantity}, or hold fewer out"
            )


def centred(used: Runs):
    """log N and log D less their means, log loss, and the two means."""
    x, y = np.log(used.n), np.log(used.d)
    centre = (float(x.mean()), float(y.mean()))
    return x - centre[0], y - centre[1], np.log(used.loss), centre


def solve(law, x, y, target, starts, weights, objective="huber", delta=1e-3, merge=False, warm=False):
    """Continuation in delta down to the objective asked for, from each start.

    With merge, starts that meet after the first step go on as one; returns the points and how many starts each stands
    for. Warm starts begin one step above the final delta.
    """
    if warm:
        steps = {"huber": [s for s in (0.01,) if s > 2 * delta] + [delta], "lad": [0.01, 1e-3, 1e-4]}
    else:
        steps = {
            "huber": [s for s in (0.1, 0.01) if s > 2 * delta] + [delta],
            "lad": [0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12],
        }
    steps = steps.get(objective, [np.inf])
    z, count = starts, np.ones(len(starts), dtype=int)
    for i, step in enumerate(steps):
        iterations = 300 if i == len(steps) - 1 else 100 if step < 1e-3 else 30
        z, cost = minimise(law, x, y, target, z, weights, delta=step, iterations=iterations)
        if merge and len(z) > 1:
            groups: list[list[int]] = []
            for j in np.argsort(cost):
                near = [g for g in groups if np.abs(z[j] - z[g[0]]).max() < 1e-4]
                near[0].append(j) if near else groups.append([j])
            count = np.array([count[g].sum() for g in groups])
            z = z[[g[0] for g in groups]]
    return (z, count) if merge else z


def objective_value(law, z, x, y, target, weights, objective, delta):
    """Sum of Huber, mean of |r|, or mean of r^2, (...,), at z (..., size)."""
    r = law.log_loss(z, x, y)[0] - target
    if objective == "huber":
        return np.sum(weights * huber(r, delta), axis=-1)
    return np.sum(weights * (np.abs(r) if objective == "lad" else r * r), axis=-1) / np.sum(weights)


def natural_params(law, z, centre) -> dict:
    """The law's own parameters at free coordinates z, (..., size), of a fit centred at (mean log N, mean log D)."""
    core = np.array(law.core(np.asarray(z)), copy=True)
    core[..., 1] += core[..., 3] * centre[0]
    core[..., 2] += core[..., 4] * centre[1]
    return law.to_params(np.moveaxis(core, -1, 0))


def noise_of(residual, size) -> dict[str, float]:
    """Scale of the residuals as a share of the loss, with n - p degrees of freedom.

    A robust fit passes through about p of its points, so the p smallest residuals say nothing; the rest, winsorised at
    three times their median scale, give a root mean square over n - p.
    """
    dof = max(len(residual) - size, 1)
    outer = np.sort(np.abs(residual))[-dof:]
    clip = 3.0 * 1.4826 * np.median(outer)
    return {"sigma": float(np.sqrt(np.sum(np.minimum(np.abs(residual), clip) ** 2) / dof)), "dof": float(dof)}


def _span(pair):
    return f"{pair[0]:.3g} to {pair[1]:.3g}"
