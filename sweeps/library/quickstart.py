"""The main job, small: five sizes spanning 15x, four token counts spanning 8x, on 12 MB of presidential messages.

make quickstart        (or: scaling sweep quickstart && scaling report runs/quickstart)

Cost: 4.495e12 FLOPs of 7.173e12 (the horizons of a size share a trunk), 70 s on two CPU cores. Result: five runs held
out, the coupled law chosen, mean error 1.69 %, all five in their 90 % intervals. With a rate of its own for each
horizon (rule=TUNED) nothing is shared, and the mean error is 1.07 %.
"""

from models.config import ModelConfig
from scaling.config import RunConfig, ScheduleConfig
from sweeps.define import Sweep, grid
from sweeps.hyperparameters import PowerRule

# scaling sweep quickstart_tuning && scaling tune runs/quickstart_tuning
TUNED = PowerRule(c=0.003012, p=-0.447, q=-0.666, batch_size=2, n_range=(8376, 3.5e4), d_range=(2.5e5, 2e6))
# One rate a size, that of the longest horizon, whose run is the trunk: the shorter horizons then branch from it.
RULE = TUNED.at(2e6)

# A long warm-up: at D = 250k the loss scatters less between seeds than with a short one.
BASE = RunConfig(schedule=ScheduleConfig(warmup_tokens=102_400))


def model(d_model: int) -> ModelConfig:
    """One rung: depth and number of heads stay, so that the shape changes in width alone.

    Rotary base 100: of the usual 10,000, half the frequencies do not turn within 128 tokens.
    """
    return ModelConfig(d_model=d_model, n_layers=3, n_heads=2, rope_theta=100.0)


def sweep() -> Sweep:
    axes = {
        "model": [model(d) for d in (12, 20, 28, 40, 56)],
        "tokens": [250_000, 500_000, 1_000_000, 2_000_000],
    }
    runs = grid(axes, base=BASE, rule=RULE)
    return Sweep(runs, holdout=f"flops > {max(run.flops for run in runs) / 4!r}")
