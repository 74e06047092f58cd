"""Compute-optimal N and D of a fitted law, with intervals: for a budget, for tokens to be served, for unique tokens.

Every law of N and D is handled alike: along the budget N fixes D, and the derivative of log loss by log N, known in
closed form, is bisected for its zero, for all bootstrap draws at once. For Chinchilla under C = 6ND this gives
Hoffmann et al. 2022, equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.errors import InputError
from analysis.fitting.result import LawFit
from analysis.laws.forms import law_named
from analysis.metric import LEVEL
from analysis.text import text_table
from analysis.uncertainty.predict import predict


@dataclass(frozen=True)
class Allocation:
    """The best N and D for C FLOPs, the loss there, and 90 % intervals by name (those of the loss are of one run); none
    of a fit that was not bootstrapped.
    """

    flops: float
    n: float
    d: float
    loss: float
    tokens_per_parameter: float
    exponent: float
    intervals: dict[str, list[float]]
    law: str
    n_column: str
    unit: str
    warning: str | None
    served: float = 0.0
    unique: float | None = None

    def to_json(self) -> dict:
        return dict(vars(self))

    def summary(self) -> str:
        """A few aligned lines for a reader."""
        rows = (
            ("N*", self.n, "n", f"parameters ({self.n_column})"),
            ("D*", self.d, "d", "tokens"),
            ("D*/N*", self.tokens_per_parameter, "tokens_per_parameter", "tokens per parameter"),
            ("loss", self.loss, "loss", self.unit),
            ("a", self.exponent, "exponent", "N* ~ C^a"),
        )
        how = f"6ND + 2N x {self.served:.3g} tokens served" if self.served else "C = 6ND"
        how += f", {self.unique:.3g} unique tokens" if self.unique else ""
        lines = [f"compute-optimal at C = {self.flops:.4g} FLOPs ({how}), law {self.law}"]
        cells = [["", "", "estimate", "90 % interval"]]
        for symbol, value, key, unit in rows:
            low_high = self.intervals.get(key)
            shown = f"[{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else "no interval"
            cells.append([symbol, unit, f"{value:.4g}", shown])
        lines.append(text_table(cells, indent=2))
        return "\n".join(lines + ([f"  warning: {self.warning}"] if self.warning else []))


def allocate(fit: LawFit, flops: float, served: float = 0.0, unique: float | None = None) -> Allocation:
    """The N and D that minimise the law's loss with 6ND + 2N served = flops.

    served: tokens the model is to serve in its life, 2N FLOPs each (Sardana et al. 2024, arXiv 2401.00448, for a budget
    of training and inference together). unique: distinct tokens there are, for a law that knows what repeats cost
    (data_constrained). Raises InputError unless flops is positive, and where the law is not one of the loss by N and D.
    """
    flops = float(flops)
    if not 0 < flops <= 1e40:
        raise InputError(f"flops = {flops:g}: must be a number of FLOPs above 0 and below 1e40")
    if not 0 <= served <= 1e40:
        raise InputError(f"served = {served:g}: must be a number of tokens of at least 0")
    extra = extra_inputs(fit, unique)
    log_n = float(_log_optimal_n(fit, fit.z, flops, served, extra)[0])
    n = float(np.exp(log_n))
    d = flops / (6.0 * n) - served / 3.0
    expected = predict(fit, n, d, **extra)
    a, a_low, a_high = size_exponent(fit, flops, served, extra)
    intervals = {}
    if fit.draws is not None:
        tail = 50.0 * (1.0 - LEVEL)
        draws = np.exp(_log_optimal_n(fit, fit.draws, flops, served, extra))
        each = {"n": draws, "d": flops / (6.0 * draws) - served / 3.0}
        each["tokens_per_parameter"] = each["d"] / draws
        intervals = {k: [float(q) for q in np.percentile(v, [tail, 100.0 - tail])] for k, v in each.items()}
        intervals |= {"loss": [expected.low, expected.high]} if expected.low is not None else {}
        intervals["exponent"] = [a_low, a_high]
    return Allocation(
        flops=flops,
        n=n,
        d=d,
        loss=expected.value,
        tokens_per_parameter=d / n,
        exponent=a,
        intervals=intervals,
        law=fit.law,
        n_column=fit.n_column,
        unit=fit.unit,
        warning=fit.outside(n, d, flops if not served else None, **extra),
        served=float(served),
        unique=unique,
    )


def size_exponent(fit: LawFit, flops: float | None = None, served: float = 0.0, extra=None):
    """(a, low, high) of N* ~ C^a, the local slope at flops (default: the geometric middle of the fitted runs).

    low and high are None where the fit was not bootstrapped.
    """
    tail = 50.0 * (1.0 - LEVEL)
    flops = float(np.sqrt(np.prod(fit.fitted_range["flops"]))) if flops is None else flops
    extra = extra_inputs(fit, None) if extra is None else extra

    def slope(z):
        high, low = (_log_optimal_n(fit, z, flops * step, served, extra) for step in (1.05, 1 / 1.05))
        return (high - low) / (2 * np.log(1.05))

    if fit.draws is None:
        return float(slope(fit.z)[0]), None, None
    low, high = np.percentile(slope(fit.draws), [tail, 100.0 - tail])
    return float(slope(fit.z)[0]), float(low), float(high)


def optimal_n(fit: LawFit, flops):
    """N* at each C under C = 6ND, by the fitted parameters; broadcasts."""
    flops = np.asarray(flops, float)
    log_n = [_log_optimal_n(fit, fit.z, c, 0.0, extra_inputs(fit, None))[0] for c in flops.ravel()]
    return np.exp(np.array(log_n)).reshape(flops.shape)


def excess_loss(fit: LawFit, n: float, d: float, unique: float | None = None) -> dict[str, float]:
    """What N and D cost against the best use of the same 6ND: loss, best loss, both in nats, and wasted compute.

    `flops_wasted` is the share of 6ND that the best allocation could do without for the same loss.
    """
    flops, extra = 6.0 * n * d, extra_inputs(fit, unique)

    def best(c):
        log_n = _log_optimal_n(fit, fit.z, c, 0.0, extra)[0]
        return float(fit.predict(np.exp(log_n), c / (6.0 * np.exp(log_n)), **extra))

    loss, least = float(fit.predict(n, d, **extra)), best(flops)
    low, high = np.log(flops) - 30.0, np.log(flops)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if best(np.exp(middle)) > loss else (low, middle)
    return {
        "loss": loss,
        "best_loss": least,
        "excess": loss - least,
        "flops": flops,
        "flops_wasted": float(1 - np.exp(high) / flops),
    }


def extra_inputs(fit: LawFit, unique: float | None) -> dict[str, float]:
    """The law's inputs beside N and D. Raises InputError where it takes no unique tokens, or does not allocate."""
    law = law_named(fit.law)
    inputs = law.inputs
    if not law.allocates:
        raise InputError(
            f"law {law.name!r} gives the {law.target} by {', '.join(inputs)}: an allocation needs a law of the loss by "
            "N and D, such as chinchilla"
        )
    if unique is not None and "U" not in inputs:
        raise InputError(f"law {fit.law!r} does not know what repeated tokens are worth; fit --law data_constrained")
    if "U" in inputs:
        # Without a limit on unique tokens nothing is ever repeated.
        return {"U": 1e40 if unique is None else float(unique)}
    return {}


def _log_optimal_n(fit, z, flops, served, extra):
    """log N*, (draws,), for coordinates z (..., size); along 6ND + 2N served = flops."""
    law = law_named(fit.law)
    z = np.atleast_2d(z)
    most = np.log(flops / (2.0 * served)) if served else np.log(flops / 6.0)
    low, high = np.full(len(z), min(0.0, most - 60.0)), np.full(len(z), most - 1e-12)
    rest = [np.log(extra[name]) - fit.centre[name] for name in law.inputs[2:]]
    for _ in range(70):
        log_n = 0.5 * (low + high)
        n = np.exp(log_n)
        d = np.maximum(flops / (6.0 * n) - served / 3.0, 1e-30)
        # Along the budget d log D / d log N = -(D + served / 3) / D.
        at = [(log_n - fit.centre["N"])[:, None], (np.log(d) - fit.centre["D"])[:, None], *rest]
        by_n, by_d = law.by_input(z, at)[:2]
        rises = (by_n - by_d * ((d + served / 3.0) / d)[:, None])[:, 0] > 0
        low, high = np.where(rises, low, log_n), np.where(rises, log_n, high)
    return 0.5 * (low + high)
