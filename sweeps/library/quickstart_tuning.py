"""Tunes learning rate and batch for the quickstart, on runs cheaper than any it holds out.

scaling sweep quickstart_tuning && scaling tune runs/quickstart_tuning

Cost: 5.351e12 FLOPs, about four minutes on two CPU cores (--dry-run). Result: batch 2, and the rule in quickstart.py.
"""

from sweeps.define import Sweep, grid
from sweeps.library.quickstart import BASE, model


def sweep() -> Sweep:
    rates = [0.003, 0.006, 0.012, 0.024, 0.048]
    small, large = model(12), model(28)
    batches = {"model": [small, large], "tokens": [250_000, 1_000_000], "batch_size": [2, 4], "optim.lr": rates}
    horizons = {"model": [small], "tokens": [500_000, 2_000_000], "batch_size": [2], "optim.lr": rates}
    return Sweep(grid(batches, base=BASE) + grid(horizons, base=BASE))
