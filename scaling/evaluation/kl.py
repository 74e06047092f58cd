"""KL divergence to another run, such as the parent: how far finetuning has moved the model."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import InputError
from scaling.evaluation import Evaluation, Row
from scaling.evaluation._rows import subset_of, validation_rows
from scaling.evaluation.answers import mean_row


@dataclass(frozen=True)
class Kl(Evaluation):
    """On the rows of a source both distributions of each next token are at hand, so a token's KL is exact and only the
    rows are a sample.
    """

    to: str = ""  #: id of a run beside this one; "": the parent
    source: str = ""  #: its spec; "": what the run was trained on
    subset: str = "all"  #: all targets, or those that a task names, as "answer"
    n: int = 1024  #: rows of the validation part

    SUMMARY = "KL(run || parent or another) of the next token, nats a token and nats a row, exact on given rows"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """kl: nats a token, over rows; kl_row: nats a row, the sum over its targets."""
        to = self.to or getattr(asker.model.config, "parent", "")
        if not to:
            raise InputError("to = '': this run has no parent; name the run to compare it with")
        from scaling.load import check_writes

        other = asker.beside(to)
        for model in (asker.model, other.model):
            check_writes(model)
        batch = validation_rows(asker.model.config, self.source, self.n)
        weight_BT = subset_of(batch, self.subset)
        kl_B = np.sum(asker.divergence(other, batch["tokens_BU"]) * weight_BT, axis=1, dtype=np.float64)
        counted_B = weight_BT.sum(axis=1)
        kept = counted_B > 0
        return [mean_row("kl", kl_B[kept] / counted_B[kept], to=to), mean_row("kl_row", kl_B, to=to)]
