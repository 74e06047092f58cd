"""Tunes learning rate and batch on models smaller than any the quickstart holds out.

scaling sweep quickstart_tuning && scaling tune runs/quickstart_tuning
"""

from models.config import ModelConfig
from scaling.run import RunConfig
from sweeps.define import Sweep, grid


def sweep() -> Sweep:
    models = [ModelConfig(d_model=d, n_heads=d // 16, n_layers=3) for d in (16, 32)]
    return Sweep(
        grid(
            {
                "model": models,
                "tokens": [250_000, 500_000, 1_000_000],
                "batch_size": [4, 8, 16],
                "optim.lr": [0.01, 0.02, 0.04],
            },
            base=RunConfig(),
        )
    )
