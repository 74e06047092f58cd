"""What pretraining is worth in tokens of the task: data transferred (Hernandez et al. 2021, arXiv 2102.01293)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from analysis.errors import InputError
from analysis.fitting.censored import CensoredFit, fit_censored

LEAST = 0.05  # of D_F: less data transferred than this is below what a curve of losses resolves


@dataclass(frozen=True, eq=False)
class Scratch:
    """Loss against tokens of runs from scratch at one N: the nearest falling curve, log-linear between its points."""

    tokens: np.ndarray
    loss: np.ndarray

    def loss_at(self, tokens) -> np.ndarray:
        """At tokens within those measured; beyond them the ends' loss."""
        return np.exp(np.interp(np.log(tokens), np.log(self.tokens), np.log(self.loss)))

    def tokens_at(self, loss) -> tuple[np.ndarray, np.ndarray]:
        """(tokens from scratch that give a loss, side): 1 where the loss is lower than the longest run's, so that it
        would take more; -1 where it is above the shortest run's.
        """
        loss = np.asarray(loss, float)
        falling = np.minimum.accumulate(np.log(self.loss) - 1e-12 * np.arange(len(self.loss)))
        tokens = np.exp(np.interp(-np.log(loss), -falling, np.log(self.tokens)))
        side = np.where(loss < self.loss[-1], 1, np.where(loss > self.loss[0], -1, 0))
        return tokens, side


def scratch(tokens, loss) -> Scratch:
    """The curve of runs from scratch; several runs at one D are averaged. Raises InputError for fewer than two D."""
    tokens, loss = np.asarray(tokens, float), np.asarray(loss, float)
    D, place = np.unique(tokens, return_inverse=True)
    if len(D) < 2 or not (np.isfinite(loss) & (loss > 0)).all() or not (D > 0).all():
        raise InputError("scratch: expected finite losses above 0 at two or more numbers of tokens")
    count = np.bincount(place)
    mean = np.bincount(place, np.log(loss)) / count
    return Scratch(D, np.exp(isotonic_regression(mean, weights=count, increasing=False).x))


def data_transferred(curve: Scratch, finetune_tokens, loss) -> tuple[np.ndarray, np.ndarray]:
    """(D_T, side) of finetuned runs: D_T = D_scratch(loss) - D_F, in tokens.

    side: 1 where the loss is beyond the curve from scratch, so that D_T is at least what is given (a token, where D_F
    itself is past the curve and nothing is known); -1 where it is at most that: below what can be told from nothing,
    LEAST of D_F (pretraining that harms too), or of a loss above that of the shortest run from scratch.
    """
    finetune = np.asarray(finetune_tokens, float)
    tokens, side = curve.tokens_at(loss)
    moved = tokens - finetune
    least = LEAST * finetune
    nothing = (side <= 0) & (moved < least)
    bound = np.where(side > 0, np.maximum(moved, 1.0), moved)
    return np.where(nothing, least, bound), np.where(nothing, -1, side)


def fit_transfer(finetune_tokens, n, transferred, side, cluster=None) -> CensoredFit:
    """log D_T = log_k + alpha log D_F + beta log N, censored points in; logs are measured from no centre."""
    finetune, n = np.asarray(finetune_tokens, float), np.asarray(n, float)
    columns = {"log_k": np.ones(len(n)), "alpha": np.log(finetune), "beta": np.log(n)}
    return fit_censored(columns, transferred, side, cluster)
