"""Loss: cross-entropy on a source or a part of it, in nats a token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.evaluation import Evaluation, Row, row
from scaling.evaluation._rows import subset_of, validation_rows


@dataclass(frozen=True)
class Loss(Evaluation):
    source: str = ""  #: its spec; "": what the run was trained on
    subset: str = "all"  #: all targets, or those that a task names, as "answer"
    n: int = 2048  #: rows of the validation part

    SUMMARY = "cross-entropy on a source, or on a subset of its targets, nats a token"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """loss; its standard error is between rows, as targets of one row are not independent."""
        batch = validation_rows(asker.model.config, self.source, self.n)
        weight_BT = subset_of(batch, self.subset)
        logprob_BT, _ = asker.targets(batch["tokens_BU"])
        loss_B = -np.sum(logprob_BT * weight_BT, axis=1, dtype=np.float64)
        counted_B = weight_BT.sum(axis=1)
        loss = loss_B.sum() / counted_B.sum()
        spread = np.sqrt(np.sum((loss_B - loss * counted_B) ** 2)) / counted_B.sum()
        return [row("loss", loss, spread, counted_B.sum(), subset=self.subset)]
