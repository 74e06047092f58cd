"""Scaling laws that others fitted: formula, constants, what N counts, the range they were fitted on, and the source.

`published_law("besiroglu").predict(N, D)` gives the loss, and says what of (N, D) lies outside the fitted range. Law
and parameter names are those of `analysis.laws.forms`. How each constant was checked stands in its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from analysis.errors import InputError, nearest_or_all
from analysis.metric import Prediction

Range = tuple[float | None, float | None]


@dataclass(frozen=True, eq=False)
class Published:
    """One published fit. Ranges are (lowest, highest) of the runs fitted, None where not stated; C in FLOPs."""

    name: str
    law: str
    params: Mapping[str, float]
    n_counts: str  # "non-embedding", "with head" or "total"
    data: str
    tokenizer: str
    source: str
    checked: str
    n_range: Range = (None, None)
    d_range: Range = (None, None)
    c_range: Range = (None, None)
    m_range: Range = (None, None)  # tokens per parameter, D/N
    flop_formula: str = "6ND"
    unit: str = "nats/token"
    errors: Mapping[str, float] = field(default_factory=dict)  # published standard errors
    note: str = ""
    caution: str = ""  # stands with every prediction

    def loss(self, N, D, U=None):
        """Loss in `unit` of N parameters after D tokens, U of them unique (all of them where None); arrays broadcast.

        Raises InputError where N, D or U is not positive.
        """
        sizes = {"N": N, "D": D} | ({} if U is None else {"U": U})
        for symbol, value in sizes.items():
            if not np.all(np.isfinite(value) & (np.asarray(value) > 0)):
                raise InputError(f"{symbol} = {value}: expected positive numbers")
        N, D, U = np.broadcast_arrays(*(np.asarray(v, float) for v in (N, D, D if U is None else U)))
        loss = _FORMULAS[self.law](self.params, N, D, U)
        return float(loss) if loss.ndim == 0 else loss

    def outside(self, N, D) -> str | None:
        """One line on which of N, D, C and D/N lies outside the fitted range, or None."""
        N, D = np.asarray(N, float), np.asarray(D, float)
        quantities = (("N", N, self.n_range), ("D", D, self.d_range), ("C", 6 * N * D, self.c_range))
        beyond = []
        for symbol, value, (low, high) in (*quantities, ("D/N", D / N, self.m_range)):
            if high is not None and value.max() > high * 1.001:
                beyond.append(f"{symbol} = {value.max():.3g} is {value.max() / high:.3g}x above {high:.3g}")
            if low is not None and value.min() < low / 1.001:
                beyond.append(f"{symbol} = {value.min():.3g} is {low / value.min():.3g}x below {low:.3g}")
        return f"{self.name}: outside the fitted range: {', '.join(beyond)}" if beyond else None

    def predict(self, N, D, U=None) -> Prediction:
        notes = [w for w in (self.outside(N, D), self.caution and f"{self.name}: {self.caution}") if w]
        return Prediction(self.loss(N, D, U), unit=self.unit, notes=tuple(notes))

    def summary(self) -> str:
        values = ", ".join(
            f"{k} {v:.7g}" + (f" (se {self.errors[k]:.4g})" if k in self.errors else "") for k, v in self.params.items()
        )
        ranges = (("N", self.n_range), ("D", self.d_range), ("C", self.c_range), ("D/N", self.m_range))
        fitted = ", ".join(f"{k} {low:.3g} to {high:.3g}" for k, (low, high) in ranges if low is not None)
        lines = [
            f"{self.name}: {self.law}, {values}",
            f"  {self.source}",
            f"  loss in {self.unit} on {self.data}; N {self.n_counts}; C = {self.flop_formula}; {self.tokenizer}",
            f"  fitted on {fitted or 'a range not stated'}",
            f"  checked: {self.checked}",
        ]
        return "\n".join(lines + [f"  {t}" for t in (self.note, self.caution) if t])


def published_law(name: str) -> Published:
    """The record of that name. Raises InputError, with the nearest name, where there is none."""
    if name not in PUBLISHED:
        raise InputError(f"no published law {name!r}{nearest_or_all(name, PUBLISHED)}")
    return PUBLISHED[name]


def summary() -> str:
    """Every record: constants, source, range, how it was checked."""
    return "\n".join(record.summary() for record in PUBLISHED.values())


def _kaplan(p, N, D, U):
    return p["E"] + ((p["N_c"] / N) ** (p["alpha_N"] / p["alpha_D"]) + p["D_c"] / D) ** p["alpha_D"]


def _chinchilla(p, N, D, U):
    return p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]


def _data_constrained(p, N, D, U):
    """U_N is the compute-optimal N of U_D = min(D, U) unique tokens; what exceeds the two decays in value."""
    unique_d = np.minimum(D, U)
    best_n = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / p["alpha"]) * unique_d ** (p["beta"] / p["alpha"])
    unique_n = np.minimum(N, best_n)
    effective_d = unique_d * (1 + p["R_D"] * (1 - np.exp(-(D / unique_d - 1) / p["R_D"])))
    effective_n = unique_n * (1 + p["R_N"] * (1 - np.exp(-(N / unique_n - 1) / p["R_N"])))
    return _chinchilla(p, effective_n, effective_d, U)


def _over_training(p, N, D, U):
    M, C = D / N, 6 * N * D
    return p["E"] + (p["a"] * M ** p["eta"] + p["b"] * M ** -p["eta"]) * C ** -p["eta"]


def _farseer(p, N, D, U):
    fall = np.exp(p["A"] * N ** p["a"] + p["E"])
    return np.exp(p["s"] * N ** p["q"] + p["S"]) + np.exp(p["B"] * N ** p["b"] + p["Q"]) * D**-fall


_FORMULAS = {
    "kaplan": _kaplan,
    "chinchilla": _chinchilla,
    "data_constrained": _data_constrained,
    "over_training": _over_training,
    "farseer": _farseer,
}

_KAPLAN = {
    "n_counts": "non-embedding",
    "data": "WebText2",
    "tokenizer": "GPT-2 byte pairs, 50,257",
    "n_range": (768.0, 1.5e9),
    "d_range": (2.2e7, 2.3e10),
    "checked": "range read in the paper's text, constants in several restatements of it",
}
_HOFFMANN = {
    "law": "chinchilla",
    "n_counts": "total",
    "data": "MassiveText",
    "tokenizer": "SentencePiece",
    "n_range": (7e7, 1.6e10),
    "d_range": (5e9, 5e11),
    "flop_formula": "6ND (the paper counts operation by operation)",
}
_GADRE = {
    "law": "over_training",
    "n_counts": "total",
    "tokenizer": "GPT-NeoX, 50,432 with padding",
    "n_range": (1.06e7, 4.12e8),
    "d_range": (2.11e8, 8.23e9),
    "m_range": (20.0, 320.0),
    "source": "Gadre et al. 2024, arXiv 2403.08540, equation 4",
    "checked": "the authors' fit repeated on the five runs they fitted, from their repository; the paper's table of "
    "constants was not read",
}


def _gadre(suffix: str, data: str, E: float, a: float, b: float, eta: float) -> Published:
    return Published(
        name=f"gadre_{suffix}",
        params={"E": E, "a": a, "b": b, "eta": eta},
        data=f"C4 validation, trained on {data}",
        note="loss on C4 validation whatever the training set; runs of M = D/N up to 640 were predicted, not fitted",
        **_GADRE,
    )


PUBLISHED: dict[str, Published] = {
    record.name: record
    for record in (
        Published(
            name="kaplan",
            law="kaplan",
            params={"E": 0.0, "N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
            source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.5 and table 2",
            note="no floor: the loss falls to 0; loss of early-stopped runs on repeated data, not of one epoch",
            **_KAPLAN,
        ),
        Published(
            name="kaplan_n",
            law="kaplan",
            params={"E": 0.0, "N_c": 8.8e13, "D_c": 0.0, "alpha_N": 0.076, "alpha_D": 1.0},
            source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.1: (8.8e13 / N)^0.076",
            note="for data without limit: D does not enter",
            **_KAPLAN,
        ),
        Published(
            name="kaplan_d",
            law="kaplan",
            params={"E": 0.0, "N_c": 0.0, "D_c": 5.4e13, "alpha_N": 1.0, "alpha_D": 0.095},
            source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.2: (5.4e13 / D)^0.095",
            note="for a model without limit, stopped early: N does not enter",
            **_KAPLAN,
        ),
        Published(
            name="hoffmann",
            params={"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
            source="Hoffmann et al. 2022, arXiv 2203.15556, approach 3, equation 10",
            checked="read in several restatements of the paper; tested on the 240 runs of its figure 4",
            caution="the printed exponents are rounded, which puts the loss about 1.7 % high: take hoffmann_unrounded",
            **_HOFFMANN,
        ),
        Published(
            name="hoffmann_unrounded",
            params={"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849},
            source="Hoffmann et al. 2022, arXiv 2203.15556, approach 3, the digits of its TeX source",
            checked="read in digests of Besiroglu et al. 2404.10102; tested on the 240 runs of figure 4",
            note="the optimiser stopped early (losses averaged, not summed): besiroglu is the converged fit",
            **_HOFFMANN,
        ),
        Published(
            name="besiroglu",
            params={"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            errors={"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02},
            source="Besiroglu et al. 2024, arXiv 2404.10102, the refit without the 5 outliers",
            checked="read in digests of the paper; on the 240 public runs its objective is 0.5 % above the optimum",
            note="240 runs read off figure 4 of Hoffmann et al.; the least absolute deviations of log loss",
            **(_HOFFMANN | {"n_range": (5.7e7, 1.62e10), "d_range": (8.2e8, 3.2e11), "c_range": (1.4e18, 1.3e22)}),
        ),
        Published(
            name="muennighoff",
            law="data_constrained",
            params={
                "E": float(np.exp(0.6254804)),
                "A": float(np.exp(6.255414)),
                "B": float(np.exp(7.3049974)),
                "alpha": 0.3526596,
                "beta": 0.3526596,
                "R_D": 15.387756,
                "R_N": 5.309743,
            },
            n_counts="total",
            data="C4",
            tokenizer="GPT-2 byte pairs",
            n_range=(7.1e6, 8.7e9),
            d_range=(1e8, 9e11),
            source="Muennighoff et al. 2023, arXiv 2305.16264, equations 16 to 20",
            checked="read in the authors' code as others restate it; objective on the 182 public runs 0.01582593",
            note="R_D and R_N are a local optimum: (95.4, 1.71) fits the same runs slightly better",
        ),
        _gadre("c4", "C4", 1.50826, 141.277, 189.516, 0.121236),
        _gadre("redpajama", "RedPajama", 1.83665, 212.236, 366.687, 0.136425),
        _gadre("refinedweb", "RefinedWeb", 1.73446, 157.116, 246.207, 0.127197),
        Published(
            name="farseer",
            law="farseer",
            params={
                **{"s": -0.021, "q": 0.169, "S": -0.091},
                **{"B": 88.01, "b": -0.1, "Q": -6.287},
                **{"A": -0.124, "a": 0.123, "E": 0.424},
            },
            n_counts="non-embedding",
            data="an English validation set",
            tokenizer="not stated here",
            n_range=(9.9e7, 6.4e9),
            d_range=(1e9, 5.2e11),
            unit="bits/character",
            source="Farseer, Li et al. 2025, arXiv 2506.10972",
            checked="the page with the constants could not be read: recalled, then tested on the 404 public runs; "
            "within half a unit of the last digits lies a point that meets them to 0.2 %",
            note="nine constants of three digits do not determine the loss: fit the law for a prediction",
            caution="constants not verified in print, and rounded: 2.4 % low on the 404 public runs",
        ),
    )
}
