"""Approach 3 of Hoffmann et al. (2203.15556): a grid over N and D for the parametric fit E + A N^-alpha + B D^-beta.

scaling sweep chinchilla_3 && scaling fit runs/chinchilla_3 --law chinchilla --out fit.json
scaling allocate fit.json --flops 1e12      (`scaling compare runs/chinchilla_3` sets other laws beside it)

Cost: 1.890e12 FLOPs of 3.016e12, 36 s on two CPU cores after --dry-run (51 s with --no-sharing). Result: alpha 0.822
[0.547, 1.111], beta 0.491 [0.096, 1.110], E not pinned down, scatter 2.24 %: at this size N and D interact, and the
additive form is the wrong one. In rolling validation it errs by 5.14 %, Kaplan's joint form by 1.27 %, the coupled law
by 1.35 %.
"""

from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons, models, tuned

N = (4.6e3, 8.4e3, 1.3e4, 2.7e4, 4.6e4)
D = (2.5e5, 5e5, 1e6, 2e6)


def sweep(dial: float = 1) -> Sweep:
    return Sweep(tuned(grid({"model": models(N, dial), "tokens": horizons(D, dial)}, base(dial))))
