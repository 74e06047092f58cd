"""Loss against N at large D (Kaplan et al. 2001.08361, section 3.2): how far do parameters alone take it?

scaling sweep kaplan_n && scaling fit runs/kaplan_n --law saturating --input x=n_compute

Cost: 2.193e12 FLOPs, 41 s on two CPU cores (after --dry-run). Result: L = E + a N^-c with E 1.212 [1.119, 1.279]
and c 0.682 [0.550, 0.833], scatter 0.63 %.
"""

from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons, models, tuned

N = (4.6e3, 8.4e3, 1.3e4, 2e4, 3.5e4, 5.6e4)
D = 2e6  # 36 tokens per parameter at the largest size, 430 at the smallest


def sweep(dial: float = 1) -> Sweep:
    return Sweep(tuned(grid({"model": models(N, dial), "tokens": horizons([D], dial)}, base(dial))))
