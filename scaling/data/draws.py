"""Random numbers by their place: a function of (stream, index, draw), not of a state.

The streams are SplitMix64's (Steele, Lea & Flood 2014), one an index, and only 64-bit integer arithmetic is used: the
same numbers on every machine and with every version of numpy, for ever, in whatever groups they are asked for.
"""

import hashlib
import json

import numpy as np

from scaling.data.order import mix

GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def stream(*parts: str | int) -> int:
    """The number of a stream, below 2**64: a digest of its name."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8])


def bits(of: int, index_n: np.ndarray, draws: int) -> np.ndarray:
    """uint64 [n, draws] of stream `of`, uniform over all 64 bits."""
    start_n = mix(np.asarray(index_n).astype(np.uint64) + np.uint64(of))
    steps = np.array([i * GOLDEN & _MASK for i in range(draws)], np.uint64)
    return mix(start_n[:, None] + steps)


def below(bits: np.ndarray, n: int) -> np.ndarray:
    """Whole numbers of 0 to n - 1, int64; of n up to 2**32, uniform to n / 2**32."""
    return ((bits >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def unit(bits: np.ndarray) -> np.ndarray:
    """Numbers of 0 to below 1, float64, in steps of 2**-53."""
    return (bits >> np.uint64(11)) * 2.0**-53


def thresholds(weights: np.ndarray) -> np.ndarray:
    """What `choose` compares with, uint64 [..., K], of whole weights whose sums along the last axis are below 2**63."""
    total = np.cumsum(weights, axis=-1, dtype=np.int64).astype(object)
    return (total * 2**53 // total[..., -1:]).astype(np.uint64)


def choose(thresholds_K: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Which of K is drawn, each as often as its share of the weights; int64, of the shape of `bits`."""
    return np.searchsorted(thresholds_K, bits >> np.uint64(11), side="right")


def choose_each(thresholds_nK: np.ndarray, bits_n: np.ndarray) -> np.ndarray:
    """`choose` of a table for each; int64 [n]."""
    return (thresholds_nK <= (bits_n >> np.uint64(11))[:, None]).sum(axis=1)


def zipf(n: int, a: float) -> np.ndarray:
    """Whole weights of ranks 1 to n, in proportion to rank^-(1 + a), int64 [n].

    Rounded to 40 bits, so that a power that differs in its last bit on another machine gives the same weights.
    """
    return np.maximum(1, np.rint(np.arange(1, n + 1, dtype=np.float64) ** -(1 + a) * 2.0**40)).astype(np.int64)


def entropy(weights: np.ndarray) -> float:
    """Of a choice by these weights, in nats."""
    p = weights[weights > 0] / weights.sum()
    return float(0.0 - (p * np.log(p)).sum())
