"""What samples say: pass@k, best of n, the KL-tilted optimum, calibration, shares with their binomial interval.

Every estimator of an expectation is unbiased for every k or n at once, from one pool of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import InputError
from analysis.metric import LEVEL


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean and its standard error, numbers or arrays of one shape; n: what the mean is over."""

    value: np.ndarray
    stderr: np.ndarray
    n: int


def pass_at_k(samples, correct, k) -> np.ndarray:
    """(problems, k): the unbiased 1 - C(n-c, k)/C(n, k) of each problem, Chen et al. 2021, arXiv 2107.03374.

    samples n: of each problem, or one number for all; correct c: how many of them were right; k: one or more.
    Raises InputError where k is above n.
    """
    c = np.atleast_1d(np.asarray(correct))
    n = np.broadcast_to(np.asarray(samples), c.shape)
    ks = whole("k", k)
    if not ((c >= 0) & (c <= n)).all() or not (n >= 1).all() or (c != np.round(c)).any() or (n != np.round(n)).any():
        raise InputError("correct: expected whole numbers from 0 to the number of samples")
    if ks.max() > n.min():
        raise InputError(
            f"k = {ks.max()}: above the pool of {n.min():g} samples a problem; take more samples, or less k"
        )
    out = np.empty((len(c), len(ks)))
    for size in np.unique(n):
        here = n == size
        # C(n-c, k)/C(n, k) = prod_{i = n-c+1..n} (1 - k/i), its log summed over i from n down, for every c at once.
        i = np.arange(size, 0, -1.0)
        with np.errstate(divide="ignore"):
            logs = np.where(i > ks[:, None], np.log1p(-np.minimum(ks[:, None] / i, 1.0)), -np.inf)
        none_right = np.concatenate([np.zeros((len(ks), 1)), np.cumsum(logs, axis=1)], axis=1)
        out[here] = -np.expm1(none_right[:, c[here].astype(int)].T)
    return out


def pass_at_k_exact(p, k) -> np.ndarray:
    """(problems, k): 1 - (1 - p)^k of problems that are solved with probability p at each try."""
    p, ks = np.atleast_1d(np.asarray(p, float)), whole("k", k)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError("p: expected probabilities from 0 to 1")
    with np.errstate(divide="ignore"):
        return -np.expm1(ks * np.log1p(-p)[:, None])


def mean_over_problems(values, cluster=None) -> Estimate:
    """The mean over problems, (problems, ...), with a standard error that holds the sampling and the problems' spread.

    cluster: (problems,) labels of problems that are not independent, such as of one template; None: each by itself.
    """
    values = np.asarray(values, float)
    total = len(values)
    deviation = values - values.mean(axis=0)
    if cluster is not None:
        _, group = np.unique(np.asarray(cluster), return_inverse=True)
        sums = np.zeros((group.max() + 1, *values.shape[1:]))
        np.add.at(sums, group, deviation)
        deviation = sums
    units = len(deviation)
    factor = units / (units - 1) if units > 1 else np.nan
    return Estimate(values.mean(axis=0), np.sqrt(factor * np.sum(deviation**2, axis=0)) / total, total)


def best_of_n(proxy, gold, n) -> Estimate:
    """The mean of `gold` of the sample that `proxy` likes best among n, for every n from one pool of M samples.

    R(n) = sum_i C(i-1, n-1)/C(M, n) g_(i), g sorted by the proxy: the mean over all subsets of n, unbiased (Nakano et
    al. 2021, arXiv 2112.09332, appendix I). Among samples of equal proxy one is taken at random. The standard error is
    the jackknife's, of the pool's samples. Raises InputError where n is above M.
    """
    gold = ranked(proxy, gold)
    ns, M = whole("n", n), len(gold)
    if ns.max() > M:
        raise InputError(f"n = {ns.max()}: above the pool of {M} samples; score more samples, or take less n")
    values, errors = np.empty(len(ns)), np.full(len(ns), np.nan)
    for row, size in enumerate(ns):
        values[row] = best_weights(M, size) @ gold
        if size < M:
            # Without sample j: those below it keep their place, those above it move down one.
            less = best_weights(M - 1, size)
            below = np.concatenate([[0.0], np.cumsum(less * gold[:-1])])
            above = np.concatenate([np.cumsum((less * gold[1:])[::-1])[::-1], [0.0]])
            without = below + above
            errors[row] = np.sqrt((M - 1) / M * np.sum((without - without.mean()) ** 2))
    return Estimate(values, errors, M)


def best_weights(M: int, n: int) -> np.ndarray:
    """(M,) C(i-1, n-1)/C(M, n) for i = 1..M: the chance that the i-th of M, from the lowest, is the best of n drawn."""
    i = np.arange(M, 1, -1.0)  # C(i-2, n-1)/C(i-1, n-1) = 1 - (n-1)/(i-1), from the top down
    with np.errstate(divide="ignore"):
        steps = np.where(i > n, np.log1p(-np.minimum((n - 1) / (i - 1), 1.0)), -np.inf)
    return (n / M * np.exp(np.concatenate([[0.0], np.cumsum(steps)])))[::-1]


def best_of_n_kl(n) -> np.ndarray:
    """KL of the best of n to the policy it is drawn from, ln n - (n-1)/n nats: exact without ties (2112.09332)."""
    n = np.asarray(n, float)
    return np.log(n) - (n - 1) / n


@dataclass(frozen=True, eq=False)
class Tilted:
    """The optimum of E[proxy] - beta KL, p(y) exp(proxy(y)/beta)/Z, of a pool drawn from p; arrays over beta.

    trusted: whether KL < ln M - 3, beyond which a handful of samples carries the weight.
    """

    gold: np.ndarray
    proxy: np.ndarray
    kl: np.ndarray
    effective: np.ndarray  #: (sum w)^2 / sum w^2, in samples
    trusted: np.ndarray


def tilted(proxy, gold, beta) -> Tilted:
    """The KL-regularised optimum at each beta, self-normalised importance weights over a pool from the base policy."""
    proxy, gold = np.asarray(proxy, float), np.asarray(gold, float)
    betas = np.atleast_1d(np.asarray(beta, float))
    if not (betas > 0).all():
        raise InputError("beta: expected numbers above 0")
    logits = (proxy - proxy.max()) / betas[:, None]
    w = np.exp(logits)
    w /= w.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.sum(np.where(w > 0, w * np.log(w * len(proxy)), 0.0), axis=1)
    return Tilted(w @ gold, w @ proxy, kl, 1 / np.sum(w**2, axis=1), kl < np.log(len(proxy)) - 3)


def ranked(proxy, gold) -> np.ndarray:
    """(M,) gold from the lowest proxy up; samples of equal proxy all take the mean of theirs."""
    proxy, gold = np.asarray(proxy, float), np.asarray(gold, float)
    if proxy.shape != gold.shape or proxy.ndim != 1 or not len(proxy):
        raise InputError(f"proxy, gold: expected two lists of one length, got {proxy.shape} and {gold.shape}")
    if not (np.isfinite(proxy).all() and np.isfinite(gold).all()):
        raise InputError("proxy, gold: expected finite numbers")
    order = np.argsort(proxy, kind="stable")
    _, tie, count = np.unique(proxy[order], return_inverse=True, return_counts=True)
    return (np.bincount(tie, gold[order]) / count)[tie]


def binomial_interval(right, trials, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a share, exact (Clopper and Pearson 1934): it covers at least `level`, whatever the share."""
    right, trials = np.asarray(right, float), np.asarray(trials, float)
    if not ((trials >= 1) & (right >= 0) & (right <= trials)).all():
        raise InputError("right: expected counts from 0 to the number of trials, of which there is at least one")
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(right > 0, stats.beta.ppf(tail, right, trials - right + 1), 0.0)
        high = np.where(right < trials, stats.beta.ppf(1 - tail, right + 1, trials - right), 1.0)
    return low, high


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far confidence and accuracy lie apart.

    ece: mean over the answers of |accuracy - confidence| of their bin (Naeini et al. 2015; Guo et al. 2017, arXiv
    1706.04599), with the standard error that the binomial noise of the bins gives it. expected: the ece that a
    calibrated model would show in as many answers, as noise alone makes it positive. table: a row a bin, with n,
    confidence, accuracy and the accuracy's interval (low, high).
    """

    ece: float
    stderr: float
    expected: float
    table: pd.DataFrame


def calibration(confidence, correct, bins: int = 10, level: float = LEVEL) -> Calibration:
    """The reliability curve in bins of equally many answers, and the expected calibration error."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if confidence.shape != correct.shape or confidence.ndim != 1 or len(confidence) < bins:
        raise InputError(f"confidence, correct: expected two lists of one length, of at least {bins} answers (bins)")
    if not ((confidence >= 0) & (confidence <= 1)).all() or not np.isin(correct, (0, 1)).all():
        raise InputError("confidence: expected numbers from 0 to 1; correct: expected 0 or 1")
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, bins)
    n = np.array([len(part) for part in parts])
    mean, right = (np.array([values[part].sum() for part in parts]) for values in (confidence, correct))
    share, accuracy, said = n / n.sum(), right / n, mean / n
    low, high = binomial_interval(right, n, level)
    table = pd.DataFrame({"n": n, "confidence": said, "accuracy": accuracy, "low": low, "high": high})
    within = np.array([np.sum(confidence[part] * (1 - confidence[part])) for part in parts]) / n**2
    return Calibration(
        ece=float(share @ np.abs(accuracy - said)),
        # Of k right in n the variance is that of (k + 1)/(n + 2): a bin without a mistake is not free of noise.
        stderr=float(np.sqrt(np.sum(share**2 * (right + 1) * (n - right + 1) / (n + 2) ** 2 / n))),
        expected=float(share @ np.sqrt(2 / np.pi * within)),
        table=table,
    )


def whole(name: str, values) -> np.ndarray:
    """One or more whole numbers of at least 1. Raises InputError."""
    array = np.atleast_1d(np.asarray(values, float))
    if array.ndim != 1 or not array.size or not ((array >= 1) & (array == np.round(array))).all():
        raise InputError(f"{name} = {values!r}: expected whole numbers of at least 1")
    return array.astype(int)
