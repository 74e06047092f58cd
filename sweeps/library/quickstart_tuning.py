"""Tunes learning rate and batch for the quickstart, on runs cheaper than any it holds out.

    scaling sweep quickstart_tuning && scaling tune runs/quickstart_tuning
"""

from scaling.run import RunConfig
from sweeps.define import Sweep, grid
from sweeps.library.quickstart import model


def sweep() -> Sweep:
    return Sweep(
        grid(
            {
                "model": [model(12), model(28)],
                "tokens": [250_000, 1_000_000],
                "batch_size": [2, 4],
                "optim.lr": [0.0025, 0.005, 0.01, 0.02, 0.04],
            },
            base=RunConfig(),
        )
    )
