"""Samples: answers that are generated and verified, for tasks whose right answers cannot be enumerated."""

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.evaluation import Evaluation, Row
from scaling.evaluation._rows import task_of
from scaling.evaluation.answers import each_row, mean_row, share_row


@dataclass(frozen=True)
class Samples(Evaluation):
    source: str = ""  #: spec of a task; "": what the run was trained on
    n: int = 256  #: problems of the validation part
    samples: int = 16  #: of each problem
    k: tuple[int, ...] = (1,)  #: of pass@k, each at most `samples`
    temperature: float = 1.0
    max_tokens: int = 0  #: of an answer; 0: as long as the right one
    each: bool = False  #: also how many samples of each problem are right, to be resampled over problems

    SUMMARY = "answers sampled and verified: accuracy with its binomial error, pass@k by the unbiased estimator"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """accuracy: of the first sample of each problem; pass@k: Chen et al. (2107.03374, equation 1); score: the mean
        of what the verifier gives, which counts as right from 1 on.
        """
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise InputError(f"k = {list(self.k)}: expected whole numbers from 1 to samples = {self.samples}")
        task = task_of(asker.model.config, self.source)
        n = self.n if task.n_valid is None else min(self.n, task.n_valid)
        examples = [task.example("valid", index) for index in range(n)]
        longest = self.max_tokens or max(len(example.answer) for example in examples)
        prompts = [np.asarray(example.prompt) for example in examples]
        texts_NS = asker.sampled(prompts, self.samples, longest, seed, self.temperature)
        score_NS = np.array(
            [[self.score(task, e, text) for text in texts] for e, texts in zip(examples, texts_NS, strict=True)]
        )
        right_NS = score_NS >= 1
        rows = [
            share_row("accuracy", right_NS[:, 0]),
            mean_row("score", score_NS.mean(axis=1)),
        ]
        right_N = right_NS.sum(axis=1)
        rows += each_row("right", right_N, range(n), self.samples) if self.each else []
        found = {k: [unbiased(self.samples, int(c), k) for c in right_N] for k in self.k}
        return [*rows, *(share_row("pass@k", values, k=k) for k, values in found.items())]

    def score(self, task: Any, example: Any, text: np.ndarray) -> float:
        """Of what was written, as far as the right answer is long: problems of several lengths are written together."""
        return verified(task, example, text if self.max_tokens else text[: len(example.answer)])


def unbiased(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def verified(task: Any, example: Any, answer: np.ndarray) -> float:
    """The verifier's score. Raises InputError, naming the task, where it raises or gives no number."""
    try:
        score = float(task.verify(example.prompt, answer))
    except Exception as error:
        raise InputError(f"source = {task.spec!r}: its verifier failed ({type(error).__name__}: {error})") from error
    if not np.isfinite(score):
        raise InputError(f"source = {task.spec!r}: its verifier gave {score}, expected a number")
    return score
