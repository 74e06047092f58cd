"""What is measured: its link, direction, unit and noise; and a prediction of one measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.errors import InputError

LEVEL = 0.9


@dataclass(frozen=True)
class Metric:
    """A measured quantity. A law of it is fitted, and its noise and misfit are measured, on the link's scale.

    link: "log" (above 0; the noise is relative), "logit" (a share, between 0 and 1) or "identity". direction: "lower"
    or "higher" is better, or "none"; only what is better when lower has a compute-optimal N. noise: "constant" (one
    scale on the link) or "binomial" (that of a share of as many trials each: on the logit its variance goes as
    1 / (p (1 - p)), Berkson 1944, minimum logit chi-square).
    """

    name: str
    link: str = "log"
    direction: str = "lower"
    unit: str = ""
    noise: str = "constant"

    def to_link(self, value):
        return to_link(self.link, value)

    def from_link(self, value):
        return from_link(self.link, value)

    def spread(self, value):
        """The noise's standard deviation on the link at `value`, but for one factor common to all."""
        if self.noise == "constant":
            return np.ones(np.shape(value))
        share = np.clip(np.asarray(value, float), 1e-6, 1 - 1e-6)
        variance = share * (1 - share)
        return np.sqrt({"log": variance / share**2, "logit": 1 / variance, "identity": variance}[self.link])

    def check(self, values, column: str) -> None:
        """Raises InputError where a value has no place on the link's scale."""
        if self.link != "identity" and not (np.asarray(values) > 0).all():
            first = int(np.flatnonzero(~(np.asarray(values) > 0))[0])
            raise InputError(f"column {column!r} ({self.name}): {values[first]:g} in row {first} is not above 0")
        if self.link == "logit" and not (np.asarray(values) < 1).all():
            first = int(np.flatnonzero(~(np.asarray(values) < 1))[0])
            raise InputError(
                f"column {column!r} ({self.name}): {values[first]:g} in row {first} is not between 0 and 1; "
                "of k right in m trials give (k + 0.5) / (m + 1)"
            )


def to_link(link: str, value):
    """The value on the link's scale."""
    with np.errstate(all="ignore"):
        if link == "log":
            return np.log(value)
        return np.log(value) - np.log1p(-np.asarray(value)) if link == "logit" else np.asarray(value, float)


def from_link(link: str, value):
    """The value whose link is given."""
    with np.errstate(all="ignore"):
        if link == "log":
            return np.exp(value)
        return 1 / (1 + np.exp(-np.asarray(value))) if link == "logit" else np.asarray(value, float)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", unit="nats/token"),
        Metric("error"),
        Metric("accuracy", "logit", "higher", noise="binomial"),
        Metric("pass@k", "logit", "higher", noise="binomial"),
        Metric("excess", unit="nats/token"),
        Metric("gold reward", "identity", "higher"),
        Metric("bits stored", direction="higher", unit="bits"),
        Metric("tokens transferred", direction="higher", unit="tokens"),
        Metric("learning rate", direction="none"),
        Metric("batch", direction="none", unit="tokens"),
    )
}


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one measurement is expected to give: value, and the interval (low, high) it falls into with chance `level`.

    Numbers, or arrays of one shape. low and high are None where no interval can be given; the notes say why, and what
    of the point lies outside the fitted runs.
    """

    value: float | np.ndarray
    low: float | np.ndarray | None = None
    high: float | np.ndarray | None = None
    level: float = LEVEL
    unit: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.low is None:
            return f"{self.value:.4f}{unit}, no interval"
        return f"{self.value:.4f}{unit}, {100 * self.level:g} % interval [{self.low:.4f}, {self.high:.4f}]"

    def inside(self, measured):
        """Whether each measured value lies in the interval."""
        if self.low is None:
            return np.zeros(np.shape(measured), bool)
        return (self.low <= measured) & (measured <= self.high)
