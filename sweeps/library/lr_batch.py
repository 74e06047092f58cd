"""Learning rate x batch on small sizes: where is the optimum, how does it move with N and D, how flat is it?

scaling sweep lr_batch && scaling tune runs/lr_batch

Cost: 2.312e12 FLOPs of 2.890e12, 78 s on two CPU cores (after --dry-run). Result: batch 2 is best in all four
cells, by 0.4 to 1.8 %; every optimum lies inside the grid; lr = 0.00105 (N/1e5)^-0.829 (D/1e6)^-0.827, the optima
within x1.12 of it.
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
