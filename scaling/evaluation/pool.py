"""Pool: one pool of strings that a policy wrote, scored by a reward model and by the true reward.

From it the best of n for every n, and the optimum of E[proxy] - beta KL for every beta, without training a policy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from models.errors import InputError
from scaling.data.draws import bits, stream, unit
from scaling.evaluation import Evaluation, Row, row
from scaling.evaluation._written import gold_task, score, written

SHARE = 16  # of the pool that the largest n may be: beyond, the best of n hangs on a few strings
MARGIN = 3.0  # nats that the KL of an optimum must stay below ln M
EFFECTIVE = 100.0  # strings that must carry the weight of an optimum: of normal scores it falls as M exp(-2 KL)
STEPS = 40  # of the bisection for beta


@dataclass(frozen=True)
class Pool(Evaluation):
    """Gold is the true reward of a source of comparisons, proxy what the strings are chosen by."""

    policy: str = ""  #: id of a run beside this one, which writes the strings; "": this one
    source: str = ""  #: spec of comparisons, whose true reward is gold; "": what this run was trained on
    proxy: str = "reward"  #: of this run, a reward model; gold: the true reward; random: a number drawn for each string
    draw: int = 0  #: which random numbers
    M: int = 65_536  #: strings of the pool
    n: tuple[int, ...] = ()  #: of best of n, each at most M / 16; (): 1, 2, 4, ...
    #: nats, of the optima, each below ln M - 3; (): 16 of equal steps in d = sqrt(KL)
    kl: tuple[float, ...] = ()

    SUMMARY = "best of n and the KL-regularised optimum, true and proxy reward, from one pool of a policy's strings"

    def check(self) -> tuple[np.ndarray, float]:
        """(each n, what a KL stays below). Raises InputError for options that ask more than a pool can say."""
        if self.M < 256:
            raise InputError(f"M = {self.M}: expected at least 256 strings")
        n = np.array(self.n or 2 ** np.arange(int(np.log2(self.M / SHARE)) + 1))
        if n.min() < 1 or n.max() * SHARE > self.M:
            raise InputError(f"n = {list(self.n)}: expected whole numbers of 1 to M / {SHARE} = {self.M // SHARE}")
        most = np.log(self.M) - MARGIN
        if self.kl and not 0 < min(self.kl) <= max(self.kl) < most:
            raise InputError(f"kl = {list(self.kl)}: expected numbers above 0 and below ln M - {MARGIN:g} = {most:.3g}")
        if self.proxy not in ("reward", "gold", "random"):
            raise InputError(f"proxy = {self.proxy!r}: expected reward, gold or random")
        return n, most

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """best_of_n and best_of_n_proxy at n, with its KL to the policy, nats; optimum and optimum_proxy at beta, with
        its KL, where at least 100 strings carry its weight; correlation of proxy and gold. Proxies are standardised:
        their scale says nothing.
        """
        n, most = self.check()
        task = gold_task(asker.model.config, self.source)
        tokens_BU = written(asker, self.policy, self.M, task.length, seed)
        gold_M = task.gold(tokens_BU[:, 1:])
        proxy_M = {
            "reward": lambda: score(asker, tokens_BU).astype(np.float64),
            "gold": lambda: gold_M,
            "random": lambda: ndtri(unit(bits(stream("pool", self.draw), np.arange(self.M), 1)[:, 0]) + 2.0**-54),
        }[self.proxy]()
        if not proxy_M.std() > 0:
            raise InputError("proxy: gives all strings the same reward, so it chooses nothing")
        proxy_M = (proxy_M - proxy_M.mean()) / proxy_M.std()
        kl = self.kl or tuple((np.sqrt(0.999 * most) * np.arange(1, 17) / 16) ** 2)
        return measured(proxy_M, gold_M, n, kl)


def measured(proxy_M: np.ndarray, gold_M: np.ndarray, n: np.ndarray, kl: tuple[float, ...]) -> list[Row]:
    M, rows = len(gold_M), []
    order = np.argsort(proxy_M, kind="stable")
    for name, value_M in (("best_of_n", gold_M), ("best_of_n_proxy", proxy_M)):
        ranked_M = ties_shared(proxy_M[order], value_M[order])
        for size in map(int, n):
            to_policy = np.log(size) - (size - 1) / size  # KL, exact without ties (2112.09332)
            rows.append(row(name, *best_of(ranked_M, size), M, k=size, kl=to_policy))
    for beta in betas_of(proxy_M, kl):
        weight_M, to_policy = tilted(proxy_M, beta)
        effective = 1 / np.sum(weight_M**2)
        if effective < EFFECTIVE:
            continue
        axes = {"beta": float(beta), "kl": to_policy, "effective": float(effective)}
        for name, value_M in (("optimum", gold_M), ("optimum_proxy", proxy_M)):
            mean = weight_M @ value_M
            rows.append(row(name, mean, np.sqrt(np.sum((weight_M * (value_M - mean)) ** 2)), M, **axes))
    r = np.corrcoef(proxy_M, gold_M)[0, 1]
    return [*rows, row("correlation", r, (1 - r**2) / np.sqrt(M), M), row("gold_std", gold_M.std(), 0.0, M)]


def ties_shared(proxy_M: np.ndarray, value_M: np.ndarray) -> np.ndarray:
    """Values, from the lowest proxy up; those of equal proxy all take the mean of theirs."""
    _, tie_M, count = np.unique(proxy_M, return_inverse=True, return_counts=True)
    return (np.bincount(tie_M, value_M) / count)[tie_M]


def best_of(ranked_M: np.ndarray, n: int) -> tuple[float, float]:
    """(mean of the highest of n, its standard error by the jackknife over the pool), values from the lowest proxy up.

    sum_i C(i-1, n-1)/C(M, n) g_(i), the mean over all subsets of n: unbiased (2112.09332, appendix I).
    """
    M = len(ranked_M)
    value, less_M = best_weights(M, n) @ ranked_M, best_weights(M - 1, n)
    # Without string j those below it keep their place, and those above it move down one.
    below_M = np.concatenate([[0.0], np.cumsum(less_M * ranked_M[:-1])])
    above_M = np.concatenate([np.cumsum((less_M * ranked_M[1:])[::-1])[::-1], [0.0]])
    without_M = below_M + above_M
    return float(value), float(np.sqrt((M - 1) / M * np.sum((without_M - without_M.mean()) ** 2)))


def best_weights(M: int, n: int) -> np.ndarray:
    """C(i-1, n-1)/C(M, n) for i = 1..M: the chance that the i-th of M, from the lowest, is the best of n drawn."""
    i = np.arange(M, 1, -1.0)  # C(i-2, n-1)/C(i-1, n-1) = 1 - (n-1)/(i-1), from the top down
    with np.errstate(divide="ignore"):
        steps = np.where(i > n, np.log1p(-np.minimum((n - 1) / (i - 1), 1.0)), -np.inf)
    return (n / M * np.exp(np.concatenate([[0.0], np.cumsum(steps)])))[::-1]


def tilted(proxy_M: np.ndarray, beta: float) -> tuple[np.ndarray, float]:
    """(weights of the optimum exp(proxy/beta)/Z over the pool, its KL to the policy in nats)."""
    weight_M = np.exp((proxy_M - proxy_M.max()) / beta)
    weight_M /= weight_M.sum()
    some_M = weight_M[weight_M > 0]
    return weight_M, float(np.sum(some_M * np.log(some_M * len(weight_M))))


def betas_of(proxy_M: np.ndarray, kl: tuple[float, ...]) -> np.ndarray:
    """The beta at which the optimum has each KL on this pool; those that no beta reaches are left out."""
    low, high = np.full(len(kl), np.log(1e-4)), np.full(len(kl), np.log(1e4))  # KL falls with beta
    for _ in range(STEPS):
        middle = (low + high) / 2
        more = np.array([tilted(proxy_M, beta)[1] for beta in np.exp(middle)]) > np.array(kl)
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    reached = low > np.log(1e-4)
    return np.exp(low[reached])
