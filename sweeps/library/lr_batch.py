"""Learning rate x batch on small sizes: where is the optimum, how does it move with N and D, how flat is it?

scaling sweep lr_batch && scaling tune runs/lr_batch

Cost: not yet run.
"""

from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons, models

N = (4.6e3, 1.3e4)
D = (2.5e5, 7.5e5)
LR = (0.003, 0.006, 0.012, 0.024, 0.048, 0.096)
BATCH = (1, 2, 4)


def sweep(dial: float = 1) -> Sweep:
    axes = {"model": models(N, dial), "tokens": horizons(D, dial), "batch_size": BATCH, "optim.lr": LR}
    return Sweep(grid(axes, base(dial)))
