"""Loss against D at large N (Kaplan et al. 2001.08361, section 3.2): how far do tokens alone take it?

scaling sweep kaplan_d && scaling fit runs/kaplan_d --law saturating --input x=tokens

All horizons branch from one trunk.
Cost: not yet run.
"""

from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons, models, tuned

N = 6.7e4
D = (2.5e5, 3.54e5, 5e5, 7.07e5, 1e6, 1.41e6, 2e6)


def sweep(dial: float = 1) -> Sweep:
    return Sweep(tuned(grid({"model": models([N], dial), "tokens": horizons(D, dial)}, base(dial))))
