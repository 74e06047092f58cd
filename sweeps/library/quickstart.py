"""The main job, small: five sizes spanning 15x, four token counts spanning 8x, on 12 MB of presidential messages.

make quickstart        (or: scaling sweep quickstart && scaling report runs/quickstart)
"""

from models.config import ModelConfig
from scaling.run import RunConfig, ScheduleConfig
from sweeps.define import Sweep, grid
from sweeps.hyperparameters import PowerRule

# scaling sweep quickstart_tuning && scaling tune runs/quickstart_tuning
RULE = PowerRule(c=0.003101, p=-0.457, q=-0.513, batch_size=2, n_range=(6612, 2.573e4), d_range=(2.5e5, 1e6))

# The longer warm-up takes the scatter between seeds at D = 250k from 1.1 % to 0.4 % of the loss.
BASE = RunConfig(schedule=ScheduleConfig(warmup_tokens=102_400))


def model(d_model: int) -> ModelConfig:
    """One rung: depth and number of heads stay, so that the shape changes in width alone.

    Rotary base 100: of the usual 10,000, half the frequencies do not turn within 128 tokens.
    """
    return ModelConfig(d_model=d_model, n_layers=2, n_heads=2, rope_theta=100.0)


def sweep() -> Sweep:
    models = [model(d) for d in (12, 20, 28, 40, 60)]
    long = {"model": models, "tokens": [1_000_000, 2_000_000]}
    short = {"model": models, "tokens": [250_000, 500_000], "seed": [0, 1]}  # cheap, and the seed matters more
    runs = grid(short, base=BASE, rule=RULE) + grid(long, base=BASE, rule=RULE)
    return Sweep(runs, holdout=f"flops > {max(run.flops for run in runs) / 4!r}")
