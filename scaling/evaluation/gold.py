"""Gold: the true reward of what a policy writes, and how far it has moved from the run it started from."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.evaluation import Evaluation, Row
from scaling.evaluation._written import gold_task, written
from scaling.evaluation.answers import mean_row


@dataclass(frozen=True)
class Gold(Evaluation):
    to: str = ""  #: id of a run beside this one, to which KL is measured; "": the parent
    source: str = ""  #: spec of comparisons, whose true reward is gold; "": what this run was trained on
    M: int = 16_384  #: strings that are written

    SUMMARY = "true reward of what a policy writes, and its KL to the run it started from, nats a string"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """gold: over strings; kl: KL(run || parent), nats a string, the sum over positions of the exact KL of the next
        token after what the run wrote: unbiased, and less noisy than the log-ratio of the strings.
        """
        to = self.to or getattr(asker.model.config, "parent", "")
        if not to:
            raise InputError("to = '': this run has no parent; name the run to compare it with")
        task = gold_task(asker.model.config, self.source)
        tokens_BU = written(asker, "", self.M, task.length, seed)
        kl_B = asker.divergence(asker.beside(to), tokens_BU).sum(axis=1, dtype=np.float64)
        return [mean_row("gold", task.gold(tokens_BU[:, 1:])), mean_row("kl", kl_B, to=to)]
