"""Three figures of a fit: loss against compute, loss against tokens per N, predicted against measured.

Plain matplotlib Figures, drawn without pyplot, so nothing global is left behind. Filled markers were fitted, open ones
were held out; colour runs from small N (dark) to large N (light).
"""

from __future__ import annotations

import io
import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from analysis.fitting.result import LawFit
from analysis.forecast.allocate import optimal_n
from analysis.forecast.backtest import Backtest
from analysis.laws.forms import law_named
from analysis.runs import Runs
from analysis.text import figure_text
from analysis.uncertainty.predict import predict, predict_runs

_COLOURS = matplotlib.colormaps["viridis"].resampled(256)
_INK, _GRID = "#222222", "#e4e4e4"
_MOST_CURVES = 8
_MOST_POINTS = 3000


def figure_compute(runs: Runs, fit: LawFit) -> Figure:
    """Loss against C = 6ND, a curve per N, and the law's compute-optimal frontier."""
    figure, axes = _canvas(runs)
    colour = _colour_of(runs.n)
    compute = 6.0 * runs.n * runs.d
    for n in _curve_sizes(runs.n):
        d = np.geomspace(runs.d.min() / 1.3, runs.d.max() * 1.3, 100)
        axes.plot(6.0 * n * d, fit.predict(n, d), color=colour(n), lw=1.1, alpha=0.8, zorder=2)
    c = np.geomspace(compute.min() / 1.5, compute.max() * 1.5, 200)
    n_best = optimal_n(fit, c)
    axes.plot(c, fit.predict(n_best, c / (6.0 * n_best)), color=_INK, lw=1.8, ls=(0, (5, 2)), zorder=3)
    _points(axes, compute, runs.loss, runs, colour)
    axes.set(xlabel="training compute C = 6ND (FLOPs)", ylabel="loss (nats per token)")
    axes.set_title(f"Loss against compute, {fit.law} law", loc="left", fontsize=10)
    _log_axis(axes.xaxis, c.min(), c.max(), _power)
    _loss_axis(axes.yaxis, runs.loss)
    frontier = Line2D([], [], color=_INK, lw=1.8, ls=(0, (5, 2)), label="compute-optimal frontier")
    _legend(axes, runs, [frontier])
    return figure


def figure_tokens(runs: Runs, fit: LawFit) -> Figure:
    """Loss against D for each N, with the fitted curves."""
    figure, axes = _canvas(runs)
    colour = _colour_of(runs.n)
    d = np.geomspace(runs.d.min() / 1.3, runs.d.max() * 1.3, 200)
    for n in _curve_sizes(runs.n):
        axes.plot(d, fit.predict(n, d), color=colour(n), lw=1.3, zorder=2)
    _points(axes, runs.d, runs.loss, runs, colour)
    axes.set(xlabel="training tokens D", ylabel="loss (nats per token)")
    axes.set_title(f"Loss against tokens for each N, {fit.law} law", loc="left", fontsize=10)
    _log_axis(axes.xaxis, d.min(), d.max(), _count)
    _loss_axis(axes.yaxis, runs.loss)
    _legend(axes, runs, [Line2D([], [], color="#777777", lw=1.3, label="fitted law")])
    return figure


def figure_predicted(runs: Runs, fit: LawFit) -> Figure:
    """Predicted against measured loss with 90 % intervals on the held-out runs, and the errors below."""
    figure = Figure(figsize=(6.4, 5.6), dpi=110, layout="constrained", facecolor="white")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    colour = _colour_of(runs.n)
    predicted, held = fit.predict(**{name: runs.input(name) for name in law_named(fit.law).inputs}), runs.holdout
    span = [min(runs.loss.min(), predicted.min()) * 0.98, max(runs.loss.max(), predicted.max()) * 1.02]
    axes.plot(span, span, color="#999999", lw=1.0, zorder=1)
    below.axhline(0.0, color="#999999", lw=1.0, zorder=1)
    if held.any():
        bars = {"fmt": "none", "ecolor": "#555555", "elinewidth": 1.0, "capsize": 2.5, "zorder": 3}
        interval, p, m = predict_runs(fit, runs.take(held)), predicted[held], runs.loss[held]
        reach = np.stack([p - interval.low, interval.high - p])
        axes.errorbar(m, p, yerr=reach, **bars)
        below.errorbar(m, 100 * (p / m - 1), yerr=100 * reach / m, **bars)
    _points(axes, runs.loss, predicted, runs, colour)
    _points(below, runs.loss, 100.0 * (predicted / runs.loss - 1.0), runs, colour)
    for panel in (axes, below):
        _clean(panel)
    target = fit.metric.name
    axes.set(ylabel=f"predicted {target}", xscale="log", yscale="log", xlim=span, ylim=span)
    below.set(xlabel=f"measured {target}" + f" ({fit.unit})" * bool(fit.unit), ylabel="error (%)")
    below.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(f"Predicted against measured, {fit.law} law", loc="left", fontsize=10)
    _loss_axis(axes.yaxis, span)
    _loss_axis(axes.xaxis, span)
    _colourbar(figure, [axes, below], runs.n)
    _legend(axes, runs, [Line2D([], [], color="#999999", lw=1.0, label="equal")], loc="upper left")
    return figure


def figures_of(runs: Runs, fit: LawFit) -> dict[str, Figure]:
    """The figures of a fit by name: three of a law of the loss by N and D, one of another law. Of many runs, some."""
    if len(runs) > _MOST_POINTS:
        runs = runs.take(np.linspace(0, len(runs) - 1, _MOST_POINTS).round().astype(int))
    law = law_named(fit.law)
    if law.allocates:
        return {
            "compute": figure_compute(runs, fit),
            "tokens": figure_tokens(runs, fit),
            "predicted": figure_predicted(runs, fit),
        }
    return {"predicted": figure_predicted(runs, fit)} if len(law.inputs) > 1 else {"fit": figure_single(runs, fit)}


def figure_single(runs: Runs, fit: LawFit) -> Figure:
    """What was measured against the law's only input, with the fitted line and its 90 % interval."""
    figure = Figure(figsize=(6.8, 4.4), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    law = law_named(fit.law)
    x = runs.input(law.inputs[0])
    line = np.geomspace(x.min() / 1.2, x.max() * 1.2, 100)
    p = predict(fit, line)
    predicted, low, high = p.value, p.low, p.high
    axes.fill_between(line, low, high, color="#dddddd", lw=0, zorder=1)
    axes.plot(line, predicted, color=_INK, lw=1.4, zorder=2)
    axes.scatter(x[~runs.holdout], runs.loss[~runs.holdout], s=26, color=_COLOURS(0.3), zorder=4)
    held = runs.holdout
    axes.scatter(x[held], runs.loss[held], s=32, facecolors="white", edgecolors=_COLOURS(0.3), linewidths=1.5, zorder=5)
    _clean(axes)
    axes.set(xscale="log", xlabel=figure_text(runs.column_of(law.inputs[0])), ylabel=law.target)
    axes.set_title(f"{fit.law} law, 90 % interval of one run (open: held out)", loc="left", fontsize=10)
    return figure


def figure_backtest(result: Backtest) -> Figure:
    """Error of every prediction of a backtest against how far the law was extrapolated."""
    figure = Figure(figsize=(6.8, 4.4), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    error = 100 * np.expm1(result.error)
    axes.axhline(0.0, color="#999999", lw=1.0, zorder=1)
    axes.scatter(result.factor, error, s=14, c=result.cut, cmap=_COLOURS, edgecolors="none", alpha=0.8, zorder=3)
    _clean(axes)
    axes.set(xscale="log", xlabel="compute, over that of the most expensive fitted run", ylabel="error (%)")
    _log_axis(axes.xaxis, 1.0, 1.1 * result.factor.max(), lambda factor: f"{factor:g}x")
    axes.set_title(f"{result.law} law: predicted past each cut (dark: early cuts)", loc="left", fontsize=10)
    return figure


def figure_compare(table: pd.DataFrame, chosen: str) -> Figure:
    """Validation and held-out error of each law of `forecast.compare`, the chosen one in bold."""
    figure = Figure(figsize=(6.8, 0.9 + 0.4 * len(table)), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    labels = {"validation": "rolling origin, in the fitted part", "holdout": "held-out runs"}
    errors = {column: 100 * pd.to_numeric(table[column]).to_numpy(float) for column in labels}
    drawn = [column for column in labels if np.isfinite(errors[column]).any()]
    place, height = np.arange(len(table))[::-1], 0.7 / max(len(drawn), 1)
    for i, column in enumerate(drawn):
        at = place + height * ((len(drawn) - 1) / 2 - i)
        colour = _COLOURS(0.2 + 0.5 * i)
        axes.barh(at, np.nan_to_num(errors[column]), 0.95 * height, color=colour, label=labels[column], zorder=2)
    _clean(axes)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(place, table["law"])
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == chosen else "normal")
    axes.set(xlabel="mean absolute error (%)")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "scaling-laws", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _canvas(runs: Runs):
    figure = Figure(figsize=(6.8, 4.4), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    _clean(axes)
    _colourbar(figure, axes, runs.n)
    return figure, axes


def _clean(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#666666")
    axes.tick_params(colors=_INK, labelsize=8.5, which="both")
    axes.grid(True, color=_GRID, lw=0.7, zorder=0)
    axes.set_axisbelow(True)


def _norm(n):
    low, high = float(np.min(n)), float(np.max(n))
    # The lightest eighth of the map is hard to see on white, so the scale ends beyond the largest N.
    return LogNorm(low, low * max(high / low, 1.5) ** (1 / 0.88))


def _colour_of(n):
    norm = _norm(n)
    return lambda value: _COLOURS(norm(value))


def _colourbar(figure, axes, n):
    low, high = float(np.min(n)), float(np.max(n))
    bar = figure.colorbar(ScalarMappable(_norm(n), _COLOURS), ax=axes, pad=0.02, fraction=0.05, aspect=30)
    bar.ax.set_ylim(low, max(high, 1.5 * low))
    sizes = np.unique(n)
    ticks = sizes if len(sizes) <= _MOST_CURVES and _apart(sizes) else _ticks(low, high)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _count(v)))
    bar.ax.tick_params(labelsize=8.5)
    bar.outline.set_visible(False)
    bar.set_label("parameters N", fontsize=9)


def _apart(sizes) -> bool:
    steps = np.diff(np.log(sizes))
    return not len(steps) or steps.min() > 0.06 * max(steps.sum(), 1e-9)


def _curve_sizes(n):
    """The sizes that get a curve: all where they are few, else evenly spread over log N."""
    sizes = np.unique(n)
    return sizes if len(sizes) <= _MOST_CURVES else np.geomspace(sizes[0], sizes[-1], _MOST_CURVES)


def _points(axes, x, y, runs, colour):
    size = 30 if len(runs) <= 80 else 14
    colours = colour(runs.n)
    fitted, held = ~runs.holdout, runs.holdout
    axes.scatter(x[fitted], y[fitted], s=size, c=colours[fitted], edgecolors="white", linewidths=0.5, zorder=4)
    ring = {"facecolors": "white", "edgecolors": colours[held], "linewidths": 1.5}
    axes.scatter(x[held], y[held], s=size * 1.25, zorder=5, **ring)


def _legend(axes, runs, extra, loc="best"):
    marker = {"ls": "none", "marker": "o", "color": "#555555", "markersize": 5}
    handles = [Line2D([], [], label="fitted runs", **marker)]
    if runs.holdout.any():
        handles.append(Line2D([], [], label="held-out runs", markerfacecolor="white", markeredgewidth=1.4, **marker))
    axes.legend(handles=[*handles, *extra], frameon=False, fontsize=8.5, loc=loc)


def _ticks(low, high):
    """Round numbers on a log axis, few enough for their labels not to meet."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 2.6 else (1,)
    stride = max(1, math.ceil(decades / 7))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers if len(steps) > 1 or k % stride == 0 for m in steps]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


def _log_axis(axis, low, high, label):
    axis.axes.set_xlim(low, high)
    axis.set_major_locator(FixedLocator(_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: label(v)))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    minor = [m * 10.0**k for k in powers for m in range(2, 10)]
    axis.set_minor_locator(FixedLocator([t for t in minor if low <= t <= high]) if len(powers) < 9 else NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _loss_axis(axis, loss):
    low, high = float(np.min(loss)), float(np.max(loss))
    ticks = [t for t in MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low * 0.97, high * 1.03) if t > 0]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axis.set_minor_locator(NullLocator())


def _count(value) -> str:
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def _power(value) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10.0**exponent
    return f"$10^{{{exponent}}}$" if abs(factor - 1) < 1e-6 else f"${factor:.0f}{{\\times}}10^{{{exponent}}}$"
