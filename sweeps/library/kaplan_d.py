"""Loss against D at large N (Kaplan et al. 2001.08361, section 3.2): how far do tokens alone take it?

scaling sweep kaplan_d && scaling fit runs/kaplan_d --law saturating --input x=tokens

All horizons branch from one trunk.

Cost: 1.405e12 FLOPs of 3.074e12, 22 s on two CPU cores (after --dry-run). Result: L = E + a D^-c with E 1.198
[1.158, 1.236] and c 0.678 [0.592, 0.783], scatter 0.26 %.
"""

from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons, models, tuned

N = 6.7e4
D = (2.5e5, 3.54e5, 5e5, 7.07e5, 1e6, 1.41e6, 2e6)


def sweep(dial: float = 1) -> Sweep:
    return Sweep(tuned(grid({"model": models([N], dial), "tokens": horizons(D, dial)}, base(dial))))
