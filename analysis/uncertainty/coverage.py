"""Do the 90 % intervals cover 90 %? Synthetic sweeps with a known truth, as in

    python -m analysis.uncertainty.coverage --sweeps 100
    python -m analysis.uncertainty.coverage --sweeps 200 --trunks

Each sweep is a grid of N (16x) by D (16x) with 0.3 to 0.5 % noise; runs above a quarter of the largest compute are held
out, and the rest is fitted by a law that is right, chosen by validation, or wrong.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from analysis.fitting.fit import fit
from analysis.forecast.allocate import allocate, optimal_n
from analysis.forecast.select import choose_law
from analysis.laws.forms import LAWS
from analysis.runs import Runs, read_runs
from analysis.uncertainty.bootstrap import bootstrap
from analysis.uncertainty.predict import predict, predict_runs

# Planted truths with losses from 2 down to 1.2 over 1e4 to 1.6e5 parameters and 5e5 to 8e6 tokens.
TRUTHS = {
    "chinchilla": {"E": 0.9, "A": 28.0, "B": 70.0, "alpha": 0.40, "beta": 0.36},
    "kaplan": {"E": 0.6, "N_c": 2e4, "D_c": 1.2e6, "alpha_N": 0.35, "alpha_D": 0.45},
    "coupled": {"E": 0.7, "A": 600.0, "B": 3e4, "alpha": 0.7, "beta": 0.8, "gamma": 0.45},
}
GRIDS = ((4, 4), (5, 5), (6, 5))


def sweep(truth: str, shape: tuple[int, int], rng, noise: float | None = None) -> Runs:
    """A sweep of shape (sizes, horizons) under the planted truth, its most expensive runs held out."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1.6e5, shape[0]), np.geomspace(5e5, 8e6, shape[1])))
    noise = rng.uniform(0.003, 0.005) if noise is None else noise
    loss = LAWS[truth].loss(TRUTHS[truth], n, d) * np.exp(noise * rng.standard_normal(n.size))
    frame = pd.DataFrame({"n_compute": n, "tokens": d, "flops": 6 * n * d, "loss": loss})
    return read_runs(frame, holdout=f"flops > {1.01 * frame['flops'].max() / 4:.6g}")


def measure(truth: str, shape: tuple[int, int], law: str, sweeps: int, draws: int = 200, seed: int = 0) -> dict:
    """Coverage, mean |error| and half width of the held-out predictions, and how often the true law was taken."""
    rng = np.random.default_rng([seed, *shape])
    inside, errors, widths, right = [], [], [], 0
    for i in range(sweeps):
        runs = sweep(truth, shape, rng)
        name, validation = law, None
        if law == "auto":
            name, scores = choose_law(runs)
            validation = scores[name].backtest
        drawn = bootstrap(fit(runs, name), runs, draws, seed=i, validation=validation)
        held = runs.take(runs.holdout)
        p = predict_runs(drawn, held)
        inside.append(np.mean(p.inside(held.loss)))
        errors.append(np.mean(np.abs(p.value / held.loss - 1)))
        widths.append(np.mean((p.high - p.low) / (2 * p.value)))
        right += name == truth
    return {
        "truth": truth,
        "law": law,
        "fitted": int((~runs.holdout).sum()),
        "held out": int(runs.holdout.sum()),
        "coverage": float(np.mean(inside)),
        "mean error %": 100 * float(np.mean(errors)),
        "half width %": 100 * float(np.median(widths)),
        "true law taken": right / sweeps,
    }


def trunk_sweep(truth: str, rng, noise: float = 0.004) -> pd.DataFrame:
    """24 trunks (sizes) of 5 horizons, half of each run's noise variance shared within its trunk."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 3e5, 24), np.geomspace(5e5, 8e6, 5), indexing="ij"))
    trunk = np.repeat(np.arange(24), 5)
    swing = np.sqrt(0.5) * (rng.standard_normal(24)[trunk] + rng.standard_normal(n.size))
    return pd.DataFrame(
        {"N": n, "D": d, "loss": LAWS[truth].loss(TRUTHS[truth], n, d) * np.exp(noise * swing), "trunk": trunk}
    )


def measure_trunks(truth: str, law: str, sweeps: int, draws: int = 200) -> dict:
    """Coverage of 90 % intervals under trunk noise: parameters, N* and one run's loss at 10x the compute."""
    frame = trunk_sweep(truth, np.random.default_rng(0))
    flops = 10 * float((6 * frame["N"] * frame["D"]).max())
    exact = read_runs(frame.assign(loss=LAWS[truth].loss(TRUTHS[truth], frame["N"], frame["D"])))
    n_true = float(optimal_n(fit(exact, truth), flops))
    at = (n_true, flops / 6 / n_true)
    inside: dict[str, list] = {"parameters": [], "N*": [], "prediction": []}
    for i in range(sweeps):
        rng = np.random.default_rng([1, i])
        runs = read_runs(trunk_sweep(truth, rng))
        drawn = bootstrap(fit(runs, law, 1e-3), runs, draws, seed=i)
        if law == truth:
            spans = drawn.intervals
            inside["parameters"] += [spans[k][0] <= v <= spans[k][1] for k, v in TRUTHS[law].items()]
            low, high = allocate(drawn, flops).intervals["n"]
            inside["N*"].append(low <= n_true <= high)
        measured = float(LAWS[truth].loss(TRUTHS[truth], *at)) * np.exp(0.004 * rng.standard_normal())
        inside["prediction"].append(bool(predict(drawn, *at).inside(measured)))
    return {"truth": truth, "law": law} | {k: float(np.mean(v)) if v else np.nan for k, v in inside.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="coverage of 90 % intervals on synthetic sweeps")
    parser.add_argument("--sweeps", type=int, default=100, help="sweeps per row (default 100)")
    parser.add_argument("--trunks", action="store_true", help="sweeps whose noise is shared within trunks")
    args = parser.parse_args()
    if args.trunks:
        cases = (("chinchilla", "chinchilla"), ("coupled", "coupled"), ("coupled", "chinchilla"))
        rows = [measure_trunks(truth, law, args.sweeps) for truth, law in cases]
    else:
        rows = []
        for shape in GRIDS:
            for truth in TRUTHS:
                rows += [
                    measure(truth, shape, law, args.sweeps) for law in dict.fromkeys((truth, "auto", "chinchilla"))
                ]
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
