"""What a law is: its formula, its coordinates, and the functions that follow from them.

A law is a formula over its inputs (N, D, ...) and its parameters. SymPy differentiates it once, in the coordinates in
which it is fitted: logs of what is positive, and every quantity that carries a unit of an input measured at the centre
of the data. `unit` says how: with `A` in units of `N**alpha`, A_fitted = A / N0**alpha, N0 the geometric mean of N,
which is what makes A and alpha well conditioned. The table of them is `analysis.laws.forms`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from analysis.metric import METRICS, Metric, to_link


@dataclass(frozen=True)
class Coordinate:
    """One fitted coordinate. `log`: it is the log of the quantity. Bounds and starts are of the coordinate itself.

    `starts` of an "amplitude" are found from the data (None); those of a "floor" are shares of the lowest loss; of a
    "break" are shares of the range of log x.
    """

    name: str
    low: float
    high: float
    starts: tuple[float, ...] | None
    log: bool = False
    unit: str = "1"
    kind: str = "real"


def floor(name="E", starts=(0.2, 0.8), high=1e5):
    return Coordinate(name, 0.0, high, starts, kind="floor")


def amplitude(name, unit="1"):
    """A positive scale, in logs; -60 to 12 at the centre of the data, in the units of the loss."""
    return Coordinate(name, -60.0, 12.0, None, log=True, unit=unit, kind="amplitude")


def exponent(name, starts=(0.15, 0.5), low=0.01, high=30.0):
    return Coordinate(name, low, high, starts)


def positive(name, low, high, starts, unit="1", kind="real"):
    """A positive quantity, in logs; low, high and starts are given of the quantity."""
    logs = tuple(np.log(s) for s in starts) if kind == "real" else starts
    return Coordinate(name, float(np.log(low)), float(np.log(high)), logs, log=True, unit=unit, kind=kind)


def real(name, low, high, starts, unit="1"):
    return Coordinate(name, low, high, starts, unit=unit)


@dataclass(frozen=True, eq=False)
class Law:
    """A law L(inputs; parameters).

    `formula` is Python over inputs, parameters, and minimum(a, b), sigmoid(a), m4_share(w, a), loggamma(a),
    lognormal_pass(w, s).
    `natural` gives each parameter by the coordinates where it is not a coordinate itself (there, a coordinate declared
    with `log` stands for the positive quantity). `target` names the metric that is fitted (`analysis.metric`).
    `like` names inputs that are compared with another, and so share its centre. Of the grid of
    starts the `most_starts` nearest to the data are followed.
    """

    name: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    coordinates: tuple[Coordinate, ...]
    natural: Mapping[str, str] = field(default_factory=dict, repr=False)
    target: str = "loss"
    most_starts: int = 16
    like: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def metric(self) -> Metric:
        return METRICS[self.target]

    @property
    def allocates(self) -> bool:
        """Whether it has a compute-optimal N: it is of N and D, and its least value along a budget is the best."""
        return self.metric.direction == "lower" and {"N", "D"} <= set(self.inputs)

    @property
    def size(self) -> int:
        return len(self.coordinates)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.natural) or tuple(c.name for c in self.coordinates)

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        return tuple((c.low, c.high) for c in self.coordinates)

    @property
    def text(self) -> str:
        """The formula for a reader."""
        return self.formula.replace("**", "^").replace("*", " ")

    @cached_property
    def centred(self) -> tuple[str, ...]:
        """The inputs that some unit names: these are measured from the centre of the data, others as they are."""
        return tuple(i for i in self.inputs if any(i in re.findall(r"\w+", c.unit) for c in self.coordinates))

    @cached_property
    def compiled(self):
        from analysis.laws.symbols import compile_law

        return compile_law(self)

    @cached_property
    def linear(self) -> list[int]:
        """Indices of the coordinates in which, or in whose exp, the law is linear once the others are known."""
        from analysis.laws.symbols import linear_coordinates

        return linear_coordinates(self)

    def value(self, z, inputs):
        """The law, (..., rows), and its derivatives by z, (..., size, rows).

        z (..., size); inputs: one array (rows,) per input, log of the input less its centre.
        """
        z = np.asarray(z, dtype=np.float64)
        with np.errstate(all="ignore"):
            value, *parts = self.compiled.value(*(z[..., i, None] for i in range(self.size)), *inputs)
        shape = np.broadcast_shapes((*z.shape[:-1], 1), np.shape(value))
        jacobian = np.empty((*shape[:-1], self.size, shape[-1]))
        for i, part in enumerate(parts):
            jacobian[..., i, :] = part
        return np.broadcast_to(value, shape), jacobian

    def log_value(self, z, inputs):
        """log of the law, (..., rows), and its derivatives by z, (..., size, rows)."""
        value, jacobian = self.value(z, inputs)
        with np.errstate(all="ignore"):
            jacobian /= value[..., None, :]
            return np.log(value), jacobian

    def linked(self, z, inputs, link: str):
        """The law on the scale of a link ("log", "logit" or "identity"), (..., rows), and its derivatives by z."""
        if link == "log":
            return self.log_value(z, inputs)
        value, jacobian = self.value(z, inputs)
        if link == "logit":
            with np.errstate(all="ignore"):
                jacobian /= (value * (1 - value))[..., None, :]
                value = np.log(value) - np.log1p(-value)
        return value, jacobian

    def effort(self, values: Mapping):
        """What orders runs from cheap to expensive, from {input: values}: 6ND; of a law of the loss e^-L, the chance of
        a token, as a run that cost more has the lower loss; else the only input.
        """
        if {"N", "D"} <= set(self.inputs):
            return 6.0 * values["N"] * values["D"]
        value = values[self.inputs[0]]
        return np.exp(-value) if self.inputs[0] == "L" else value

    def by_input(self, z, inputs):
        """Derivatives by the log of each input: a list of (..., rows)."""
        z = np.asarray(z, dtype=np.float64)
        with np.errstate(all="ignore"):
            return self.compiled.by_input(*(z[..., i, None] for i in range(self.size)), *inputs)

    def params(self, z, centre) -> dict:
        """The law's own parameters at coordinates z, (..., size), of a fit centred at {input: mean log}."""
        return self.compiled.params(np.asarray(z, dtype=np.float64), centre)

    def loss(self, params: Mapping[str, float], *inputs):
        """The law from its own parameters, at inputs in their own units, in the order of `inputs`; broadcasts."""
        with np.errstate(all="ignore"):
            values = self.compiled.plain(*(params[p] for p in self.parameters), *(np.asarray(v, float) for v in inputs))
        return np.broadcast_to(values, np.broadcast_shapes(*(np.shape(v) for v in inputs)))[()]

    def starts(self, observed, inputs) -> np.ndarray:
        """Starting points z, (starts, size): the grid of the start regions, amplitudes matched to the data.

        One common amplitude makes the law pass through the median of `observed` at the centre; amplitudes and floors
        in which the law is linear are then projected out (variable projection), non-negative, in relative residuals.
        """
        lists = []
        for c, values in zip(self.coordinates, inputs_of_starts(self, inputs), strict=True):
            if c.kind == "amplitude":
                lists.append((0.0,))
            elif c.kind == "floor":
                lists.append(tuple(s * float(np.min(observed)) for s in c.starts))
            else:
                lists.append(values)
        z = np.array(list(product(*lists)))
        scales = [i for i, c in enumerate(self.coordinates) if c.kind == "amplitude"]
        if scales:
            z = self._match(z, scales, observed, inputs)
        low, high = np.array(self.bounds).T
        z = np.clip(z, low, high)
        projected = np.clip(self._project(z, observed, inputs), low, high)
        z = np.concatenate([z, projected]) if len(projected) else z
        link = "identity" if self.metric.link == "identity" else "log"
        miss = np.abs(self.linked(z, inputs, link)[0] - to_link(link, observed)).sum(axis=-1)
        miss = np.where(np.isfinite(miss), miss, np.inf)
        order = np.argsort(miss, kind="stable")
        order = order[np.isfinite(miss[order])]
        return z[order[: self.most_starts]]

    def _match(self, z, scales, observed, inputs):
        middle = [np.array([np.median(v)]) for v in inputs]
        grid = np.linspace(-20.0, 12.0, 129)
        trial = np.repeat(z[:, None], len(grid), axis=1)
        trial[:, :, scales] = grid[None, :, None]
        miss = np.abs(self.log_value(trial, middle)[0][..., 0] - np.log(np.median(observed)))
        best = np.argmin(np.where(np.isfinite(miss), miss, np.inf), axis=1)
        z = z.copy()
        z[:, scales] = grid[best, None]
        return z

    def _project(self, z, observed, inputs):
        """Least squares of relative residuals over the coordinates the law is linear in, others as they are."""
        linear = self.linear
        if not linear:
            return np.empty((0, self.size))
        from scipy.optimize import nnls

        # With an amplitude in logs, d/dz is the amplitude times its term: at log amplitude 0 it is the term.
        base = z.copy()
        base[:, linear] = 0.0
        _, jacobian = self.value(base, inputs)
        out = []
        for row, parts in zip(z, jacobian, strict=True):
            if not np.isfinite(parts[linear]).all():
                continue
            amounts, _ = nnls((parts[linear] / observed).T, np.ones(len(observed)))
            new = row.copy()
            for i, amount in zip(linear, amounts, strict=True):
                new[i] = np.log(max(amount, 1e-9)) if self.coordinates[i].log else amount
            out.append(new)
        return np.unique(np.round(np.array(out), 12), axis=0) if out else np.empty((0, self.size))


def inputs_of_starts(law: Law, inputs):
    """The starts of each coordinate; breaks are placed along the (centred) range of the only input."""
    x = inputs[0]
    for c in law.coordinates:
        if c.kind == "break":
            yield tuple(float(np.min(x) + share * np.ptp(x)) for share in c.starts)
        else:
            yield c.starts
