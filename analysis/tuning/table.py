"""A table of tuning runs from anywhere, under the names that the checks use."""

from __future__ import annotations

import pandas as pd

from analysis.errors import InputError
from analysis.runs import D_NAMES, N_NAMES, column_for
from analysis.tables import check_positive, named_once, numbers

LR_NAMES = ("lr", "learningrate", "peaklr", "maxlr")
BATCH_NAMES = ("batchsize", "batch", "bs")


def tuning_table(
    frame: pd.DataFrame,
    n_column: str | None = None,
    d_column: str | None = None,
    loss_column: str = "loss",
    lr_column: str | None = None,
    batch_column: str | None = None,
) -> pd.DataFrame:
    """The frame with n_compute, tokens, loss, lr and batch_size as numbers, status, run and parametrization as text.

    Columns are found by the usual names where they are not given. Without `status` all runs count as finished; without
    a batch all have one; those that are not finished need no loss. Raises InputError.
    """
    frame = named_once(frame.reset_index(drop=True))
    if not len(frame):
        raise InputError("the table of runs is empty: no rows")
    named = {
        "n_compute": column_for(frame, n_column, "N", "--n-column", ("n_compute",), N_NAMES),
        "tokens": column_for(frame, d_column, "D", "--d-column", ("tokens", "D"), D_NAMES),
        "loss": column_for(frame, loss_column, "the loss", "--loss-column", (), ()),
        "lr": column_for(frame, lr_column, "the learning rate", "--lr-column", ("lr",), LR_NAMES),
        "batch_size": column_for(
            frame, batch_column, "the batch", "--batch-column", ("batch_size",), BATCH_NAMES, required=False
        ),
    }
    columns = {name: numbers(frame, column) for name, column in named.items() if column}
    text = {"status": "finished", "parametrization": "", "run": None}
    for name, default in text.items():
        if name in frame.columns:
            columns[name] = frame[name].astype("string").str.strip().fillna("").to_numpy(object)
        else:
            columns[name] = [f"row {i}" for i in range(len(frame))] if default is None else default
    made = frame.assign(**({"batch_size": 1} | columns))
    made["status"] = made["status"].str.lower()
    done = (made["status"] == "finished").to_numpy()
    for name, column in named.items():
        if column:
            check_positive(frame[done], columns[name][done], column, name)
    return made
