"""What a reader must know before believing a fit: units that look wrong, copies, outliers, parameters left open."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from analysis.fit import LawFit, Model
from analysis.laws import Law, law_named
from analysis.runs import Runs

OUTLIER = 5.0
OPEN, OPEN_LOG = 0.5, 1.5


def look_wrong(n, d, flops, loss, n_column="", d_column="", c_column="", loss_column="", given=()) -> str | None:
    """A line that asks about a unit that looks wrong, or None; nothing is guessed.

    n, d, flops, loss: (runs,) as the table has them; None, or no column name, for what is derived from the others.
    given: the units already stated, of "n", "d", "loss".
    """
    n, d, flops = (v if column else None for v, column in ((n, n_column), (d, d_column), (flops, c_column)))
    line = None if "loss" in given else _loss_doubt(loss, loss_column)
    per = np.median(d / n) if n is not None and d is not None else np.nan
    share = np.median(flops / (6.0 * n * d)) if flops is not None and np.isfinite(per) else 1.0
    limits = (("n", n, n_column, 1e3, per > 1e5), ("d", d, d_column, 1e4, per < 1e-2))
    for key, values, column, least, odd in limits:
        if line or values is None or key in given:
            continue
        most = np.nanmax(values)
        if most < least or (most < 100 * least and (odd or share > 1e3)):
            what = "parameters" if key == "n" else "tokens"
            line = (
                f"column {column!r} ({key.upper()}) is at most {most:.4g}: it looks like millions or billions of "
                f"{what}; say --{key}-unit 1e6 or --{key}-unit 1e9, or --{key}-unit 1 if it is right"
            )
    if line is None and abs(np.log10(share)) > 1 and not {"n", "d"} <= set(given):
        line = (
            f"column {c_column!r} (C) is {share:.2g} times 6 {n_column} {d_column} in the median run: is N or D in "
            "another unit (say --n-unit and --d-unit, 1 if right), or C not in FLOPs?"
        )
    return line


def _loss_doubt(loss, column: str) -> str | None:
    name = column.lower()
    if any(word in name for word in ("bits", "bpb", "bpc")):
        return f"column {column!r} looks like bits: say --loss-unit bits, or --loss-unit nats"
    if "ppl" in name or "perplexity" in name or np.median(loss) > 15:
        middle = np.median(loss)
        return (
            f"column {column!r} (median {middle:.3g}) looks like perplexity, not nats per token: give its logarithm, "
            "or say --loss-unit bits|nats"
        )
    return None


def duplicates(runs: Runs) -> str | None:
    """A line about rows that repeat both the inputs and the loss of another, or None. They count twice in a fit.

    Runs with the same inputs and another loss are repeats, which are welcome.
    """
    table = pd.DataFrame({"n": runs.n, "d": runs.d, "loss": runs.loss})
    for name, column in ({"U": "unique_tokens"} | dict(runs.inputs)).items():
        if column in runs.frame.columns:
            table[name] = runs.frame[column].to_numpy()
    copies = np.flatnonzero(table.duplicated().to_numpy())
    if not len(copies):
        return None
    verb = "row is a copy" if len(copies) == 1 else "rows are copies"
    return f"{len(copies)} of {len(runs)} {verb} of another run (rows {_few(copies)}): each counts twice"


def outliers(fit: LawFit, runs: Runs) -> pd.DataFrame:
    """Rows (row, residual, reason) that do not belong, the largest residual first, indexed by row of the table.

    residual: of log loss in robust sigmas, listed beyond 5; sigma from the median of the largest n - p residuals, since
    a robust fit passes through about p points. A diverged run that bends the fit to itself is found by its loss: above
    that of every run with no more of each input (two at least) by 5 % and 5 sigma. Held-out runs are not looked at.
    """
    used, law = runs.fitted, law_named(fit.law)
    inputs = np.stack([np.log(used.input(i)) for i in law.inputs])
    centre = np.array([fit.centre[i] for i in law.inputs])[:, None]
    observed = np.log(used.loss)
    residual = observed - law.log_value(fit.z, list(inputs - centre))[0]
    outer = np.sort(np.abs(residual))[-int(max(fit.noise["dof"], 1)) :]
    sigma = max(1.4826 * float(np.median(outer)), 1e-6)
    found = pd.DataFrame({"row": np.flatnonzero(~runs.holdout), "residual": residual / sigma, "reason": ""})
    if law.target == "loss":
        found.loc[_diverged(inputs, observed, max(0.05, OUTLIER * sigma)), "reason"] = "above every smaller run"
    found.loc[found["residual"].abs() > OUTLIER, "reason"] = "residual"
    found = found[found["reason"] != ""].sort_values("residual", key=np.abs, ascending=False)
    return found.set_index("row", drop=False).rename_axis(None)


def _diverged(inputs, observed, margin):
    below = (inputs[:, :, None] >= inputs[:, None, :] - 1e-9).all(axis=0)
    below &= (inputs[:, :, None] > inputs[:, None, :] + 1e-9).any(axis=0)
    worst = np.where(below, observed, -np.inf).max(axis=1)
    return (below.sum(axis=1) >= 2) & (observed > worst + margin)


def outlier_note(fit: LawFit, runs: Runs) -> str | None:
    """A line that names the outliers, or None. Nothing is dropped."""
    found = outliers(fit, runs)
    if not len(found):
        return None
    rows = _few([f"{r.row} ({r.residual:+.0f} sigma)" for r in found.itertuples()])
    are = "outlier" if len(found) == 1 else "outliers"
    return (
        f"{len(found)} {are} (beyond {OUTLIER:g} sigma, or above every smaller run), kept in the fit: rows {rows}; "
        "leave them out with --drop-outliers"
    )


def unidentified(fit: LawFit, runs: Runs) -> list[str]:
    """A line that names the parameters these runs leave open, and the run that would help the worst most; else [].

    Standard errors are Gauss-Newton's at the fitted noise. Open is: beyond half the value, beyond 1.5 in log for a
    scale, or at a bound. The run is sought over N and D (or the one input) up to 16 times beyond the data on either
    side, at most 4 times as dear as the dearest, by the cut in the worst one's variance.
    """
    used, law = runs.fitted, law_named(fit.law)
    model = Model.held(law, [], fit.centre, fit.fixed, fit.tied)
    by_u = np.eye(law.size) if model.matrix is None else model.matrix
    inputs = [np.log(used.input(i)) - fit.centre[i] for i in law.inputs]
    jacobian = np.nan_to_num(by_u @ law.log_value(fit.z, inputs)[1])
    information = jacobian @ jacobian.T
    ridge = 1e-12 * np.trace(information) * np.eye(len(information))
    covariance = fit.noise["sigma"] ** 2 * np.linalg.inv(information + ridge)
    slopes = _slopes(fit, law) @ by_u.T
    errors = np.sqrt(np.maximum(np.einsum("pi,ij,pj->p", slopes, covariance, slopes), 0.0))
    share = errors / np.array([_limit(fit, law, name) for name in fit.params])
    edge = set(fit.diagnostics.get("at_bound", []))
    left = [i for i, k in enumerate(fit.params) if k not in fit.fixed and (share[i] > 1 or k in edge)]
    if not left:
        return []
    names = list(fit.params)
    shown = [
        f"{names[i]} ({_error(fit, law, names[i], errors[i])}{', at its bound' * (names[i] in edge)})" for i in left
    ]
    worst = max(left, key=lambda i: share[i])
    line = f"these runs do not pin down {', '.join(shown)}"
    best = _remedy(fit, used, law, by_u, covariance, slopes[worst]) if len(law.inputs) <= 2 else None
    if best:
        at = ", ".join(f"{name} = {value:.3g}" for name, value in zip(law.inputs, best[0], strict=True))
        before, after = (_error(fit, law, names[worst], e) for e in (errors[worst], best[1]))
        line += f"; a run at {at} would cut that of {names[worst]} most (from {before} to {after})"
    return [line]


def _limit(fit, law, name) -> float:
    """The standard error beyond which a parameter is open: of the log of a scale, else of the value."""
    if _is_log(law, name):
        return OPEN_LOG
    found = next((c for c in law.coordinates if c.name == name), None)
    # A signed coordinate may well be 0: what counts as small is then a share of its allowed range.
    floor = 0.05 * (found.high - found.low) if found and found.low < 0 else 1e-3
    return OPEN * max(abs(fit.params[name]), floor)


def _is_log(law, name) -> bool:
    return law.compiled.symbols.logs[name] is not None


def _error(fit, law, name, error) -> str:
    if _is_log(law, name):
        return f"a factor of {np.exp(min(error, 50.0)):.2g}"
    value = abs(fit.params[name])
    return f"{100 * error / value:.3g} %" if value > 1e-3 else f"+- {error:.2g}"


def _slopes(fit, law):
    """Derivatives of the parameters (logs of scales) by the coordinates, (parameters, size), by central differences."""
    centre = {name: fit.centre[name] for name in law.centred}

    def values(z):
        found = law.params(z, centre)
        return np.array([np.log(found[k]) if _is_log(law, k) else found[k] for k in fit.params])

    return np.stack([(values(fit.z + s) - values(fit.z - s)) / 2e-6 for s in 1e-6 * np.eye(law.size)], axis=-1)


def _remedy(fit, used, law: Law, by_u, covariance, slope):
    """(inputs of the best next run, the standard error it leaves), by the rule of methods, 'Which run next'."""
    factors = np.geomspace(1 / 16, 16, 9)
    lines = [
        np.unique([v * f for v in (used.input(i).min(), used.input(i).max()) for f in factors]) for i in law.inputs
    ]
    points = np.array(list(product(*lines)))
    points = points[points.prod(axis=1) <= 4 * np.prod([used.input(i) for i in law.inputs], axis=0).max()]
    at = [np.log(points[:, k]) - fit.centre[i] for k, i in enumerate(law.inputs)]
    jacobian = np.nan_to_num(by_u @ law.log_value(fit.z, at)[1])
    moved = covariance @ jacobian
    gain = (slope @ moved) ** 2 / (fit.noise["sigma"] ** 2 + np.sum(jacobian * moved, axis=0))
    best = int(np.argmax(gain))
    return points[best], float(np.sqrt(max(slope @ covariance @ slope - gain[best], 0.0)))


def _few(items) -> str:
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")
