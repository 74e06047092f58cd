"""Loss: cross-entropy on a source or a part of it, in nats a token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.evaluation import Evaluation, Row, row
from scaling.evaluation._rows import oracle_of, store_of, subset_of, validation_rows


@dataclass(frozen=True)
class Loss(Evaluation):
    source: str = ""  #: its spec; "": what the run was trained on
    subset: str = "all"  #: all targets, or those that a task names, as "answer"
    n: int = 2048  #: rows of the validation part

    SUMMARY = "cross-entropy on a source, or on a subset of its targets, nats a token"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """loss; excess: over who knows the task, on the same targets, so that the noise of the source drops out (with
        the entropy that a task's `exact` gives, entropy + excess is the loss without that noise). Standard errors are
        between rows, as targets of one row are not independent.
        """
        config = asker.model.config
        batch = validation_rows(config, self.source, self.n)
        weight_BT = subset_of(batch, self.subset)
        loss_BT = -asker.targets(batch["tokens_BU"])[0].astype(np.float64)
        rows = [ratio_row("loss", loss_BT, weight_BT, self.subset)]
        store = store_of(config, self.source)
        oracle_BT = None
        if getattr(store, "task", None):
            oracle_BT = oracle_of(store, len(loss_BT), config.data.seq_len)
        if oracle_BT is not None and np.isfinite(oracle_BT[weight_BT]).all():
            rows.append(ratio_row("excess", loss_BT - np.nan_to_num(oracle_BT), weight_BT, self.subset))
        return rows


def ratio_row(metric: str, value_BT: np.ndarray, weight_BT: np.ndarray, subset: str) -> Row:
    """The mean over the targets that count, with the standard error of a ratio between rows."""
    total_B, counted_B = np.sum(value_BT * weight_BT, axis=1), weight_BT.sum(axis=1)
    mean = total_B.sum() / counted_B.sum()
    stderr = np.sqrt(np.sum((total_B - mean * counted_B) ** 2)) / counted_B.sum()
    return row(metric, mean, stderr, counted_B.sum(), subset=subset)
