"""Critical batch size: how large may a batch be before it stops saving steps?

scaling sweep critical_batch && python -m sweeps.library.critical_batch runs/critical_batch

At a target loss, steps(B) = S_min (1 + B_crit / B) (McCandlish et al. 1812.06162). Each batch size is trained to
several horizons, at a learning rate in the square root of the batch (Malladi et al. 2205.10287); the steps it needs for
a target are interpolated between them. Merrill et al. (2505.23971) branch one trunk into the batch sizes instead, which
measures the critical batch at that point of training; these are whole runs, so this is the one of all of training.

Cost: 1.617e12 FLOPs of 2.581e12, 45 s on two CPU cores (after --dry-run). Result: S_min 260 steps to a loss of
1.765, B_crit 1,606 tokens [1,147, 2,285]. Below that loss large batches do relatively better: at 2e6 tokens, batch 8
(1,024 tokens) has the lowest loss.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from models.errors import InputError
from scaling.exit_codes import BAD_INPUT, DONE
from sweeps.define import Sweep, grid, union
from sweeps.library._family import base, horizons, models, tuned

N = 1.3e4
D = (2.5e5, 5e5, 1e6, 2e6)
BATCH = (1, 2, 4, 8, 16, 32)


def sweep(dial: float = 1) -> Sweep:
    axes = {"model": models([N], dial), "tokens": horizons(D, dial)}
    parts = [tuned(grid(axes | {"batch_size": [B]}, base(dial)), scale=math.sqrt(B / 2)) for B in BATCH]
    return Sweep(union(*parts))


def steps_to(frame: pd.DataFrame, target: float) -> pd.DataFrame:
    """batch (tokens a step) and steps to the target loss, a row for each batch size whose horizons enclose it.

    Log D is interpolated in log loss between neighbouring horizons. frame: a table of runs of one size (sweeps.table).
    """
    rows = []
    for batch, runs in frame.groupby("batch_size"):
        runs = runs.sort_values("loss")
        if runs["loss"].iloc[0] <= target <= runs["loss"].iloc[-1]:
            D = np.exp(np.interp(math.log(target), np.log(runs["loss"]), np.log(runs["tokens"])))
            tokens_per_step = batch * runs["seq_len"].iloc[0]
            rows.append({"batch": tokens_per_step, "steps": D / tokens_per_step})
    return pd.DataFrame(rows, columns=["batch", "steps"])


def critical_batch(frame: pd.DataFrame, target: float | None = None) -> str:
    """S_min and B_crit with their intervals, as text. target: in nats; by default the middle of the losses that the
    horizons of every batch size enclose. Raises InputError where fewer than four batch sizes reach it.
    """
    from analysis.fitting.fit import fit
    from analysis.runs import read_runs
    from analysis.uncertainty.bootstrap import bootstrap

    done = frame[frame["status"] == "finished"]
    by_batch = done.groupby("batch_size")["loss"]
    target = target or math.sqrt(by_batch.min().max() * by_batch.max().min())
    steps = steps_to(done, target)
    if len(steps) < 4:
        raise InputError(f"target loss {target:.4f}: {len(steps)} batch sizes reach it, 4 needed; give another")
    # S_min (1 + B_crit / B) is the shifted power law b (1/x + g)^c at c = 1: S_min = b g, B_crit = 1/g.
    runs = read_runs(steps, inputs={"x": "batch"}, loss_column="steps")
    fitted = bootstrap(fit(runs, "shifted", fixed={"c": 1.0}), runs)
    low, high = fitted.intervals["g"]
    lines = [f"to a loss of {target:.4f} nats/token:", steps.to_string(index=False, float_format="%.0f")]
    lines.append(f"S_min = {fitted.params['b'] * fitted.params['g']:.4g} steps")
    lines.append(f"B_crit = {1 / fitted.params['g']:.4g} tokens, 90 % interval [{1 / high:.4g}, {1 / low:.4g}]")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    from sweeps.table import table

    try:
        if len(arguments) not in (1, 2):
            raise InputError("usage: python -m sweeps.library.critical_batch DIR [LOSS], of a sweep and a target")
        print(critical_batch(table(Path(arguments[0])), *map(float, arguments[1:])))
    except ValueError as error:  # the InputError of models and of analysis, and a loss that is no number
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
