"""Curves of the true reward against the distance from the policy, and Gao's laws (2210.10760) on them. No JAX here.

A curve's rows: run, k (the n of best of n), kl, d = sqrt(kl), gain, and what the run is.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.uncertainty.clustered import clustered
from models.errors import InputError
from sweeps.studies import _rules as rules
from sweeps.studies._study import Verdict

FITTED = 512  # the largest n that a fit sees


def curves(frame: pd.DataFrame, cells: Mapping[str, Any], label: str, arm: str = "best_of_n") -> pd.DataFrame:
    """gain is the true reward over that of the policy, which is that of the best of one. cells: what each run is, a
    dataclass whose fields are columns of the curve.
    """
    rows = rules.rows_of(frame, label)
    base = rows[(rows["metric"] == "best_of_n") & (rows["k"] == 1)].set_index("run")["value"]
    rows = rows[(rows["metric"] == arm) & (rows["kl"] > 0)].reset_index(drop=True)
    about = pd.DataFrame([vars(cells[run]) for run in rows["run"]])
    own = rows[["run", "k", "kl", "value", "stderr", "n_compute"]]
    own = own.assign(d=np.sqrt(rows["kl"]), gain=rows["value"] - rows["run"].map(base))
    return pd.concat([own, about], axis=1)


def form(d: np.ndarray, law: str) -> np.ndarray:
    """Gao's laws (2210.10760, equation 1) are linear in alpha and beta: the design matrix."""
    return np.stack([d, -d * (d if law == "best_of_n" else np.log(d))], axis=-1)


def coefficients(curve: pd.DataFrame, law: str = "best_of_n") -> np.ndarray:
    """(alpha, beta) by least squares."""
    return np.linalg.lstsq(form(curve["d"].to_numpy(), law), curve["gain"].to_numpy(), rcond=None)[0]


def forecast(curve: pd.DataFrame, within: pd.Series, law: str = "best_of_n") -> pd.DataFrame:
    """The rows beyond, with what a fit of each run's rows `within` says of them in `predicted`."""
    parts = []
    for _, rows in curve.groupby("run"):
        seen = within[rows.index]
        if seen.sum() >= 2 and (~seen).any():
            beyond = rows[~seen]
            parts.append(beyond.assign(predicted=form(beyond["d"].to_numpy(), law) @ coefficients(rows[seen], law)))
    if not parts:
        raise InputError("no curve has points on both sides of the hold-out")
    return pd.concat(parts, ignore_index=True)


def rms(rows: pd.DataFrame) -> float:
    return float(np.sqrt(np.mean((rows["predicted"] - rows["gain"]) ** 2)))


def below(rows: pd.DataFrame, most: float, note: str = "") -> Verdict:
    """Whether the rms error of the predictions is at most so much, by its interval over runs."""
    found = clustered(rows, rms, "run", draws=400)
    verdict = "upheld" if found.high <= most else "refuted" if found.low > most else "undecided"
    said = f"rms error {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] of {found.clusters} runs, at most {most}"
    return Verdict("", verdict, most, found.low, found.high, found.value, rules.joined(said, note))


def top_of(curve: pd.DataFrame) -> float:
    """d of the top: of the parabola through the highest point and its neighbours; infinite at the end of the curve."""
    rows = curve.sort_values("d")
    at = int(np.argmax(rows["gain"]))
    if at in (0, len(rows) - 1):
        return np.inf
    square, line, _ = np.polyfit(rows["d"].iloc[at - 1 : at + 2], rows["gain"].iloc[at - 1 : at + 2], 2)
    return float(-line / (2 * square))


def fall_of(curve: pd.DataFrame) -> pd.DataFrame:
    """A row a run: how far the true reward lies below its top at the largest n."""
    rows = [(run, part["gain"].max() - part.sort_values("k")["gain"].iloc[-1]) for run, part in curve.groupby("run")]
    return pd.DataFrame(rows, columns=["run", "fall"])


def by_run(curve: pd.DataFrame, law: str = "best_of_n") -> pd.DataFrame:
    """A row a run: its cell, N, and alpha and beta of its points up to n = 512."""
    rows = curve.groupby("run", as_index=False).first()
    pairs = [coefficients(part[part["k"] <= FITTED], law) for _, part in curve.groupby("run")]
    return rows.assign(alpha=[a for a, _ in pairs], beta=[b for _, b in pairs])


def design(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.ones(len(rows)), np.log10(rows["n_compute"]), np.log10(rows["pairs"])], axis=1)
