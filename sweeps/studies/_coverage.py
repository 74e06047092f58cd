"""Study 4a: how coverage, pass@k, grows with k on chains of facts, and what a trace is worth in parameters.

The chance p of each chain is exact, and with it pass@k for any k. Its noise is that of the chains that were asked for.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.errors import InputError as AnalysisInputError
from analysis.forecast.passes import LAWS_OF_K, PassFit, fit_passes
from models.errors import InputError
from sweeps.studies._rules import QUANTILE, chosen, coefficient, joined, rows_of, within
from sweeps.studies._search import DIRECT, signs_of
from sweeps.studies._study import Verdict

TRACE, PLAIN = "relations:hops=3,trace=1,held=1", "relations:hops=3,trace=0,held=1"
KS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 16384)
FIT_UP_TO = 64
FACTS_ABOVE, SIGNS_BELOW = -0.3, -1.0  # slopes of log(-log pass@k)
RATIO = (1.5, 3.0)  # of N without a trace to N with one

Fits = Mapping[str, Mapping[str, PassFit]]  # run -> law of k -> its fit


def coverage_fits(frame: pd.DataFrame) -> tuple[Fits, int]:
    """(the laws of k, fitted to each run's chains of two hops; the number of runs left out, whose coverage is 0 or 1
    somewhere).
    """
    found, out = {}, 0
    for run, rows in rows_of(frame, "hops2", metric="p").groupby("run"):
        try:
            found[run] = fit_of(tuple(rows["value"]))
        except AnalysisInputError:
            out += 1
    if not found:
        raise InputError("coverage: no run has a pass@k between 0 and 1 at every k")
    return found, out


@functools.lru_cache(maxsize=256)
def fit_of(p: tuple[float, ...]) -> Mapping[str, PassFit]:
    """Kept, as several claims and a figure stand on the same fits."""
    return fit_passes(KS, p=np.array(p), fit_up_to=FIT_UP_TO, draws=100)


def of_every_run(verdict: Verdict, n_out: int) -> Verdict:
    """The verdict, where no run was left out: what is said of every run is else not decided."""
    if not n_out:
        return verdict
    why = f"{n_out} runs left out, whose pass@k is 0 or 1 at some k"
    return replace(verdict, verdict="undecided", note=joined(why, verdict.note))


def coverage_law(frame: pd.DataFrame) -> Verdict:
    """By the mean errors, where those of single runs do not say otherwise: the 90 % interval of the mean log ratio of
    the best rival's to the law's own is clear of 0.
    """
    fits, n_out = coverage_fits(frame)
    own = LAWS_OF_K[0]
    errors = pd.DataFrame([{law: of[law].error for law in LAWS_OF_K} for of in fits.values()])
    verdict = chosen(errors.mean().to_dict(), own)
    rival = errors.mean().drop(own).idxmin()
    if len(errors) > 1:
        ratio = coefficient(np.ones((len(errors), 1)), np.log(errors[rival] / errors[own]))
        clear = ratio.low > 0 or ratio.high < 0
        by_run = f"log ratio to {rival} by run {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    else:
        clear, by_run = False, "one run alone"
    verdict = replace(verdict, verdict=verdict.verdict if clear else "undecided", note=joined(verdict.note, by_run))
    return of_every_run(verdict, n_out)


def coverage_held_out(frame: pd.DataFrame) -> Verdict:
    fits, n_out = coverage_fits(frame)
    ends = [of[LAWS_OF_K[0]].held.iloc[-1] for of in fits.values()]
    predicted, measured, low, high = (
        np.array([end[name] for end in ends]) for name in ("predicted", "measured", "low", "high")
    )
    return of_every_run(within(predicted, measured, 0.1, measured * (high - low) / 2 / QUANTILE), n_out)


def steepness(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run: `slope` of log(-log pass@k) on log k from 16 to 64, -inf where pass@64 is 1, and `half`, its 90 %
    noise. The errors at both k, of the same problems, are taken as independent, which overstates it.
    """
    wide = rows.pivot_table(index="run", columns="k", values=["value", "stderr"])
    p, stderr = (wide[name][[16.0, 64.0]].to_numpy() for name in ("value", "stderr"))
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.log(-np.log(p))
        noise = np.nan_to_num(stderr / (p * -np.log(p)), nan=0.0)
    half = QUANTILE * np.hypot(*noise.T) / np.log(4)
    return pd.DataFrame({"slope": (depth[:, 1] - depth[:, 0]) / np.log(4), "half": half}, wide.index)


def falsification(frame: pd.DataFrame) -> Verdict:
    facts = steepness(rows_of(frame, "hops2", metric="pass@k"))
    signs = steepness(rows_of(signs_of(frame, DIRECT), metric="pass@k"))
    low, high = (facts["slope"] - facts["half"]).min(), (signs["slope"] + signs["half"]).max()
    if (facts["slope"] + facts["half"]).min() < FACTS_ABOVE or (signs["slope"] - signs["half"]).max() > SIGNS_BELOW:
        verdict = "refuted"
    else:
        verdict = "upheld" if low > FACTS_ABOVE and high < SIGNS_BELOW else "undecided"
    ends = facts["slope"].min(), facts["slope"].max(), signs["slope"].min(), signs["slope"].max()
    note = f"facts {ends[0]:.3f} to {ends[1]:.3f}, signs {ends[2]:.3g} to {ends[3]:.3g}; "
    note += f"with their noise facts above {low:.3f}, signs below {high:.3g}"
    return Verdict("", verdict, None, ends[0], ends[1], ends[3], note)


def trace_ratio(frame: pd.DataFrame) -> Verdict:
    """Over the sizes that have both: N without the trace over the N with it of equal pass@1, and the range of that by
    the noise of both.
    """
    traced, plain = (rows_of(frame, label, metric="pass@k", k=1) for label in ("hops2", "plain2"))
    traced = traced[traced["tokens"].isin(plain["tokens"])]
    # Runs of one size answer the same problems, so their errors do not average out.
    with_N, without_N = (rows.groupby("n_compute")[["value", "stderr"]].mean() for rows in (traced, plain))
    if len(with_N) < 2:
        raise InputError("trace: one size with the trace; two are needed")
    N, p = float(without_N.index.max()), float(without_N["value"].iloc[-1])
    half = QUANTILE * float(np.hypot(without_N["stderr"].iloc[-1], with_N["stderr"].max()))
    logit = np.log(with_N["value"] / (1 - with_N["value"])).to_numpy()

    def ratio_at(p: float) -> float:
        p = min(max(p, 1e-12), 1 - 1e-12)
        return N / float(np.exp(np.interp(np.log(p / (1 - p)), logit, np.log(with_N.index))))

    ratio, least = ratio_at(p), ratio_at(p + half)
    below, maybe_below = p <= with_N["value"].iloc[0], p - half <= with_N["value"].iloc[0]
    most = np.inf if maybe_below else ratio_at(p - half)
    bound = "at least, as it is below the smallest with the trace; " if below else ""
    ones = [rows_of(frame, label, metric="pass@k", k=1) for label in ("hops1", "plain1")]
    one = [rows[(rows["n_compute"] == N) & rows["tokens"].isin(plain["tokens"])]["value"].mean() for rows in ones]
    note = (
        f"{bound}pass@1 of two hops at N {N:,.0f}: {p:.4f} without, {with_N['value'].loc[N]:.4f} with; of one hop "
        f"{one[1]:.3f} without, {one[0]:.3f} with; by the noise a ratio of {least:.3g} to {most:.3g}"
    )
    inside, outside = RATIO[0] <= least and most <= RATIO[1], least > RATIO[1] or most < RATIO[0]
    verdict = "upheld" if inside else "refuted" if outside else "undecided"
    return Verdict("", verdict, 2.0, RATIO[0], RATIO[1], ratio, note)
