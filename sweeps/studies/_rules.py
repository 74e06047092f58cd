"""The rules that give verdicts, used by all studies: from numbers and intervals to upheld, refuted or undecided.

Each rule returns a `Verdict` without a name, which the study fills in. What noise leaves open is undecided, and says
how much more would decide it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.fitting.fit import fit
from analysis.fitting.result import LawFit
from analysis.metric import LEVEL, Prediction
from analysis.runs import Runs, read_runs
from analysis.uncertainty.bootstrap import bootstrap
from analysis.uncertainty.clustered import Interval
from analysis.uncertainty.equivalence import Equivalence, robust
from analysis.uncertainty.isotonic import Isotonic
from models.errors import InputError, did_you_mean
from sweeps.studies._study import Verdict

QUANTILE = float(stats.norm.ppf((1 + LEVEL) / 2))


def rows_of(frame: pd.DataFrame, evaluation: str | None = None, **equal: Any) -> pd.DataFrame:
    """The measurements of an evaluation (its label) whose columns have these values, as in metric="loss", k=16.

    Raises InputError where there are none.
    """
    equal = ({} if evaluation is None else {"evaluation": evaluation}) | equal
    for name, value in equal.items():
        if name not in frame.columns:
            raise InputError(f"measurements: no column {name!r}{did_you_mean(name, frame.columns)}")
        some = frame[frame[name] == value]
        if not len(some):
            there = ", ".join(map(str, sorted(frame[name].dropna().unique(), key=str)[:6]))
            raise InputError(f"measurements: none with {name} = {value!r} (there are {there or 'no values'})")
        frame = some
    return frame.reset_index(drop=True)


def fitted(
    frame: pd.DataFrame,
    law: str,
    inputs: Mapping[str, str],
    value: str = "value",
    holdout: str | None = None,
    cluster: str | None = None,
    draws: int = 400,
    **options: Any,
) -> tuple[LawFit, Runs]:
    """(fit with its intervals, runs) of a law of analysis.laws.forms to a column of the measurements.

    inputs: {input of the law: column}, as in {"N": "n_compute", "K": "kl"}. holdout: a comparison over the columns;
    cluster: the column whose rows share noise (default: trunk); options: those of analysis.fitting.fit.
    """
    columns = {name: frame[column].to_numpy(float) for name, column in inputs.items()}
    more = {"D": np.ones(len(frame))} if "N" in columns and "D" not in columns else {}
    # What is fitted is a measurement: runs of several objectives may stand side by side, which losses may not.
    own_loss = ("loss", "status", "objective", "objective_options")
    others = frame.drop(columns=[*columns, *more, *own_loss], errors="ignore")
    plain = pd.DataFrame(columns | more | {"loss": frame[value].to_numpy(float)}).join(others.reset_index(drop=True))
    units = {"n_column": "N", "d_column": "D", "n_unit": 1.0, "d_unit": 1.0} if "N" in columns else {}
    from analysis.laws.forms import law_named

    signed = law_named(law).metric.link == "identity"
    own = {name: name for name in inputs}
    runs = read_runs(plain, holdout=holdout, inputs=own, loss_unit="nats", signed=signed, **units)
    one = fit(runs, law, cluster=cluster, **options)
    return bootstrap(one, runs, draws), runs


def curves_of(frame: pd.DataFrame, axis: str, unit: str = "problem") -> tuple[np.ndarray, np.ndarray]:
    """(x, values) of measurements along an axis, (points,) and (units, points): what `isotonic` takes.

    unit: the column of what is resampled, such as problem or block; of several runs each has units of its own. Raises
    InputError where a unit was not measured at every point, or twice at one.
    """
    for name in (axis, unit):
        if name not in frame.columns:
            raise InputError(f"measurements: no column {name!r}{did_you_mean(name, frame.columns)}")
    table = frame.pivot_table(index=["run", unit], columns=axis, values="value", aggfunc=["mean", "count"])
    if not len(table) or not (table["count"] == 1).all(axis=None):
        raise InputError(f"measurements: not every {unit} has one value at each {axis}; pick one metric and arm")
    return table["mean"].columns.to_numpy(float), table["mean"].to_numpy(float)


def monotone(found: Isotonic, least: float = 0.95) -> Verdict:
    """Upheld where the curve never turns with a chance of at least `least`; refuted where a step turns beyond doubt."""
    fails = found.where_it_fails
    verdict = "refuted" if fails else "upheld" if found.p_monotone >= least else "undecided"
    note = f"P(monotone) {found.p_monotone:.3g}" + (f"; fails at {fails}" if fails else "")
    if verdict == "undecided":
        note = joined(note, "no step turns beyond doubt; more problems would decide")
    return Verdict("", verdict, least, None, None, found.p_monotone, note)


def contains(
    predicted: Prediction | Interval, measured: float, stderr: float = 0.0, widest: float = math.inf, note: str = ""
) -> Verdict:
    """Upheld where the predicted interval holds what was measured.

    stderr: of `measured`; where it would fall inside by as much as its own 90 % noise, it is undecided. widest: an
    interval of more than this says too little to be upheld by, in units of the quantity.
    """
    low, high = predicted.low, predicted.high
    if low is None or not (math.isfinite(low) and math.isfinite(high)):
        return Verdict("", "undecided", predicted.value, None, None, measured, joined(note, "there is no interval"))
    beyond = max(low - measured, measured - high)
    verdict = "upheld" if beyond <= 0 else "refuted" if beyond > QUANTILE * stderr else "undecided"
    if verdict == "upheld" and high - low > widest:
        verdict = "undecided"
        note = joined(note, f"the interval is {high - low:.3g} wide, more than {widest:.3g}; use more runs")
    if verdict == "undecided" and beyond > 0:
        times = math.ceil((QUANTILE * stderr / beyond) ** 2)
        note = joined(note, f"outside by {beyond:.3g} with a standard error of {stderr:.3g}; {times} times the sample")
    return Verdict("", verdict, predicted.value, low, high, measured, note)


def within(
    predicted: Sequence[float], measured: Sequence[float], share: float, stderr: Sequence[float] | None = None
) -> Verdict:
    """Upheld where every relative error |predicted/measured - 1| is at most `share`, its 90 % noise included; refuted
    where one is beyond it by more than that; else undecided. The worst is shown. stderr: of each measured value.
    """
    predicted, measured = np.atleast_1d(np.asarray(predicted, float)), np.atleast_1d(np.asarray(measured, float))
    if not len(measured) or not (np.isfinite(predicted).all() and np.isfinite(measured).all()):
        raise InputError("within: no held-out values, or some that are not finite")
    error = predicted / measured - 1
    noise = np.zeros(len(error)) if stderr is None else QUANTILE * np.asarray(stderr, float) / np.abs(measured)
    worst = int(np.argmax(np.abs(error)))
    certain = np.abs(error) - noise > share
    verdict = "refuted" if certain.any() else "undecided" if (np.abs(error) + noise > share).any() else "upheld"
    note = f"errors {', '.join(f'{e:+.2%}' for e in error[:8])}{', ...' if len(error) > 8 else ''}, at most {share:.3g}"
    band = np.sort(measured[worst] * np.array([1 - share, 1 + share]))
    return Verdict("", verdict, predicted[worst], band[0], band[1], measured[worst], note)


def null(test: Equivalence, of: str = "difference") -> Verdict:
    """The verdict on "there is none": upheld where the test shows equivalence to zero, refuted where a difference."""
    verdict = {"equivalent": "upheld", "different": "refuted"}.get(test.verdict, "undecided")
    note = f"{of} {test.estimate:.4g} [{test.low:.4g}, {test.high:.4g}], margin {test.margin:.4g}, {test.clusters} runs"
    if verdict == "undecided":
        note += f"; about {test.more} more runs would decide"
    return Verdict("", verdict, 0.0, test.low, test.high, test.estimate, note)


def sign(found: Interval, expected: int, least: float = 0.0, note: str = "") -> Verdict:
    """Upheld where the whole interval lies on the expected side (+1 or -1) of zero, by at least `least`.

    Refuted where it lies wholly short of that; undecided says how many more clusters would bring it clear.
    """
    if expected not in (1, -1):
        raise InputError(f"sign: expected = {expected}: +1 or -1")
    ends = sorted((expected * found.low, expected * found.high))
    value = expected * found.value
    verdict = "upheld" if ends[0] > least else "refuted" if ends[1] < least else "undecided"
    if verdict == "undecided":
        half = value - ends[0] if value > least else ends[1] - value
        aim = abs(value - least)
        more = math.ceil(found.clusters * ((half / aim) ** 2 - 1)) if aim > 0 else 10**6
        note = joined(note, f"about {max(min(more, 10**6), 1)} more runs would decide")
    return Verdict("", verdict, None, found.low, found.high, found.value, note)


def slope(x: Sequence[float], y: Sequence[float], cluster: Sequence | None = None) -> Interval:
    """The slope of least squares of y on x with its 90 % interval, by clusters (CR2, Satterthwaite)."""
    x = np.asarray(x, float)
    if not np.ptp(x) > 0:
        raise InputError("slope: all x are equal")
    return coefficient(np.stack([x - x.mean(), np.ones(len(x))], axis=1), y, cluster)


def coefficient(design: np.ndarray, y: Sequence[float], cluster: Sequence | None = None) -> Interval:
    """The first coefficient of least squares of y on `design`, (rows, coefficients), with its 90 % interval (as slope).

    Raises InputError where the rows do not tell the coefficients apart.
    """
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError("coefficient: these runs do not tell the coefficients apart")
    estimate, stderr, dof, clusters = robust(design, np.asarray(y, float), cluster)
    half = float(stats.t.ppf((1 + LEVEL) / 2, dof)) * stderr
    return Interval(estimate, estimate - half, estimate + half, clusters, np.empty(0))


def chosen(errors: Mapping[str, float], expected: str, factor: float = 1.25) -> Verdict:
    """Upheld where every rival's held-out error is more than `factor` times that of the law `expected`.

    Refuted where another's is less than its by that factor; between, the laws cannot be told apart: undecided.
    """
    if not factor > 1:
        raise InputError(f"chosen: factor = {factor:g}: expected above 1, as nearly equal errors decide nothing")
    if expected not in errors or len(errors) < 2:
        raise InputError(f"chosen: law {expected!r} and a rival are needed (there are {', '.join(errors)})")
    rival = min((law for law in errors if law != expected), key=errors.__getitem__)
    own, other = errors[expected], errors[rival]
    verdict = "upheld" if other > factor * own else "refuted" if own > factor * other else "undecided"
    note = "held-out error " + ", ".join(
        f"{law} {error:.3g}" for law, error in sorted(errors.items(), key=lambda e: e[1])
    )
    if verdict == "undecided":
        note = joined(note, f"less than a factor of {factor:g} apart")
    return Verdict("", verdict, other, None, None, own, note)


def all_of(*verdicts: Verdict) -> Verdict:
    """Of several parts of one claim: refuted where one is, undecided where one is, else upheld.

    The numbers are those of the first part that decides so; the notes are joined.
    """
    order = ("refuted", "undecided", "upheld")
    first = min(verdicts, key=lambda v: order.index(v.verdict))
    return replace(first, note=joined(*(v.note for v in verdicts)))


def controlled(verdict: Verdict, **controls: Verdict) -> Verdict:
    """The verdict where its controls hold; where one does not, nothing is decided, whatever was measured."""
    broken = [name for name, control in controls.items() if control.verdict != "upheld"]
    if not broken:
        return verdict
    why = "; ".join(f"control {name} {controls[name].verdict} ({controls[name].note})" for name in broken)
    return replace(verdict, verdict="undecided", note=joined(why, verdict.note))


def joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
