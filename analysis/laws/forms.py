"""The laws, each written once: formula, coordinates, bounds, source, starting region.

A law is a formula over its inputs (N, D, ...) and its parameters. SymPy differentiates it once, in the coordinates in
which it is fitted: logs of what is positive, and every quantity that carries a unit of an input measured at the centre
of the data. `unit` says how: with `A` in units of `N**alpha`, A_fitted = A / N0**alpha, N0 the geometric mean of N,
which is what makes A and alpha well conditioned. A new law is one `Law(...)` here; nothing else has to know it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from analysis.errors import InputError, nearest_or_all
from analysis.metric import METRICS, Metric


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

    `formula` is Python over inputs, parameters, and minimum(a, b), sigmoid(a), m4_share(w, a), loggamma(a).
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
        miss = np.abs(self.log_value(z, inputs)[0] - np.log(observed)).sum(axis=-1)
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


_CHINCHILLA = (floor(), amplitude("A", "N**alpha"), amplitude("B", "D**beta"), exponent("alpha"), exponent("beta"))
# Chinchilla, Kaplan with a floor, and the coupled form are one family, E + [(P N^-p)^(1/g) + (Q D^-q)^(1/g)]^g,
# g = gamma, with gamma = 1, gamma = q, and gamma free. p and q are the exponents that remain when the other quantity is
# unlimited: well determined where alpha and beta of the coupled form are not, so they are what is fitted.
_FAMILY = (floor(), amplitude("P", "N**p"), amplitude("Q", "D**q"), exponent("p"), exponent("q"))
_REUSE = "minimum(D, U)*(1 + R_D*(1 - exp(-(D/minimum(D, U) - 1)/R_D)))"
_BEST_N = "(alpha*A/(beta*B))**(1/alpha)*minimum(D, U)**(beta/alpha)"
_BASE_N = f"minimum(N, {_BEST_N})"
_EXCESS = f"{_BASE_N}*(1 + R_N*(1 - exp(-(N/{_BASE_N} - 1)/R_N)))"


def _broken(breaks: int) -> Law:
    """Breaks in order of x; each has a place d, a change of exponent c, and a sharpness f."""
    turns = range(1, breaks + 1)
    formula = "a + b*x**-c0" + "".join(f"*(1 + (x/d{i})**(1/f{i}))**(-c{i}*f{i})" for i in turns)
    coordinates = [floor("a"), amplitude("b", "x**c0"), real("c0", 0.0, 3.0, (0.05, 0.3))]
    for i in turns:
        shares = (0.3, 0.7) if breaks == 1 else (i / (breaks + 1),)
        coordinates += [
            positive(f"d{i}", 1e-12, 1e12, shares, unit="x", kind="break"),
            real(f"c{i}", -3.0, 3.0, (-0.2, 0.3)),
            positive(f"f{i}", 0.03, 10.0, (0.3,)),
        ]
    return Law(
        f"broken{breaks}",
        formula,
        "broken neural scaling law, Caballero et al. 2022, arXiv 2210.14891, equation 1",
        ("x",),
        tuple(coordinates),
        most_starts=24,
    )


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "chinchilla",
            "E + A*N**-alpha + B*D**-beta",
            "Hoffmann et al. 2022, arXiv 2203.15556, equation 2",
            ("N", "D"),
            _CHINCHILLA,
        ),
        Law(
            "kaplan",
            "E + ((N_c/N)**(alpha_N/alpha_D) + D_c/D)**alpha_D",
            "Kaplan et al. 2020, arXiv 2001.08361, equation 1.5, with a floor E",
            ("N", "D"),
            _FAMILY,
            natural={"E": "E", "N_c": "P**(1/p)", "D_c": "Q**(1/q)", "alpha_N": "p", "alpha_D": "q"},
        ),
        Law(
            "coupled",
            "E + (A*N**-alpha + B*D**-beta)**gamma",
            "distillation scaling laws, Busbridge et al. 2025, arXiv 2502.08606",
            ("N", "D"),
            (*_FAMILY, real("gamma", 0.05, 5.0, (0.3, 1.0))),
            natural={
                "E": "E",
                "A": "P**(1/gamma)",
                "B": "Q**(1/gamma)",
                "alpha": "p/gamma",
                "beta": "q/gamma",
                "gamma": "gamma",
            },
        ),
        Law(
            "over_training",
            "E + (a*(D/N)**eta + b*(D/N)**-eta)*(6*N*D)**-eta",
            "Gadre et al. 2024, arXiv 2403.08540, equation 4, with C = 6ND",
            ("N", "D"),
            (floor(), amplitude("a", "N**(2*eta)"), amplitude("b", "D**(2*eta)"), exponent("eta", (0.1, 0.25))),
        ),
        Law(
            "data_constrained",
            f"E + A*({_EXCESS})**-alpha + B*({_REUSE})**-beta",
            "Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 6; U unique tokens",
            ("N", "D", "U"),
            (
                floor(),
                amplitude("A", "N**alpha"),
                amplitude("B", "D**beta"),
                exponent("alpha"),
                exponent("beta"),
                positive("R_D", 1e-2, 1e9, (5.0, 50.0)),
                positive("R_N", 1e-2, 1e9, (1.0, 10.0)),
            ),
            most_starts=24,
            like={"U": "D"},
        ),
        Law(
            "farseer",
            "exp(s*N**q + S) + exp(B*N**b + Q)*D**(-exp(A*N**a + E))",
            "Farseer, Li et al. 2025, arXiv 2506.10972",
            ("N", "D"),
            (
                real("s", -30.0, 30.0, (-0.4, 0.4), unit="N**-q"),
                real("q", -0.6, 0.6, (0.15, -0.15)),
                real("S", -30.0, 30.0, (0.0,)),
                real("B", -300.0, 300.0, (12.0,), unit="N**-b"),
                real("b", -0.6, 0.6, (-0.1,)),
                real("Q", -300.0, 300.0, (-6.0,)),
                real("A", -30.0, 30.0, (-1.4,), unit="N**-a"),
                real("a", -0.6, 0.6, (0.12, -0.12)),
                real("E", -30.0, 30.0, (0.42,)),
            ),
        ),
        Law(
            "power",
            "a*x**-c",
            "Kaplan et al. 2020, arXiv 2001.08361, equations 1.1 to 1.3",
            ("x",),
            (amplitude("a", "x**c"), exponent("c")),
        ),
        Law(
            "saturating",
            "E + a*x**-c",
            "Hestness et al. 2017, arXiv 1712.00409; Henighan et al. 2020, arXiv 2010.14701",
            ("x",),
            (floor(), amplitude("a", "x**c"), exponent("c")),
        ),
        Law(
            "shifted",
            "b*(1/x + g)**c",
            "M3, Bansal et al. 2022, arXiv 2202.01994",
            ("x",),
            (amplitude("b", "x**c"), positive("g", 1e-12, 1e12, (1e-3, 0.1, 1.0), unit="1/x"), exponent("c")),
        ),
        Law(
            "m4",
            "E + R*m4_share(log(b) - c*log(x) + (a - 1)*log(R), a)",
            "M4, Alabdulmohsin et al. 2022, arXiv 2209.06640: (y - E)/(E + R - y)^a = b x^-c, R = e0 - E",
            ("x",),
            (
                floor(),
                positive("R", 1e-6, 1e4, (0.5, 3.0)),
                positive("a", 1e-3, 20.0, (0.1, 1.0)),
                amplitude("b", "x**c"),
                exponent("c"),
            ),
        ),
        _broken(1),
        _broken(2),
        Law(
            "learning_rate",
            "c*N**p*D**q",
            "Step Law, Li et al. 2025, arXiv 2503.04715: the best learning rate",
            ("N", "D"),
            (amplitude("c", "N**-p*D**-q"), real("p", -3.0, 3.0, (-0.7, 0.0)), real("q", -3.0, 3.0, (0.0, 0.3))),
            target="learning rate",
        ),
        Law(
            "batch",
            "c*D**r",
            "Step Law, Li et al. 2025, arXiv 2503.04715: the best batch, tokens",
            ("D",),
            (positive("c", 1e-9, 1e15, (1e5,), unit="D**-r"), real("r", -3.0, 3.0, (0.3, 0.6))),
            target="batch",
        ),
        Law(
            "error",
            "eps - k*exp(-g*L)",
            "downstream error from loss, Gadre et al. 2024, arXiv 2403.08540, equation 5",
            ("L",),
            (
                real("eps", 1e-3, 2.0, (0.6, 1.0)),
                positive("k", 1e-6, 1e6, (0.5, 5.0), unit="1"),
                positive("g", 1e-3, 1e2, (0.5, 2.0)),
            ),
            target="error",
        ),
        Law(
            "accuracy",
            "low + (high - low)*sigmoid(k*(L_0 - L))",
            "downstream accuracy from loss, Bhagia et al. 2024, arXiv 2412.04403",
            ("L",),
            (
                real("low", 0.0, 1.0, (0.02, 0.25)),
                real("high", 0.0, 1.5, (1.0, 0.8)),
                positive("k", 1e-2, 1e3, (2.0, 8.0)),
                real("L_0", 0.0, 20.0, (1.0, 2.0, 3.0)),
            ),
            target="accuracy",
        ),
        Law(
            "pass_at_k",
            "exp(-a*k**-b)",
            "Brown et al. 2024, arXiv 2407.21787: -log pass@k = a k^-b",
            ("k",),
            (positive("a", 1e-6, 1e4, (0.5, 3.0), unit="k**b"), exponent("b", (0.1, 0.5))),
            target="pass@k",
        ),
        Law(
            "pass_at_k_beta",
            "1 - exp(loggamma(be + k) - loggamma(al + be + k) + loggamma(al + be) - loggamma(be))",
            "Schaeffer et al. 2025, arXiv 2502.17578: 1 - pass@k = B(al, be + k)/B(al, be)",
            ("k",),
            (positive("al", 1e-4, 1e3, (0.1, 1.0)), positive("be", 1e-4, 1e6, (1.0, 10.0, 100.0))),
            target="pass@k",
        ),
    )
}

# What `auto` chooses among, by rolling origin: laws of N and D, and laws of one quantity.
JOINT = ("chinchilla", "kaplan", "coupled")
SINGLE = ("power", "saturating", "shifted", "m4", "broken1")


def law_named(name: str) -> Law:
    """The law of that name; InputError with the nearest name where there is none."""
    if name not in LAWS:
        raise InputError(f"law {name!r} is not known{nearest_or_all(name, LAWS)}")
    return LAWS[name]
