"""Epochs over limited data (Muennighoff et al. 2305.16264): what is a token worth that was seen before?

scaling sweep data_constrained && scaling fit runs/data_constrained --law data_constrained --input U=unique_tokens

Each run may see only `data.unique_tokens` of the corpus, a random choice of its windows, and goes over them up to 16
times. Horizons over the same tokens share a trunk.

Cost: 2.643e12 FLOPs of 4.153e12, 52 s on two CPU cores (after --dry-run). Result: repeats are nearly as good as
new text. At 27,120 parameters, 2e6 tokens and one learning rate, 8 and 16 epochs give 1.467 and 1.486 nats; without
repeats chinchilla_3 gives 1.462. R_D 44 [14, 1e4 (its bound)] and R_N 9.2 [1.0, 1e4] say only that: these runs do not
pin them down.
"""

from sweeps.define import Sweep, grid, union
from sweeps.library._family import base, horizons, models, tuned

N = (4.6e3, 1.3e4, 2.7e4)
D = (2.5e5, 5e5, 1e6, 2e6)
U = (1.25e5, 2.5e5, 5e5)


def sweep(dial: float = 1) -> Sweep:
    parts = []
    for unique in horizons(U, dial):
        tokens = [d for d in horizons(D, dial) if d >= unique]
        axes = {"model": models(N, dial), "tokens": tokens, "data.unique_tokens": [unique], "data.repeat": [True]}
        parts.append(tuned(grid(axes, base(dial))))
    return Sweep(union(*parts))
