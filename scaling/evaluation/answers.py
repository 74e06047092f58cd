"""Answers: how probable the model finds the one right answer, by teacher forcing, without sampling noise."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.evaluation import Evaluation, Row, row
from scaling.evaluation._rows import answers_of, subset_of, validation_rows

BINS = 10  # of the calibration


@dataclass(frozen=True)
class Answers(Evaluation):
    """Where the answer (or the trace that leads to it) is unique, exp of its log-probability is the chance that one
    sample at temperature 1 is right, so that pass@k = mean(1 - (1 - p)^k) is exact for any k.
    """

    source: str = ""  #: its spec; "": what the run was trained on
    n: int = 1024  #: rows of the validation part
    k: tuple[int, ...] = (1,)  #: samples, of pass@k
    each: bool = False  #: also p of each answer, for what is to be resampled over problems

    SUMMARY = "log-probability of the right answer by teacher forcing: pass@k exact for any k, accuracy, calibration"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """answer_logprob and margin in nats; accuracy: of a greedy reader; pass@k; calibration error of the greedy
        token's own probability where it answers; with `each` p, a row a problem.
        """
        if not self.k or min(self.k) < 1:
            raise InputError(f"k = {list(self.k)}: expected whole numbers of at least 1")
        batch = validation_rows(asker.model.config, self.source, self.n)
        if "answer_BT" not in batch:
            raise InputError("source: a text without questions; name a task as --option source=..., such as facts:")
        answer_BT = subset_of(batch, "answer")
        logprob_BT, margin_BT = asker.targets(batch["tokens_BU"])
        _, which = answers_of(answer_BT)
        logprob = np.bincount(which, logprob_BT[answer_BT].astype(np.float64))
        margin = np.full(len(logprob), np.inf)
        np.minimum.at(margin, which, margin_BT[answer_BT])
        right = margin > 0
        rows = [
            mean_row("answer_logprob", logprob),
            mean_row("margin", margin),
            share_row("accuracy", right),
            *pass_at_k(np.exp(logprob), self.k),
        ]
        margin = margin_BT[answer_BT]
        greedy = np.exp(logprob_BT[answer_BT] - np.minimum(margin, 0))  # the probability of the most probable token
        each = each_row("p", np.exp(logprob), range(len(logprob))) if self.each else []
        return [*rows, calibration_row(greedy, margin > 0), *each]


def mean_row(metric: str, values: np.ndarray, **axes: float | str) -> Row:
    """The mean, with the standard error between values."""
    values = np.asarray(values, np.float64)
    return row(metric, values.mean(), values.std() / np.sqrt(max(1, len(values) - 1)), len(values), **axes)


def share_row(metric: str, values: np.ndarray, **axes: float | str) -> Row:
    """The mean of values from 0 to 1, such as whether each answer is right. Where all are 0, or all 1, its noise is not
    0, but that of the share (k + 1)/(n + 2) of k right in n.
    """
    found, n = mean_row(metric, values, **axes), len(values)
    if found["value"] in (0, 1):
        found["stderr"] = float(np.sqrt((n + 1) / n) / (n + 2))
    return found


def each_row(metric: str, values: Iterable[float], problems: Iterable[int], n: int = 1) -> list[Row]:
    """A row a problem, with its number on the axis `problem`."""
    return [row(metric, value, 0.0, n, problem=int(i)) for i, value in zip(problems, values, strict=True)]


def pass_at_k(p: np.ndarray, k: tuple[int, ...]) -> list[Row]:
    """Share of the problems of which one of k samples is right, each being right with its own p."""
    p = np.clip(np.asarray(p, np.float64), 0.0, 1.0)
    with np.errstate(divide="ignore"):
        return [mean_row("pass@k", -np.expm1(n * np.log1p(-p)), k=n) for n in k]


def calibration_row(confidence: np.ndarray, right: np.ndarray) -> Row:
    """Expected calibration error (Guo et al., 1706.04599, equation 3): the mean, over BINS bins of equal width and
    weighted by their counts, of |share right - mean confidence|. Its standard error is that of the shares.
    """
    n = len(right)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count, hits, total = (np.bincount(bins, w, BINS) for w in (None, right.astype(float), confidence))
    share = hits / np.maximum(count, 1)
    error = np.sum(np.abs(hits - total)) / n
    return row("calibration_error", error, np.sqrt(np.sum(count * share * (1 - share))) / n, n)
