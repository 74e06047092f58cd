"""Does the best learning rate of a narrow model hold for a wide one (muP, 2203.03466), or does it move with width?

scaling sweep width_transfer && scaling tune runs/width_transfer

Depth and head width stay; heads grow with the width. Its two halves differ in the parametrisation alone; at
the least width they are the same model.

Cost: 1.586e12 FLOPs, 60 s on two CPU cores that did other work too, standard parametrisation alone. Result: it does not
hold: the best rate is 0.0202, 0.0128, 0.0082 at widths 16, 32, 64, as width to the -0.65. muP: not yet run.
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
