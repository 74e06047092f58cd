"""The fitted law: what it predicts, a summary that a scientist can read, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from analysis.errors import InputError
from analysis.files import write_text
from analysis.fitting.problem import Problem, pose
from analysis.laws.forms import law_named
from analysis.metric import Metric
from analysis.runs import Runs
from analysis.text import text_table

FORMAT = 2
# The key of an input in `fitted_range`, where it is not the input's name.
RANGES = {"N": "n", "D": "d", "C": "flops"}


@dataclass(frozen=True, eq=False)
class LawFit:
    """A fitted law. Until `uncertainty.bootstrap` has run, `draws` is None and `intervals` empty.

    `z` and `draws` are the law's coordinates, (size,) and (draws, size), at `centre`, the mean log of each input.
    `objective` is the sum of Huber on the metric's link (log loss), or the mean of |r| (lad), of r^2 (lsq), or of the
    squared residual of the metric itself (lsq_raw). `noise` holds the scale of the residuals on the link, of a run of
    weight 1, and its degrees of freedom; `discrepancy` the law's own misfit, `k` per squared decade of effort past
    `origin`, the median fitted run (log10 of `Law.effort`: 6ND, or the only input). `weighting` and `cluster` are those
    of `Problem`: with the runs they give back the problem that was fitted.
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
    delta_reason: str = ""
    unit: str = ""
    weighting: dict = field(default_factory=dict, repr=False)
    cluster: str | None = None

    @property
    def metric(self) -> Metric:
        return law_named(self.law).metric

    def problem(self, runs: Runs | Problem, cluster: str | None = None) -> Problem:
        """The problem that was fitted, from its runs; weights, objective and what was held come with the fit.

        cluster: another column whose runs share noise. Raises InputError where these are other runs.
        """
        if isinstance(runs, Problem):
            return runs
        options = {"weights": self.weighting.get("weights")} | {
            k: v for k, v in self.weighting.items() if k in ("target", "kappa")
        }
        problem = pose(
            runs,
            self.law,
            self.delta,
            objective=self.objective_name,
            fixed=self.fixed,
            tied=self.tied,
            cluster=cluster or self.cluster,
            **options,
        )
        same = all(np.isclose(problem.centre[k], v, rtol=1e-6, atol=1e-6) for k, v in self.centre.items())
        if len(problem) != self.n_runs or not same:
            raise InputError(
                f"these {len(problem)} runs are not the {self.n_runs} that were fitted: give the same table, with the "
                "same --where and --holdout"
            )
        return problem

    def predict(self, n=None, d=None, **inputs):
        """The metric (of most laws the loss), in the unit of the fitted runs, at the law's inputs; broadcasts.

        n and d are the first and second input of the law (N and D where it has them); others by name, as in U=1e9.
        """
        values = self.inputs_of(n, d, inputs)
        predicted = self.metric.from_link(self.linked(self.z, values))
        return float(predicted[0]) if all(np.ndim(v) == 0 for v in values) else predicted

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

    def linked(self, z, values):
        """The law at coordinates z, (..., size), and the inputs' values, on the metric's link."""
        law = law_named(self.law)
        values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in values))
        shape = values[0].shape
        inputs = [np.log(v.ravel()) - self.centre[name] for name, v in zip(law.inputs, values, strict=True)]
        predicted = law.linked(z, inputs, law.metric.link)[0]
        return predicted.reshape(*predicted.shape[:-1], *shape)

    def outside(self, n=None, d=None, flops: float | None = None, **inputs) -> str | None:
        """A line that says in what inputs and C (default 6ND) lie outside the fitted runs, or None; for one point."""
        law = law_named(self.law)
        values = dict(zip(law.inputs, map(float, self.inputs_of(n, d, inputs)), strict=True))
        if {"N", "D"} <= set(values):
            values = {"C": 6.0 * values["N"] * values["D"] if flops is None else flops} | values
        wrong = []
        for name, value in values.items():
            low, high = self.fitted_range[RANGES.get(name, name)]
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
        return "\n".join([*lines, text_table(rows, left=1, indent=2), "", *self._diagnosis()])

    def _diagnosis(self) -> list[str]:
        metric, info = self.metric, self.diagnostics
        scale = f"{metric.link} {metric.name}" if metric.link != "identity" else metric.name
        what = {
            "huber": f"sum of Huber (delta {self.delta:g}) on {scale}",
            "lad": f"mean |residual| of {scale}",
            "lsq": f"mean squared residual of {scale}",
            "lsq_raw": f"mean squared residual of {metric.name}",
        }
        second, misfit = info.get("second_best"), self.discrepancy.get("k")
        noise = f"{100 * self.noise['sigma']:.2f} % of the {metric.name}"
        if metric.link != "log":
            noise = f"{self.noise['sigma']:.3g} on {scale}" + (", binomial" if metric.noise == "binomial" else "")
        lines = [
            f"  objective  {self.objective:.10g} ({what[self.objective_name]})",
            f"  optimum    {info['starts_agree']} of {info['starts']} starts agree; "
            f"gradient {info['gradient_norm']:.1e}; condition number {info['condition_number']:.1e}; "
            f"{'converged' if info['converged'] else 'NOT CONVERGED'}",
            f"  next local minimum  {'none found' if second is None else f'{100 * second:.2f} % higher'}",
            f"  noise      {noise} ({self.noise['dof']:.0f} degrees of freedom)",
        ]
        if self.objective_name == "huber" and self.delta_reason:
            lines.insert(1, f"  delta      {self.delta:.3g}: {self.delta_reason}")
        if self.weighting.get("target"):
            aim, kappa = self.weighting["target"], self.weighting["kappa"]
            lines.append(f"  weights    for a target at C = {aim:.3g}: kappa {kappa:g} per squared decade below it")
        elif self.weighting:
            lines.append("  weights    given, one per run; the noise is that of a run of weight 1")
        if misfit is not None:
            unit = {"N": "compute", "L": "e^-L"}.get(next(iter(self.columns), "N"), next(iter(self.columns), "N"))
            share = f"{100 * misfit:.2f} %" if metric.link == "log" else f"{misfit:.3g} on {scale}"
            lines.append(f"  misfit     {share} per squared decade of {unit} past the median run")
        for name, cost in info.get("at_bound", {}).items():
            lines.append(
                f"  warning    {name} is at the edge of its allowed range: moved out, the objective would fall by "
                f"{100 * cost:.2g} %"
            )
        lines += [f"  note       {note}" for note in self.notes]
        shared = (
            f"noise shared within each {self.cluster}" if self.cluster not in (None, "none") else "independent noise"
        )
        kind = "relative, " if metric.link == "log" else ""
        return [*lines, f"  assumed    final values; {kind}{shared}; the form of the law"]

    def save(self, path) -> Path:
        """Writes fit.json: all that prediction and allocation need, intervals included, without the data."""
        record = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self)}
        record["z"] = self.z.tolist()
        record["draws"] = None if self.draws is None else self.draws.tolist()
        return write_text(path, json.dumps(record, allow_nan=False) + "\n")


def _span(pair):
    return f"{pair[0]:.3g} to {pair[1]:.3g}"
