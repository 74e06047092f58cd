"""Public runs replayed: the expensive ones predicted from the cheap ones, nothing chosen by looking at the former.

    python -m analysis.replay

prints the tables of docs/analysis.md. The runs lie in the folder that SCALING_PUBLIC_DATA names.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.bench import chinchilla_runs, public
from analysis.curves.curve import read_curve
from analysis.curves.fit import fit_curves
from analysis.curves.report import evaluate
from analysis.fitting.fit import fit
from analysis.fitting.target import fit_for_target
from analysis.runs import Runs, read_runs
from analysis.uncertainty.bootstrap import bootstrap
from analysis.uncertainty.predict import predict_runs

FITTED_CURVES = ("cosine_24000", "constant_24000", "wsdcon_9")


def farseer_episode(j: int, factor: float = 12.0) -> Runs:
    """Episode j: held out are the runs within 4x of the largest compute / 4^j, fitted those `factor` x below."""
    frame = pd.concat([pd.read_parquet(public() / f"farseer/{part}.parquet") for part in ("train", "test")])
    flops = 6 * frame["N"] * frame["D"]
    top = flops.max() / 4**j
    target, pool = (flops <= top * (1 + 1e-6)) & (flops >= top / 4), flops <= top / factor
    return read_runs(frame[target | pool], holdout=f"C > {top / factor * (1 + 1e-9):.17g}")


def predict_costlier(name: str, runs: Runs) -> dict:
    """Relative errors of the held-out runs: a fit for the target, and Chinchilla's law fitted plainly."""
    held = runs.take(runs.holdout)
    target = 10 ** float(np.log10(6 * held.n * held.d).mean())
    aimed = fit_for_target(runs, target)
    error = np.abs(aimed.fit.predict(held.n, held.d) / held.loss - 1)
    plain = np.abs(fit(runs, "chinchilla", 1e-3).predict(held.n, held.d) / held.loss - 1)
    inside = predict_runs(bootstrap(aimed.fit, runs, 400), held).inside(held.loss)
    return {
        "runs": name,
        "fitted": len(runs.fitted),
        "held out": len(held),
        "law": aimed.fit.law,
        "kappa": aimed.kappa,
        "mean error %": 100 * float(error.mean()),
        "worst %": 100 * float(error.max()),
        "in 90 % interval": float(inside.mean()),
        "plain chinchilla %": 100 * float(plain.mean()),
    }


def curves_table() -> pd.DataFrame:
    """Final loss of every unseen schedule of the three public models, from three schedules fitted to each."""
    rows = []
    for size in ("25M", "100M", "400M"):
        files = sorted((public() / "lr_schedules" / size).glob("*.csv"))
        curves = [read_curve(path) for path in files]
        fitted = fit_curves([c for c in curves if c.name in FITTED_CURVES])
        table = evaluate(fitted, [c for c in curves if c.name not in FITTED_CURVES])
        rows.append(table.assign(model=size, law=fitted.law))
    return pd.concat(rows, ignore_index=True)


def main() -> None:
    episodes = [predict_costlier("chinchilla above 1e21", chinchilla_runs(holdout="C >= 1e21"))]
    episodes += [predict_costlier(f"farseer, episode {j + 1}", farseer_episode(j)) for j in range(5)]
    table = pd.DataFrame(episodes)
    print(table.to_string(index=False, float_format="%.3g"))
    print(f"farseer, mean over episodes: {table['mean error %'][1:].mean():.3f} %\n")
    curves = curves_table()
    curves["error %"] = 100 * curves["error"]
    print(curves.pivot_table(index="name", columns="model", values="error %").to_string(float_format="%+.2f"))
    error = curves["error"].abs()
    print(f"final loss of unseen schedules: median error {100 * error.median():.2f} %, worst {100 * error.max():.2f} %")


if __name__ == "__main__":
    main()
