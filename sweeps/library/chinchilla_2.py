"""Approach 2 of Hoffmann et al. (2203.15556): isoFLOP slices, each with its own best size.

scaling sweep chinchilla_2 && scaling fit runs/chinchilla_2 --out fit.json
scaling allocate fit.json --flops 1e12 --runs runs/chinchilla_2      (the paragraphs "isoflop")

Budgets are counted FLOPs. A slice keeps the sizes between 6 and 300 tokens per parameter, about its optimum.

Cost: 1.965e12 FLOPs of 3.045e12, 52 s on two CPU cores (after --dry-run). Result: all four slices accepted,
N* ~ C^a with a 0.557 [0.488, 0.628] by parabola, 0.616 [0.533, 0.730] by spline; the law of the same runs says 0.477
[0.416, 0.532] with C = 6ND.
"""

from scaling.config import RunConfig
from sweeps.define import Sweep, isoflop
from sweeps.library._family import base, models, tuned

C = (5e10, 8.5e10, 1.45e11, 2.5e11)
N = (4.6e3, 8.4e3, 1.3e4, 2e4, 2.7e4, 3.5e4, 4.6e4, 6.7e4, 9.6e4)


def near_the_optimum(config: RunConfig) -> bool:
    return 6 <= config.tokens / config.counts.n_compute <= 300


def sweep(dial: float = 1) -> Sweep:
    budgets = [budget * dial for budget in C]
    return Sweep(tuned(isoflop(budgets, {"model": models(N, dial)}, base(dial), keep=near_the_optimum)))
