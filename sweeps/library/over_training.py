"""Over-training (Gadre et al. 2403.08540): ladders of fixed tokens per parameter M, far past the optimum of about 30.

scaling sweep over_training && scaling report runs/over_training --law over_training

The runs of the two largest M are held out: does the law fitted near the optimum still hold where small models are
trained long, because they are cheap to serve?

Cost: 9.494e11 FLOPs of 1.724e12, 25 s on two CPU cores (after --dry-run). Result: eta 0.204 [0.128, 0.312]; the
six held-out runs are predicted to 0.51 % on average, all in their 90 % intervals (Chinchilla 1.41 %, 3 of 6).
"""

from sweeps.define import Sweep, ladder
from sweeps.library._family import base, models, tuned

N = (4.6e3, 8.4e3, 1.3e4)
M = (40, 67, 113, 190, 320)


def sweep(dial: float = 1) -> Sweep:
    runs = tuned(ladder(M, {"model": models(N, dial)}, base(dial)))
    return Sweep(runs, holdout="D > 150 * N", law="over_training")
