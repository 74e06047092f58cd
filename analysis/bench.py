"""Speed and accuracy of the analysis on this machine: `scaling bench analysis`.

Public runs are read from the folder that SCALING_PUBLIC_DATA names (default ../shared/data beside the project); where
they are absent, the rows that need them say so. Times are medians of repeats on warm code, imports left out.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fitting.fit import fit
from analysis.fitting.problem import pose
from analysis.forecast.backtest import backtest
from analysis.forecast.select import choose_law
from analysis.laws.forms import LAWS, SINGLE
from analysis.laws.published import PUBLISHED
from analysis.runs import Runs, read_runs
from analysis.text import text_table
from analysis.uncertainty.bootstrap import bootstrap

# Lowest objectives known of the 42 fits, in the order of `fits()`: `python -m analysis.bench` looks for them from 800
# scattered starts a fit; two that a fit found lower by itself are kept.
# fmt: off
BEST_KNOWN = (
    0.000111778748164, 0.0010182740178, 0.000105447400246, 0.000954184500287, 8.90330614595e-05,
    0.000791486086626, 0.000192793859571, 0.00182601052307, 0.000176678358463, 0.00166348735318,
    0.00013997336732, 0.00129768722766, 9.06340175193e-05, 0.000814072667504, 8.8243822708e-05,
    0.000792208010071, 8.16205056002e-05, 0.000727608607687, 0.000265992253013, 0.00248841081134,
    7.38266809879e-05, 0.000582571519085, 5.37632586009e-05, 0.000388731865042, 0.000138769988444,
    0.00130133931081, 3.81146813465e-05, 0.000303318826072, 2.68425078464e-05, 0.000195019917105,
    0.000518732743381, 0.00492973257518, 0.000235604111866, 0.00210370020348, 0.00024747177005,
    0.00222425380114, 0.000851817435657, 0.00818064678745, 0.000612023184992, 0.00578828370171,
    0.000303436457901, 0.00271338112556,
)
# fmt: on

# Parameters of Muennighoff et al. 2023 that their fit of R_D and R_N held: logs of A, B, E, and alpha = beta.
_HELD = {"A": 6.255414, "B": 7.3049974, "E": 0.6254804}

# Besiroglu et al. 2024, arXiv 2404.10102: standard errors of their fit, from 4,000 bootstraps.
_STANDARD_ERRORS = {"A": 124.52, "B": 1293.28, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}


def public() -> Path:
    return Path(os.environ.get("SCALING_PUBLIC_DATA", Path(__file__).parents[1] / "../shared/data"))


def chinchilla_runs(where: str | None = "loss < 3.44", holdout: str | None = None) -> Runs:
    """The runs of Hoffmann et al. 2022 as Besiroglu et al. 2024 (arXiv 2404.10102) read them off figure 4."""
    path = public() / "chinchilla/runs.csv"
    return read_runs(path, n_column="Model Size", c_column="Training FLOP", where=where, holdout=holdout)


def bench() -> list[dict]:
    """A row per piece of work: name, seconds, value, what the value is."""
    rows = []
    for work in (chinchilla_fit, chinchilla_bootstrap, data_constrained, many_fits, many_curves):
        try:
            seconds, value, what = work()
        except InputError as error:
            seconds, value, what = None, None, f"not measured: {error}"
        rows.append({"name": work.__name__, "seconds": seconds, "value": value, "what": what})
    return rows


def bench_text(rows) -> str:
    lines = [["work", "what the value is", "seconds", "value"]]
    for row in rows:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.3f}"
        value = "-" if row["value"] is None else f"{row['value']:.13g}"
        lines.append([row["name"], row["what"], seconds, value])
    return text_table(lines)


def timed(work, repeats: int = 5):
    """(median seconds, last result)."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return float(np.median(times)), result


def chinchilla_fit():
    runs = chinchilla_runs()
    fit(runs, "chinchilla", 1e-3)  # compiles the law
    seconds, best = timed(lambda: fit(runs, "chinchilla", 1e-3), 15)
    return seconds, best.objective, "objective, sum of Huber 1e-3 over 240 runs (optimum 0.0010182740178)"


def chinchilla_bootstrap():
    runs = chinchilla_runs()
    fitted = fit(runs, "chinchilla", 1e-3)
    validation = backtest(pose(runs, "chinchilla", 1e-3))
    seconds, drawn = timed(lambda: bootstrap(fitted, runs, n=4000, validation=validation), 3)
    spread = {k: float(np.std(v)) for k, v in drawn.params_of(drawn.draws).items()}
    off = {k: spread[k] / _STANDARD_ERRORS[k] - 1 for k in spread}
    worst = max(off.values(), key=abs)
    each = ", ".join(f"{k} {100 * v:+.1f} %" for k, v in off.items())
    return seconds, float(worst), f"worst deviation of 4,000 bootstraps' standard errors from the published: {each}"


def data_constrained():
    runs = read_runs(public() / "data_constrained/runs.csv", inputs={"U": "unique_tokens"})
    fixed = {k: float(np.exp(v)) for k, v in _HELD.items()} | {"alpha": 0.3526596, "beta": 0.3526596}
    fit(runs, "data_constrained", 1e-3, fixed=fixed)
    seconds, fitted = timed(lambda: fit(runs, "data_constrained", 1e-3, fixed=fixed), 5)
    p, info = fitted.params, fitted.diagnostics
    what = f"objective at R_D* {p['R_D']:.2f}, R_N* {p['R_N']:.3f}"
    if info["second_best"] is not None:
        other = info["second_best_params"]
        what += f"; second basin {100 * info['second_best']:.2f} % higher at {other['R_D']:.2f}, {other['R_N']:.3f}"
    return seconds, fitted.objective, what


@cache
def tables() -> tuple[tuple[str, Runs], ...]:
    """Seven tables of 202 to 770 runs: public ones, and two planted."""
    farseer = pd.read_parquet(public() / "farseer/train.parquet") if public().exists() else None
    if farseer is None:
        raise InputError(f"{public()}: no public runs; set SCALING_PUBLIC_DATA to their folder")
    rng = np.random.default_rng(0)
    planted = []
    for law, rows in (("coupled", 600), ("farseer", 770)):
        n, d = 10 ** rng.uniform(7, 10, rows), 10 ** rng.uniform(9, 12, rows)
        truth = {"E": 1.7, "A": 3000.0, "B": 15000.0, "alpha": 0.45, "beta": 0.42, "gamma": 0.75}
        truth = truth if law == "coupled" else PUBLISHED["farseer"].params
        loss = LAWS[law].loss(truth, n, d) * np.exp(0.004 * rng.standard_t(4, rows))
        planted.append((f"planted {law}", read_runs(pd.DataFrame({"N": n, "D": d, "loss": loss}))))
    return (
        ("chinchilla 240", chinchilla_runs()),
        ("chinchilla 245", chinchilla_runs(None)),
        ("chinchilla below 1e21", chinchilla_runs(holdout="C >= 1e21")),
        ("farseer 404", read_runs(farseer)),
        ("farseer, every other", read_runs(farseer.iloc[::2])),
        *planted,
    )


def fits():
    """(table, law, delta) of the 42 fits: 7 tables, laws of 5, 6 and 9 parameters, delta 1e-4 and 1e-3."""
    for name, runs in tables():
        for law in ("chinchilla", "coupled", "farseer"):
            for delta in (1e-4, 1e-3):
                yield name, runs, law, delta


def many_fits():
    for law in ("chinchilla", "coupled", "farseer"):
        LAWS[law].compiled  # noqa: B018
    work = list(fits())
    began = time.perf_counter()
    reached = [fit(runs, law, delta).objective for _, runs, law, delta in work]
    seconds = time.perf_counter() - began
    above = [v / best - 1 for v, best in zip(reached, BEST_KNOWN, strict=True) if v > best * (1 + 1e-6)]
    what = f"of {len(work)} fits above the best known objective by more than 1e-6"
    if above:
        what += f", the worst by {100 * max(above):.3f} %"
    return seconds, float(len(above)), what


def learning_curves(count: int = 92, seed: int = 0):
    """(x, y, y without noise) of planted learning curves: four forms, 40 points, 0.5 % noise."""
    rng = np.random.default_rng(seed)
    x = np.geomspace(1e3, 1e7, 40)
    for i in range(count):
        law = ("saturating", "shifted", "m4", "broken1")[i % 4]
        c, floor = rng.uniform(0.15, 0.5), rng.uniform(0.05, 0.4)
        truth = {
            "saturating": {"E": floor, "a": 1e3**c, "c": c},
            "shifted": {"b": 1e3**c, "g": 10 ** rng.uniform(-8, -6), "c": c},
            "m4": {"E": floor, "R": 1.0, "a": rng.uniform(0.2, 1.5), "b": 2 * 1e3**c, "c": c},
            "broken1": {
                "a": floor,
                "b": 1e3**c,
                "c0": c,
                "d1": 10 ** rng.uniform(4, 5),
                "c1": rng.uniform(-0.1, 0.3),
                "f1": 0.3,
            },
        }[law]
        clean = LAWS[law].loss(truth, x)
        yield x, clean * np.exp(0.005 * rng.standard_normal(len(x))), clean


def many_curves():
    laws = {name: LAWS[name] for name in SINGLE}
    for law in laws.values():
        law.compiled  # noqa: B018
    curves = list(learning_curves())
    errors, began = [], time.perf_counter()
    for x, y, clean in curves:
        runs = read_runs(pd.DataFrame({"x": x, "loss": y}), inputs={"x": "x"}, holdout="x > 1e6")
        name, _ = choose_law(runs, laws)
        predicted = fit(runs, name, 1e-3).predict(x=x[-1])
        errors.append(abs(predicted / clean[-1] - 1))
    seconds = time.perf_counter() - began
    return (
        seconds,
        float(np.median(errors)),
        f"median error at 10x of {len(curves)} planted curves; mean {np.mean(errors):.4f}",
    )


def search_longer(starts: int = 800, seed: int = 1) -> list[float]:
    """The lowest objective of each of the 42 fits from many scattered starts: how BEST_KNOWN was found."""
    from analysis.fitting.optimise import minimise
    from analysis.fitting.search import _scatter, search

    lowest = []
    for name, runs, law, delta in fits():
        problem = pose(runs, law, delta)
        model, target, weights = problem.model, problem.target, problem.weights
        first = problem.law.starts(problem.observed, problem.inputs)
        minima, cost, _, _ = search(model, target, first, weights, "huber", delta)
        rng = np.random.default_rng(seed)
        best = cost[0]
        points = _scatter(model, target, minima[:8], weights, starts, rng)
        for steps in ((delta,), (10 * delta, delta)):
            u = points
            for step in steps:
                u, reached = minimise(model, target, u, weights, delta=step, iterations=300)
            best = min(best, np.nanmin(reached))
        lowest.append(float(best))
        print(f"{name}, {law}, {delta:g}: {cost[0]:.12g}, longer {best:.12g}", flush=True)
    return lowest


if __name__ == "__main__":
    print([float(f"{v:.12g}") for v in search_longer()])
