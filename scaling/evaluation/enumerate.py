"""Enumerate: every answer of a small answer space, scored on a prefix tree, so that nothing is sampled."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.evaluation import Evaluation, Row
from scaling.evaluation._rows import task_of
from scaling.evaluation.answers import each_row, mean_row, pass_at_k

MOST = 2**16  # answers


@dataclass(frozen=True)
class Enumerate(Evaluation):
    source: str = ""  #: spec of a task; "": what the run was trained on
    n: int = 256  #: problems of the validation part
    k: tuple[int, ...] = (1,)  #: samples, of pass@k
    each: bool = False  #: also p of each problem, for what is to be resampled over problems

    SUMMARY = "all answers of a small answer space: exact success, greedy and majority limits, margin, pass@k"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """success: chance that one sample is right; mode: share of problems whose most probable answer is right, which
        is also the limit of majority voting; margin: log p of the best right answer less that of the best wrong one,
        nats; guess: success of a uniform choice among the answers; entropy of the answers, nats; pass@k.
        """
        if not self.k or min(self.k) < 1:
            raise InputError(f"k = {list(self.k)}: expected whole numbers of at least 1")
        task = task_of(asker.model.config, self.source)
        choices = getattr(task, "choices", None)
        if choices is None or np.prod([len(c) for c in choices], dtype=float) > MOST:
            raise InputError(f"source = {task.spec!r}: has no answer space of at most {MOST} answers to enumerate")
        answers_SM = np.stack([x.ravel() for x in np.meshgrid(*choices, indexing="ij")], axis=1)
        rows = []
        for problems, prompts, right_NS in groups(task, self.n, answers_SM):
            rows.append((problems, tree_logprobs(asker, prompts, choices), right_NS))
        problems, logprob_NS, right_NS = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        success_N = np.sum(np.exp(logprob_NS) * right_NS, axis=1)
        order = np.argsort(problems)
        each = each_row("p", success_N[order], problems[order]) if self.each else []
        return [*measured(logprob_NS, right_NS, self.k), *each]


def measured(logprob_NS: np.ndarray, right_NS: np.ndarray, k: tuple[int, ...]) -> list[Row]:
    """Of the log-probabilities of S answers to N problems, and which are right. What is left of the probability, that
    of strings that are no answer, is never right.
    """
    p_NS = np.exp(logprob_NS)
    success_N = np.sum(p_NS * right_NS, axis=1)
    best_right_N = np.max(np.where(right_NS, logprob_NS, -np.inf), axis=1)
    best_wrong_N = np.max(np.where(right_NS, -np.inf, logprob_NS), axis=1)
    return [
        mean_row("success", success_N),
        mean_row("mode", best_right_N > best_wrong_N),
        mean_row("margin", best_right_N - best_wrong_N),
        mean_row("guess", right_NS.mean(axis=1)),
        mean_row("entropy", -np.sum(np.where(p_NS > 0, p_NS * logprob_NS, 0), axis=1)),
        *pass_at_k(success_N, k),
    ]


def groups(task: Any, n: int, answers_SM: np.ndarray):
    """(numbers_N, prompts_NP, right_NS) of the first n problems, those of one prompt length together."""
    by_length: dict[int, list] = {}
    for index in range(n):
        example = task.example("valid", index)
        right_S = task.right(example, answers_SM)
        if not right_S.all():
            by_length.setdefault(len(example.prompt), []).append((index, example.prompt, right_S))
    for found in by_length.values():
        yield tuple(np.stack(parts) for parts in zip(*found, strict=True))


def tree_logprobs(asker: Any, prompts_NP: np.ndarray, choices: tuple[np.ndarray, ...]) -> np.ndarray:
    """logprob_NS of every answer, S in the order of the last symbol fastest: one pass a prefix, not one an answer."""
    N = len(prompts_NP)
    prefixes_NSP, logprob_NS = prompts_NP[:, None], np.zeros((N, 1))
    for symbols in choices:
        S, P = prefixes_NSP.shape[1:]
        next_NSV = asker.next(prefixes_NSP.reshape(N * S, P)).reshape(N, S, -1)
        logprob_NS = (logprob_NS[..., None] + next_NSV[..., symbols]).reshape(N, -1)
        with_symbol = np.broadcast_to(np.asarray(symbols)[:, None], (N, S, len(symbols), 1))
        prefixes = np.broadcast_to(prefixes_NSP[:, :, None], (N, S, len(symbols), P))
        prefixes_NSP = np.concatenate([prefixes, with_symbol], axis=3).reshape(N, -1, P + 1)
    return logprob_NS
