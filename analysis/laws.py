"""The laws, each written once: formula, parameters, source, bounds, starting region.

Chinchilla, Kaplan with a floor, and the coupled form are one family, a norm of two power laws over a floor,

    L = E + [(P N^-p)^(1/gamma) + (Q D^-q)^(1/gamma)]^gamma,

with gamma = 1 (Chinchilla), gamma = q (Kaplan), or gamma free (coupled). p and q are the exponents that remain when the
other quantity is unlimited, so they are well determined where the usual alpha and beta of the coupled form are not. The
fit works in the six core coordinates (E, log P, log Q, p, q, gamma), with N and D centred; a law is how its own
parameters sit in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from analysis.errors import InputError, close_match

CORE = ("E", "log_P", "log_Q", "p", "q", "gamma")


def log_loss_and_jacobian(core, x, y):
    """log L and its derivatives by the core coordinates, of the family above.

    core (..., 6); x = log N and y = log D, in whatever units log P and log Q are in, (..., rows).
    Returns log L (..., rows) and d log L / d core (..., rows, 6).
    """
    e, a, b, p, q, gamma = (core[..., i, None] for i in range(6))
    u, v = (a - p * x) / gamma, (b - q * y) / gamma
    m = np.logaddexp(u, v)
    share = np.exp(u - m)
    rest = np.exp(v - m)
    term = np.exp(gamma * m)
    loss = e + term
    by_p, by_q = term * share / loss, term * rest / loss
    by_gamma = term * (m - share * u - rest * v) / loss
    jacobian = np.stack([1.0 / loss + 0.0 * by_p, by_p, by_q, -x * by_p, -y * by_q, by_gamma], axis=-1)
    return np.log(loss), jacobian


@dataclass(frozen=True)
class Law:
    """One law: its own parameters, and the linear map from its free coordinates z to the core, core = z @ map + fixed.

    `to_params` takes a core in units of N = D = 1 to the law's own parameters, `to_core` goes back. `linear` names the
    parameters in which the loss is linear once the others are known.
    """

    name: str
    formula: str
    source: str
    parameters: tuple[str, ...]
    linear: tuple[str, ...]
    core_map: np.ndarray = field(repr=False)
    core_fixed: np.ndarray = field(repr=False)
    bounds: tuple[tuple[float, float], ...]
    start_region: Mapping[str, tuple[float, ...]]
    to_params: Callable[[np.ndarray], dict] = field(repr=False)
    to_core: Callable[[Mapping[str, float]], tuple] = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.parameters)

    def core(self, z):
        return z @ self.core_map + self.core_fixed

    def free(self, core):
        """The free coordinates z of a core that lies in this law: the core entries that map one to one."""
        return np.asarray(core)[..., : self.size]

    def log_loss(self, z, x, y):
        """log L, (..., rows), and its derivatives by z, (..., rows, size), at centred x = log N, y = log D."""
        value, jacobian = log_loss_and_jacobian(self.core(z), x, y)
        return value, jacobian @ self.core_map.T

    def loss(self, params: Mapping[str, float], n, d):
        """L(N, D) in nats per token, from the law's own parameters; n and d broadcast."""
        e, a, b, p, q, gamma = self.to_core(params)
        u, v = a - p * np.log(n), b - q * np.log(d)
        return e + np.exp(gamma * np.logaddexp(u / gamma, v / gamma))

    def starts(self, loss) -> np.ndarray:
        """Starting points z, (starts, size): the grid of the start region, amplitudes sharing what lies above E."""
        grid = product(*(self.start_region[k] for k in ("floor", "p", "q", "gamma")))
        points = np.array([(floor, 0.0, 0.0, p, q, gamma) for floor, p, q, gamma in grid])
        points[:, 0] *= np.min(loss)
        gamma = self.core(self.free(points))[:, 5]
        points[:, 1] = points[:, 2] = np.log(np.median(loss) - points[:, 0]) - gamma * np.log(2.0)
        return self.free(points)


def _embed(size: int, gamma: str) -> tuple[np.ndarray, np.ndarray]:
    core_map, fixed = np.zeros((size, 6)), np.zeros(6)
    core_map[range(size), range(size)] = 1.0
    if gamma == "one":
        fixed[5] = 1.0
    if gamma == "q":
        core_map[4, 5] = 1.0
    return core_map, fixed


def _exp(value):
    """exp that stays finite: a scale that the runs do not pin down can lie beyond what a float holds."""
    return np.exp(np.clip(value, -690.0, 690.0))


def _law(gamma: str, **fields) -> Law:
    core_map, fixed = _embed(len(fields["parameters"]), gamma)
    return Law(core_map=core_map, core_fixed=fixed, **fields)


# Amplitudes are logs of the two terms at the centre of the data, in the units of the loss.
_FLOOR, _AMPLITUDE, _EXPONENT = (0.0, 1e5), (-20.0, 12.0), (0.01, 3.0)
_START = {"floor": (0.2, 0.8), "p": (0.15, 0.5), "q": (0.15, 0.5), "gamma": (1.0,)}

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        _law(
            "one",
            name="chinchilla",
            formula="E + A N^-alpha + B D^-beta",
            source="Hoffmann et al. 2022, arXiv 2203.15556, equation 2",
            parameters=("E", "A", "B", "alpha", "beta"),
            linear=("E", "A", "B"),
            bounds=(_FLOOR, _AMPLITUDE, _AMPLITUDE, _EXPONENT, _EXPONENT),
            start_region=_START,
            to_params=lambda c: {"E": c[0], "A": _exp(c[1]), "B": _exp(c[2]), "alpha": c[3], "beta": c[4]},
            to_core=lambda p: (p["E"], np.log(p["A"]), np.log(p["B"]), p["alpha"], p["beta"], 1.0),
        ),
        _law(
            "q",
            name="kaplan",
            formula="E + [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D",
            source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.5, with a floor E",
            parameters=("E", "N_c", "D_c", "alpha_N", "alpha_D"),
            linear=("E",),
            bounds=(_FLOOR, _AMPLITUDE, _AMPLITUDE, _EXPONENT, _EXPONENT),
            start_region=_START,
            to_params=lambda c: {
                "E": c[0],
                "N_c": _exp(c[1] / c[3]),
                "D_c": _exp(c[2] / c[4]),
                "alpha_N": c[3],
                "alpha_D": c[4],
            },
            to_core=lambda p: (
                p["E"],
                p["alpha_N"] * np.log(p["N_c"]),
                p["alpha_D"] * np.log(p["D_c"]),
                p["alpha_N"],
                p["alpha_D"],
                p["alpha_D"],
            ),
        ),
        _law(
            "free",
            name="coupled",
            formula="E + (A N^-alpha + B D^-beta)^gamma",
            source="distillation scaling laws, Busbridge et al. 2025, arXiv 2502.08606",
            parameters=("E", "A", "B", "alpha", "beta", "gamma"),
            linear=("E",),
            bounds=(_FLOOR, _AMPLITUDE, _AMPLITUDE, _EXPONENT, _EXPONENT, (0.05, 5.0)),
            start_region=_START | {"gamma": (0.3, 1.0)},
            to_params=lambda c: {
                "E": c[0],
                "A": _exp(c[1] / c[5]),
                "B": _exp(c[2] / c[5]),
                "alpha": c[3] / c[5],
                "beta": c[4] / c[5],
                "gamma": c[5],
            },
            to_core=lambda p: (
                p["E"],
                p["gamma"] * np.log(p["A"]),
                p["gamma"] * np.log(p["B"]),
                p["gamma"] * p["alpha"],
                p["gamma"] * p["beta"],
                p["gamma"],
            ),
        ),
    )
}


def law_named(name: str) -> Law:
    """The law of that name; InputError with the nearest name where there is none."""
    if name not in LAWS:
        raise InputError(f"law {name!r} is not known{close_match(name, LAWS)}")
    return LAWS[name]
