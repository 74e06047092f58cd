"""Approach 1 of Hoffmann et al. (2203.15556): the lower envelope of the training curves, whatever the law.

scaling sweep chinchilla_1 && scaling fit runs/chinchilla_1 --out fit.json
scaling allocate fit.json --flops 1e12 --runs runs/chinchilla_1      (the paragraph "envelope")

A size's curve is read at horizons that were each cooled down: along the trunk itself the loss still holds the noise of
its learning rate. Hoffmann et al. trained each size under four cosine lengths for the same reason.

Cost: 3.163e12 FLOPs of 5.702e12, 67 s on two CPU cores (after --dry-run). Result: N* ~ C^a with a 0.477 [0.238,
0.712], four of five bins accepted; by the law chosen for the same runs (Kaplan's joint form) 0.476 [0.446, 0.505].
"""

from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons, models, tuned

N = (4.6e3, 8.4e3, 1.3e4, 2e4, 2.7e4, 4.6e4, 6.7e4)
D = (2.5e5, 4.2e5, 7.07e5, 1.19e6, 2e6)
C = 8e11  # the most expensive corner is left out: nothing of its cost is there to compare with


def sweep(dial: float = 1) -> Sweep:
    axes = {"model": models(N, dial), "tokens": horizons(D, dial)}
    return Sweep(tuned(grid(axes, base(dial), keep=lambda run: run.flops <= C * dial)))
