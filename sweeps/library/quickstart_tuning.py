"""Tunes learning rate and batch for the quickstart, on runs cheaper than any it holds out.

scaling sweep quickstart_tuning && scaling tune runs/quickstart_tuning
"""

from sweeps.define import Sweep, grid
from sweeps.library.quickstart import BASE, model


def sweep() -> Sweep:
    return Sweep(
        grid(
            {
                "model": [model(12), model(28)],
                "tokens": [250_000, 1_000_000],
                "batch_size": [2, 4],
                "optim.lr": [0.003, 0.006, 0.012, 0.024, 0.048],
            },
            base=BASE,
        )
    )
