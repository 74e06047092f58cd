"""What a law of the loss curve says: predicted against measured, as a table, as text, as a figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.curves.curve import LossCurve
from analysis.curves.fit import CurveFit, window
from analysis.text import figure_text, text_table


def evaluate(fit: CurveFit, curves: Sequence[LossCurve]) -> pd.DataFrame:
    """Predicted against measured, a row a curve; errors are relative, predicted / measured - 1.

    `final` is the mean of the last points logged, 2 % of them and at least 5, `predicted` the mean of the predictions
    at the same points with its 90 % interval; `last` is the single last point. Mean and max error are over all points
    from the end of the warm-up on. `fitted` says whether the fit saw a curve of that name.
    """
    rows = []
    for curve in curves:
        c = curve.take(curve.step >= curve.warmup)
        n = window(c)
        predicted, low, high = fit.final_loss(c.lr, c.step[-n:])
        final = float(c.loss[-n:].mean())
        errors = fit.predict(c.lr, c.step) / c.loss - 1
        rows.append(
            {
                "name": c.name,
                "fitted": any(c.name == seen["name"] for seen in fit.curves),
                "final": final,
                "predicted": predicted,
                "low": low,
                "high": high,
                "error": predicted / final - 1,
                "last": float(c.loss[-1]),
                "last_error": float(errors[-1]),
                "mean_error": float(np.abs(errors).mean()),
                "max_error": float(np.abs(errors).max()),
            }
        )
    return pd.DataFrame(rows)


def curves_report(fit: CurveFit, table: pd.DataFrame) -> str:
    """The fit's summary and a line for each curve of `evaluate`, those held out last."""
    lines = [fit.summary(), ""]
    for fitted, title in ((True, "fitted"), (False, "held out")):
        part = table[table["fitted"] == fitted]
        if not len(part):
            continue
        rows = [["curve", "measured", "predicted", "90 % interval", "error", "curve mean", "max"]]
        for r in part.to_dict("records"):
            losses = [f"{r['final']:.4f}", f"{r['predicted']:.4f}", f"[{r['low']:.4f}, {r['high']:.4f}]"]
            errors = [f"{100 * r['error']:+.2f} %", f"{100 * r['mean_error']:.2f} %", f"{100 * r['max_error']:.2f} %"]
            rows.append([r["name"], *losses, *errors])
        lines += [
            f"final loss, {title} (nats per token; mean of the last points logged)",
            text_table(rows, left=1, indent=2),
        ]
        inside = ((part["final"] >= part["low"]) & (part["final"] <= part["high"])).sum()
        e = 100 * part["error"].abs()
        lines += [
            f"  error of the final loss: median {e.median():.2f} %, worst {e.max():.2f} %; "
            f"{inside} of {len(part)} inside their interval",
            "",
        ]
    return "\n".join(lines).rstrip()


def figure_curves(fit: CurveFit, curves: Sequence[LossCurve]) -> Figure:
    """Measured points and predicted lines after the warm-up; dashed where the fit did not see the curve."""
    figure = Figure(figsize=(6.8, 4.4), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    seen = {c["name"] for c in fit.curves}
    for i, curve in enumerate(curves):
        c = curve.take(curve.step >= curve.warmup)
        c = c.binned(200) if len(c.step) > 200 else c
        axes.plot(c.step, c.loss, ".", ms=2.5, color=f"C{i % 10}", alpha=0.5)
        style = "-" if c.name in seen else "--"
        axes.plot(c.step, fit.predict(c.lr, c.step), style, lw=1.3, color=f"C{i % 10}", label=figure_text(c.name))
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", yscale="log")
    axes.set_title(f"Loss curves, {fit.law} law (dashed: held out)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
