"""Compute-optimal N and D under C = 6ND, in closed form, with intervals.

With the core of `laws` the loss falls with the same sum whatever gamma is, so at the optimum
p (P N^-p)^(1/gamma) = q (Q D^-q)^(1/gamma); for Chinchilla this is Hoffmann et al. 2022, equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.errors import InputError
from analysis.fit import LawFit
from analysis.laws import law_named
from analysis.uncertainty import LEVEL, predict_interval


@dataclass(frozen=True)
class Allocation:
    """The best N and D for C FLOPs, the loss there, and 90 % intervals by name (those of the loss are of one run)."""

    flops: float
    n: float
    d: float
    loss: float
    tokens_per_parameter: float
    exponent: float
    intervals: dict[str, list[float]]
    law: str
    n_column: str
    warning: str | None

    def to_json(self) -> dict:
        return dict(vars(self))

    def summary(self) -> str:
        """A few aligned lines for a reader."""
        rows = (
            ("N*", self.n, "n", f"parameters ({self.n_column})"),
            ("D*", self.d, "d", "tokens"),
            ("D*/N*", self.tokens_per_parameter, "tokens_per_parameter", "tokens per parameter"),
            ("loss", self.loss, "loss", "nats per token"),
            ("a", self.exponent, "exponent", "N* ~ C^a"),
        )
        lines = [f"compute-optimal at C = {self.flops:.4g} FLOPs (C = 6ND), law {self.law}"]
        for symbol, value, key, unit in rows:
            low, high = self.intervals[key]
            lines.append(f"  {symbol:<6}{value:>12.4g}  [{low:.4g}, {high:.4g}]  {unit}")
        return "\n".join(lines + ([f"  warning: {self.warning}"] if self.warning else []))


def allocate(fit: LawFit, flops: float) -> Allocation:
    """The N and D that minimise the law's loss with 6ND = flops. Raises InputError unless flops is positive."""
    flops = float(flops)
    if not 0 < flops <= 1e40:
        raise InputError(f"flops = {flops:g}: must be a number of FLOPs above 0 and below 1e40")
    log_n = float(_log_optimal_n(fit, fit.z, flops))
    n = float(np.exp(log_n))
    d = flops / (6.0 * n)
    loss, low, high = predict_interval(fit, n, d)
    tail = 50.0 * (1.0 - LEVEL)
    log_draws = _log_optimal_n(fit, fit.draws, flops)
    n_low, n_high = map(float, np.exp(np.percentile(log_draws, [tail, 100.0 - tail])))
    a, a_low, a_high = exponent(fit)
    return Allocation(
        flops=flops,
        n=n,
        d=d,
        loss=loss,
        tokens_per_parameter=d / n,
        exponent=a,
        intervals={
            "n": [n_low, n_high],
            "d": [flops / (6.0 * n_high), flops / (6.0 * n_low)],
            "loss": [low, high],
            "tokens_per_parameter": [flops / (6.0 * n_high**2), flops / (6.0 * n_low**2)],
            "exponent": [a_low, a_high],
        },
        law=fit.law,
        n_column=fit.n_column,
        warning=fit.outside(n, d, flops),
    )


def exponent(fit: LawFit) -> tuple[float, float, float]:
    """(a, low, high) of N* ~ C^a, with its 90 % interval."""
    tail = 50.0 * (1.0 - LEVEL)
    draws = _exponent(fit, fit.draws)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(_exponent(fit, fit.z)), float(low), float(high)


def optimal_n(fit: LawFit, flops):
    """N* at each C, by the fitted parameters; broadcasts."""
    return np.exp(_log_optimal_n(fit, fit.z, np.asarray(flops, float)))


def _exponent(fit, z):
    core = law_named(fit.law).core(z)
    return core[..., 4] / (core[..., 3] + core[..., 4])


def _log_optimal_n(fit, z, flops):
    core = law_named(fit.law).core(z)
    a, b, p, q, gamma = (core[..., i] for i in range(1, 6))
    log_p, log_q = a + p * fit.centre[0], b + q * fit.centre[1]
    return (gamma * np.log(p / q) + log_p - log_q + q * np.log(flops / 6.0)) / (p + q)
