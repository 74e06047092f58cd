"""Where the gold reward peaks as a policy is pushed against a proxy: Gao's laws (2210.10760), whose top is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.errors import InputError
from analysis.fitting.result import LawFit
from analysis.metric import LEVEL


@dataclass(frozen=True)
class Peak:
    """The top of a law's gold reward: the KL at which it stands (nats) and the reward there, each with its interval.

    share: of the bootstrap draws that have a top at all (alpha and beta above 0); the intervals are of those.
    """

    kl: float
    kl_low: float
    kl_high: float
    reward: float
    reward_low: float
    reward_high: float
    share: float


def peak(fit: LawFit) -> Peak:
    """The top of a fitted law `best_of_n`, d = alpha/(2 beta), or `rl_reward`, d = exp(alpha/beta - 1); d = sqrt(KL).

    Values are infinite where the fit itself has no top: its reward only rises. Raises InputError for another law, or a
    fit without bootstrap draws.
    """
    if fit.law not in ("best_of_n", "rl_reward"):
        raise InputError(f"law {fit.law!r} has no known peak; fit best_of_n or rl_reward")
    if fit.draws is None:
        raise InputError("peak: the fit has no bootstrap draws, so no interval; call bootstrap first")
    drawn = fit.params_of(fit.draws)
    kl, reward = top(fit.law, drawn["alpha"], drawn["beta"])
    some = np.isfinite(kl)
    own = top(fit.law, np.array([fit.params["alpha"]]), np.array([fit.params["beta"]]))
    tail = 50 * (1 - LEVEL)
    ends = [np.percentile(v[some], [tail, 100 - tail]) if some.any() else (np.nan, np.nan) for v in (kl, reward)]
    (kl_low, kl_high), (low, high) = ends
    return Peak(*(float(v) for v in (own[0][0], kl_low, kl_high, own[1][0], low, high, np.mean(some))))


def top(law: str, alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(KL, reward) at the top, infinite where there is none."""
    with np.errstate(all="ignore"):
        d = alpha / (2 * beta) if law == "best_of_n" else np.exp(alpha / beta - 1)
        reward = alpha**2 / (4 * beta) if law == "best_of_n" else beta * d
    turns = (beta > 0) & ((alpha > 0) | (law == "rl_reward"))
    return np.where(turns, d**2, np.inf), np.where(turns, reward, np.inf)
