"""Does the best learning rate of a narrow model hold for a wide one (muP, 2203.03466), or does it move with width?

scaling sweep width_transfer && scaling tune runs/width_transfer

Depth and head width stay; heads grow with the width. The two halves differ in the parametrisation alone; at the least
width they are the same model.

Cost: 3.172e12 FLOPs, 72 s on two CPU cores (after --dry-run). Result: at widths 16, 32, 64 the standard best rate is
0.0202, 0.0128, 0.00825, as width to the -0.65; that of muP is 0.0202, 0.0201, 0.0177, to the -0.10. At their best the
losses are 1.933, 1.836, 1.790 and 1.933, 1.844, 1.773.
"""

import dataclasses

from models.config import ModelConfig
from sweeps.define import Sweep, grid
from sweeps.library._family import base, horizons

WIDTHS = (16, 32, 64)
HEAD = 8
D = 2e5
LR = (0.003, 0.006, 0.012, 0.024, 0.048)


def models(dial: float) -> list[ModelConfig]:
    widths = [max(1, round(d * dial**0.25 / HEAD)) * HEAD for d in WIDTHS]
    plain = [ModelConfig(d_model=d, n_layers=3, n_heads=d // HEAD, rope_theta=100.0) for d in widths]
    mup = {"parametrization": "mup", "base_width": widths[0], "base_head_dim": HEAD}
    return plain + [dataclasses.replace(model, **mup) for model in plain]


def sweep(dial: float = 1) -> Sweep:
    return Sweep(grid({"model": models(dial), "tokens": horizons([D], dial), "optim.lr": LR}, base(dial)))
