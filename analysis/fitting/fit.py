"""Fits a law to runs: the global optimum of a robust objective, with a certificate, and the fitted object.

The objective is the sum of Huber on log loss. With N and D centred, delta is lowered step by step from a small grid of
starts (methods: centred continuation); every derivative is analytic, everything float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.files import write_text
from analysis.fitting.optimise import gradient_and_curvature, huber, minimise, refine
from analysis.laws.forms import Law, law_named
from analysis.runs import Runs
from analysis.text import text_table

OBJECTIVES = ("huber", "lad", "lsq", "lsq_raw")
FORMAT = 2
_KEYS = {"N": "n", "D": "d", "C": "flops"}


class Model:
    """A law at the runs' inputs, as `minimise` wants it: by its free coordinates u, z = u @ matrix + offset.

    Gives log of the law, or the law itself where the objective is of raw loss.
    """

    def __init__(self, law: Law, inputs, raw: bool = False, matrix=None, offset=None, free=None):
        self.law, self.inputs, self.raw, self.matrix, self.offset = law, inputs, raw, matrix, offset
        self.free = list(range(law.size)) if free is None else free
        self.low, self.high = np.array(law.bounds).T[:, self.free]

    @classmethod
    def held(cls, law: Law, inputs, centre, fixed=None, tied=(), raw: bool = False) -> Model:
        """The model with parameters fixed {name: value} or tied in pairs."""
        if not (fixed or tied):
            return cls(law, inputs, raw)
        from analysis.laws.symbols import constraints

        return cls(law, inputs, raw, *constraints(law, {k: centre[k] for k in law.centred}, dict(fixed or {}), tied))

    def __call__(self, u):
        z = self.z(u)
        value, jacobian = (self.law.value if self.raw else self.law.log_value)(z, self.inputs)
        return value, jacobian if self.matrix is None else np.matmul(self.matrix, jacobian)

    def z(self, u):
        return u if self.matrix is None else u @ self.matrix + self.offset


@dataclass(frozen=True, eq=False)
class LawFit:
    """A fitted law. Until `uncertainty.bootstrap` has run, `draws` is None and `intervals` empty.

    `z` and `draws` are the law's coordinates, (size,) and (draws, size), at `centre`, the mean log of each input.
    `objective` is the sum of Huber of log loss, or the mean of |r| (lad), of r^2 (lsq), or of the squared residual of
    the loss itself (lsq_raw). `noise` holds the scale of the residuals (relative loss) and its degrees of freedom;
    `discrepancy` the law's own misfit, `k` per squared decade of compute past `origin`, the median fitted run (log10 of
    6ND, or of the only input).
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
    centre: dict[str, float]
    fitted_range: dict[str, list[float]]
    noise: dict[str, float]
    intervals: dict[str, list[float]] = field(default_factory=dict)
    discrepancy: dict[str, float] = field(default_factory=dict)
    draws: np.ndarray | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    fixed: dict[str, float] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    columns: dict[str, str] = field(default_factory=dict)

    def predict(self, n=None, d=None, **inputs):
        """The loss, in the unit of the fitted runs, at the law's inputs; broadcasts.

        n and d are the first and second input of the law (N and D where it has them); others by name, as in U=1e9.
        """
        values = self.inputs_of(n, d, inputs)
        log_loss = self._log_loss(self.z, values)
        scalar = all(np.ndim(v) == 0 for v in values)
        return float(np.exp(log_loss[0])) if scalar else np.exp(log_loss)

    def predict_draws(self, n=None, d=None, **inputs) -> np.ndarray:
        """The loss under each bootstrap draw, (draws, points); inputs are scalars or one-dimensional."""
        if self.draws is None:
            raise ValueError("this fit has no bootstrap draws: call uncertainty.bootstrap(fit, runs) first")
        return np.exp(self._log_loss(self.draws, self.inputs_of(n, d, inputs)))

    def inputs_of(self, n, d, inputs) -> list:
        """The inputs in the law's order; InputError where one is missing, not known, or not positive."""
        law = law_named(self.law)
        given = dict(zip(law.inputs, (n, d), strict=False)) | inputs
        given = {k: v for k, v in given.items() if v is not None}
        unknown = set(given) - set(law.inputs)
        if unknown or (d is not None and len(law.inputs) < 2):
            name = min(unknown, default="d")
            raise InputError(f"law {law.name!r} has no input {name!r}: it takes {', '.join(law.inputs)}")
        for name in law.inputs:
            if name not in given:
                raise InputError(f"law {law.name!r} needs {name}: it takes {', '.join(law.inputs)}")
            values = np.asarray(given[name], float)
            wrong = values[~(np.isfinite(values) & (values > 0))]
            if wrong.size:
                raise InputError(f"{name.lower()} = {wrong.flat[0]:g}: must be positive and finite")
        return [given[name] for name in law.inputs]

    def _log_loss(self, z, values):
        law = law_named(self.law)
        values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in values))
        shape = values[0].shape
        inputs = [np.log(v.ravel()) - self.centre[name] for name, v in zip(law.inputs, values, strict=True)]
        log_loss = law.log_value(z, inputs)[0]
        return log_loss.reshape(*log_loss.shape[:-1], *shape)

    def outside(self, n=None, d=None, flops: float | None = None, **inputs) -> str | None:
        """A line that says in what inputs and C (default 6ND) lie outside the fitted runs, or None; for one point."""
        law = law_named(self.law)
        values = dict(zip(law.inputs, map(float, self.inputs_of(n, d, inputs)), strict=True))
        if {"N", "D"} <= set(values):
            values = {"C": 6.0 * values["N"] * values["D"] if flops is None else flops} | values
        wrong = []
        for name, value in values.items():
            low, high = self.fitted_range[_KEYS.get(name, name)]
            if not low * 0.999 <= value <= high * 1.001:
                wrong.append(f"{name} = {value:.3g} (fitted {low:.3g} to {high:.3g})")
        return f"outside the fitted range: {', '.join(wrong)}" if wrong else None

    def params_of(self, z) -> dict:
        """The law's own parameters at coordinates z, (..., size); values have the shape of z without its end."""
        law = law_named(self.law)
        return law.params(z, {name: self.centre[name] for name in law.centred})

    def summary(self) -> str:
        """Estimate, interval, diagnostics, and what was assumed, for a reader."""
        law = law_named(self.law)
        what = {
            "huber": f"sum of Huber (delta {self.delta:g}) on log {law.target}",
            "lad": f"mean |residual| of log {law.target}",
            "lsq": f"mean squared residual of log {law.target}",
            "lsq_raw": f"mean squared residual of {law.target}",
        }
        spans = ", ".join(f"{k.upper()} {_span(v)}" for k, v in self.fitted_range.items() if k != "flops")
        compute = f", C {_span(self.fitted_range['flops'])} FLOPs" if "flops" in self.fitted_range else ""
        where = ", ".join(f"{k} is {v}" for k, v in self.columns.items())
        lines = [
            f"{self.law}: {'L' if law.target == 'loss' else law.target} = {law.text}",
            f"  {law.source}",
            f"  {where}; {self.n_runs} runs fitted, {spans}{compute}",
            "",
        ]
        rows = [["parameter", "estimate", "90 % interval", ""]]
        for name, value in self.params.items():
            low_high = self.intervals.get(name)
            shown = f"[{low_high[0]:.5g}, {low_high[1]:.5g}]" if low_high else "not computed"
            held = ["held"] if name in self.fixed else [f"tied to {b}" for a, b in self.tied if a == name]
            rows.append([name, f"{value:.6g}", shown, ", ".join(held)])
        info = self.diagnostics
        second, misfit = info["second_best"], self.discrepancy.get("k")
        lines += [
            text_table(rows, left=1, indent=2),
            "",
            f"  objective  {self.objective:.10g} ({what[self.objective_name]})",
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
        centre = {name: float(record["centre"][name]) for name in law.inputs}
        record["centre"] = centre
        draws = record.pop("draws")
        draws = None if draws is None else np.array(draws, dtype=np.float64)
        if z.shape != (law.size,):
            raise ValueError("shapes")
        loaded = LawFit(
            z=z,
            draws=draws,
            notes=tuple(record.pop("notes")),
            tied=tuple((a, b) for a, b in record.pop("tied")),
            **record,
        )
        ok = z.shape == (law.size,) and np.isfinite(z).all()
        ok &= draws is None or (draws.ndim == 2 and draws.shape[1] == law.size and np.isfinite(draws).all())
        ok &= set(loaded.params) == set(law.parameters) and {"sigma", "dof"} <= set(loaded.noise)
        ok &= {_KEYS.get(name, name) for name in law.inputs} <= set(loaded.fitted_range)
        stated, meant = loaded.params, loaded.params_of(z)
        ok &= all(np.isclose(float(stated[name]), float(meant[name]), rtol=1e-6, atol=1e-9) for name in law.parameters)
        if not ok:
            raise ValueError("shapes")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a fit of ours, or is damaged; {again}") from error
    return loaded


def fit(
    runs: Runs,
    law: str,
    delta: float | None = None,
    weights=None,
    objective: str = "huber",
    fixed: Mapping[str, float] | None = None,
    tied: Sequence[tuple[str, str]] = (),
) -> LawFit:
    """Fits the law to the runs that are not held out.

    objective: "huber" (sum, at delta), "lad" (mean absolute) or "lsq" (mean square), all of log loss, or "lsq_raw"
    (mean square of the loss). delta None: 1.345 times the measured noise where runs repeat at one N and D (Huber's 95 %
    efficiency), else 1e-3. weights: one per run, held-out runs included, or None. fixed: {parameter: value}; tied:
    pairs of parameters that share one value. Raises InputError where the runs cannot identify the law.
    """
    form = law_named(law)
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    used = runs.fitted
    delta, notes = default_delta(used, form, delta)
    inputs, observed, centre = centred(used, form)
    raw = objective == "lsq_raw"
    model = Model.held(form, inputs, centre, fixed, tied, raw)
    free = model.free
    check_identifiable(used, form, len(free))
    w = np.ones(len(used)) if weights is None else np.asarray(weights, float)[~runs.holdout]
    if w.shape != (len(used),) or not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise InputError("weights: one finite weight of at least 0 is needed per run, and not all may be 0")

    target = observed if raw else np.log(observed)
    starts = form.starts(observed, inputs)[:, free]
    u, cost, agree, tried = search(model, target, starts, w, objective, delta)
    least = cost[0]
    rival = other_basin(model, target, u, w, objective, delta)
    last = {"huber": delta, "lad": 1e-12}.get(objective, np.inf)
    minima, u = u, refine(model, u[0], target, w, last)
    least = min(least, objective_value(model, u, target, w, objective, delta))

    gradient, pull, condition = gradient_and_curvature(model, u, target, w, last)
    gradient_norm = float(np.abs(gradient).max())
    z = model.z(u)
    residual = form.log_value(z, inputs)[0] - np.log(observed)

    def params_at(z):
        return {k: float(v) for k, v in form.params(z, {k: centre[k] for k in form.centred}).items()}

    ranges = {_KEYS.get(k, k): used.input(k) for k in form.inputs}
    if {"N", "D"} <= set(form.inputs):
        ranges["flops"] = 6 * used.n * used.d
    return LawFit(
        law=form.name,
        params=params_at(z),
        objective=float(least),
        n_runs=len(used),
        delta=float(delta),
        n_column=runs.n_column,
        diagnostics={
            "gradient_norm": gradient_norm,
            "starts": tried,
            "starts_agree": agree,
            "condition_number": condition,
            "converged": bool(gradient_norm <= (1e-3 if objective == "lad" else 1e-6) * pull + 1e-14),
            "second_best": None if rival is None else float(cost[rival] / max(least, 1e-300) - 1.0),
            "second_best_params": None if rival is None else params_at(model.z(minima[rival])),
            "minima": len(minima),
            "at_bound": [
                form.coordinates[i].name
                for i, value, low, high in zip(free, u, model.low, model.high, strict=True)
                if value <= low or value >= high
            ],
        },
        objective_name=objective,
        z=z,
        centre=centre,
        fitted_range={k: [float(v.min()), float(v.max())] for k, v in ranges.items()},
        noise=noise_of(residual, len(free)),
        notes=(*runs.notes, *notes, *_doubts(used, form, condition)),
        fixed={k: float(v) for k, v in (fixed or {}).items()},
        tied=tuple((a, b) for a, b in tied),
        columns={name: runs.column_of(name) for name in form.inputs},
    )


def default_delta(used: Runs, law: Law, delta: float | None = None) -> tuple[float, list[str]]:
    """(delta, notes): the one given, else 1.345 times the noise of repeated runs where there are some, else 1e-3."""
    notes = []
    if delta is None:
        repeats = repeat_noise(used, law)
        delta = 1e-3
        if repeats is not None:
            delta = 1.345 * repeats[0]
            notes.append(f"delta {delta:.3g}: 1.345 times the noise of {repeats[1]} repeated runs, {repeats[0]:.3g}")
    if not 0 < delta < np.inf:
        raise InputError(f"delta = {delta}: must be positive and finite")
    return delta, notes


def repeat_noise(used: Runs, law: Law) -> tuple[float, int] | None:
    """(standard deviation of log loss among runs with the same inputs, how many such runs), or None below 4 of them."""
    groups = pd.DataFrame({name: used.input(name) for name in law.inputs}).round(6)
    residual = pd.Series(np.log(used.loss))
    by = residual.groupby([groups[c] for c in groups.columns])
    count, squares = by.transform("count"), (residual - by.transform("mean")) ** 2
    many = count > 1
    dof = many.sum() - by.ngroups + (count == 1).sum()
    if many.sum() < 4 or dof < 3 or not squares.sum() > 0:
        return None
    return float(np.sqrt(squares.sum() / dof)), int(many.sum())


def _doubts(used: Runs, law: Law, condition: float) -> list[str]:
    few = [
        f"{name} takes {len(np.unique(used.input(name)))} values"
        for name in law.inputs
        if len(np.unique(used.input(name))) < 3
    ]
    if few:
        return [f"{' and '.join(few)}: at least 3 are needed to tell its exponent from the floor E"]
    if condition > 1e12:
        return ["these runs do not pin down every parameter (see the condition number): add runs at other N and D"]
    return []


def check_identifiable(used: Runs, law: Law, free: int | None = None) -> None:
    """Raises InputError where the runs are too few for so many free parameters, or all at one value of an input."""
    free = law.size if free is None else free
    if len(used) <= free:
        simpler = "" if free <= 5 or law.inputs != ("N", "D") else ", or choose --law chinchilla (5 parameters)"
        raise InputError(
            f"{len(used)} runs to fit, but law {law.name!r} has {free} parameters: at least {free + 1} are needed"
            + simpler
        )
    for name in law.inputs:
        values = used.input(name)
        if np.ptp(np.log(values)) < 1e-6:
            raise InputError(
                f"column {used.column_of(name)!r} ({name}): all {len(used)} fitted runs have the same value "
                f"{values[0]:.6g}; add runs at another {name}, or hold fewer out"
            )


def centred(used: Runs, law: Law):
    """The log of each input less its centre, the loss, and the centre, 0 where the law does not centre an input."""
    logs = {name: np.log(used.input(name)) for name in law.inputs}
    means = {name: float(v.mean()) if name in law.centred else 0.0 for name, v in logs.items()}
    centre = {name: means[law.like.get(name, name)] for name in logs}
    return [v - centre[name] for name, v in logs.items()], used.loss, centre


def solve(model, target, starts, weights, objective="huber", delta=1e-3, merge=False, warm=False):
    """Continuation in delta down to the objective asked for, from each start.

    With merge, starts that meet after the first step go on as one; returns the points and how many starts each stands
    for. Warm starts begin one step above the final delta.
    """
    if warm:
        steps = {"huber": [s for s in (0.01,) if s > 2 * delta] + [delta], "lad": [0.01, 1e-3, 1e-4]}
    else:
        steps = {
            "huber": [s for s in (0.1, 0.01, 0.001) if s > 2 * delta] + [delta],
            "lad": [0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12],
        }
    steps = steps.get(objective, [np.inf])
    u, count = starts, np.ones(len(starts), dtype=int)
    for i, step in enumerate(steps):
        iterations = (100 if warm else 300) if i == len(steps) - 1 else 100 if step < 1e-3 else 30
        u, cost = minimise(model, target, u, weights, delta=step, iterations=iterations)
        if merge and len(u) > 1:
            groups: list[list[int]] = []
            for j in np.argsort(cost):
                near = [g for g in groups if np.abs(u[j] - u[g[0]]).max() < 1e-4]
                near[0].append(j) if near else groups.append([j])
            count = np.array([count[g].sum() for g in groups])
            u = u[[g[0] for g in groups]]
    return (u, count) if merge else u


def search(model, target, starts, weights, objective, delta, seed=0):
    """(minima, objectives, starts that reach the best, starts tried): distinct local minima, the best first.

    Continuation from the starts finds the basins. A small delta makes many shallow minima in one basin, so starts are
    then drawn about the best minima, by their own covariance, and go straight to the final delta: few, and where those
    few do not all come back to one point, round after round until one brings nothing better.
    """
    u, count = solve(model, target, starts, weights, objective, delta, merge=True)
    cost = objective_value(model, u, target, weights, objective, delta)
    keep = np.isfinite(cost)
    u, count, cost = u[keep], count[keep], cost[keep]
    if not len(u):
        raise InputError(f"law {model.law.name!r}: no starting point gives finite values on these runs")
    if objective == "huber" and delta < 0.02:
        rng = np.random.default_rng(seed)
        for turn, number in enumerate((8, *[64] * 8)):
            before = cost.min()
            new = _scatter(model, target, u[np.argsort(cost)[:4]], weights, number, rng)
            for step in ((10 * delta,) if turn % 2 == 0 and turn else ()) + (delta,):
                new, new_cost = minimise(model, target, new, weights, delta=step, iterations=200)
            good = np.isfinite(new_cost)
            u, cost = np.concatenate([u, new[good]]), np.concatenate([cost, new_cost[good]])
            count = np.concatenate([count, np.ones(good.sum(), dtype=int)])
            u, cost, count = _distinct(u, cost, count)
            if len(u) == 1 or (turn >= 2 and cost[0] > before * (1 - 1e-5)):
                break
    else:
        u, cost, count = _distinct(u, cost, count)
    return u, cost, int(count[0]), int(count.sum())


def _scatter(model, target, centres, weights, number, rng):
    """Points about each centre, twice as wide as the estimate is uncertain, at most 1.5 in any coordinate."""
    value, jacobian = model(centres)
    points = []
    for u, r, j in zip(centres, value - target, jacobian, strict=True):
        sigma = max(1.4826 * np.median(np.abs(r)), 1e-9)
        vectors, singular, _ = np.linalg.svd(_finite(j) * np.sqrt(weights), full_matrices=False)
        width = np.minimum(2.0 * sigma / np.maximum(singular, 1e-300), 1.5)
        points.append(u + (rng.standard_normal((number // len(centres) + 1, len(u))) * width) @ vectors.T)
    return np.concatenate(points)


def _finite(jacobian):
    """At the edge of the allowed range a derivative can be undefined: it then counts as none."""
    return np.nan_to_num(jacobian, nan=0.0, posinf=0.0, neginf=0.0)


def _distinct(u, cost, count):
    """Minima that differ, the best first: by 1e-6 of the objective, or 1e-2 in a coordinate where that much differs."""
    order = np.argsort(cost, kind="stable")
    groups: list[list[int]] = []
    for j in order:
        for g in groups:
            near = cost[j] - cost[g[0]] <= 1e-9 * abs(cost[g[0]]) + 1e-18
            if near or (cost[j] - cost[g[0]] <= 1e-5 * abs(cost[g[0]]) and np.abs(u[j] - u[g[0]]).max() < 1e-2):
                g.append(j)
                break
        else:
            groups.append([j])
    first = [g[0] for g in groups]
    return u[first], cost[first], np.array([count[g].sum() for g in groups])


def other_basin(model, target, minima, weights, objective, delta) -> int | None:
    """The best minimum outside the basin of the first, or None: two share a basin if they meet at ten times delta."""
    if len(minima) == 1:
        return None
    wide = 10 * delta if objective == "huber" else 0.01 if objective == "lad" else np.inf
    top = minima[:24]
    raised, _ = minimise(model, target, top, weights, delta=wide, iterations=200)
    apart = np.abs(raised - raised[0]).max(axis=1) > 1e-2
    return int(np.argmax(apart)) if apart.any() else None


def objective_value(model, u, target, weights, objective, delta):
    """Sum of Huber, mean of |r|, or mean of r^2, (...,), at u (..., size)."""
    r = model(u)[0] - target
    if objective == "huber":
        return np.sum(weights * huber(r, delta), axis=-1)
    return np.sum(weights * (np.abs(r) if objective == "lad" else r * r), axis=-1) / np.sum(weights)


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
