"""Study 2b: facts that adapters of a rank, or full tuning, store in a model, what it forgets, and replay.

Rows hold one fact each, so that none can be copied from its context. Bits stored are of values alone: M facts of 10
bits, less what the model still finds surprising of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.fitting.censored import fit_censored
from analysis.metric import LEVEL
from analysis.uncertainty.clustered import Interval
from analysis.uncertainty.equivalence import mean_equivalence
from models.config import LoraConfig
from models.errors import InputError
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from sweeps.define import Runs, children
from sweeps.studies._rules import QUANTILE, all_of, controlled, fitted, null, rows_of, sign, within
from sweeps.studies._study import Verdict

BASE = "facts"
BITS = 10.0  # of a value: two symbols of 32
EXPOSURES = 100
FULL = 0  # the rank of full tuning
#: Peak rates, tuned on a seed that the study does not use.
ADAPTERS, TUNING = 0.01, 0.004
SLOW = 0.001  # a rate of full tuning that stores as much
UNTOUCHED = 1e-9  # a rate that leaves the base as it is, to ask it as its children are asked
SHARES = (0.005, 0.01, 0.05, 0.2, 0.5)  # of replay

WITHIN = 0.25  # of a held-out cell's bits
KNEE = 0.75  # of the facts: the rank that stores as much is the knee
EQUAL = 0.03  # of the bits: less is no difference
NOTHING = 0.02  # of the bits that as many facts would be
PARTED = 0.95  # of full tuning's bits at the most facts: a rank that stores less has run out
LESS = 0.5  # nats of the base's world: less is no difference in forgetting
ONE = 0.01
LEFT = 0.1  # of the forgetting: "nearly stops it" leaves less
RISE = 0.5  # of the rise at a held-out share
SAVED = 1.0  # nats that a marker, or a slower rate, must save

Cells = Mapping[str, Mapping[str, Any]]  # run id -> what the study knows of a run


def facts(seed: int, M: int, **options: Any) -> str:
    """M fresh keys, equally often, their values without noise."""
    more = "".join(f",{name}={value}" for name, value in options.items())
    return f"facts:seed={101 + seed},uniform={M},eps=0{more}"


def child(
    parent: RunConfig, source: str, M: int, rank: int, share: float = 0.0, lr: float = 0.0, seq_len: int = 5
) -> RunConfig:
    """Finetuning on M facts, each EXPOSURES times; `share` of the rows are replay, on top of these."""
    B = 64 if M <= 500 else 128
    steps = round(M * EXPOSURES / (1 - share) / B)
    mixed = f"mix:{1 - share:g}*{source}|{share:g}*{BASE}" if share else source
    config = RunConfig(
        data=DataConfig(source=mixed, tokenizer="symbols", seq_len=seq_len, valid_tokens=1024 * seq_len),
        optim=OptimConfig(lr=lr or (ADAPTERS if rank else TUNING), b2=0.98),
        schedule=ScheduleConfig(warmup_tokens=20 * B * seq_len),
        tokens=steps * B * seq_len,
        batch_size=B,
        seed=parent.seed,
        objective=ObjectiveConfig("answers_only"),
        lora=LoraConfig(rank=rank),
    )
    return children([parent], {}, config)[0]


def planned(
    parents: Runs, facts_of: tuple[int, ...], ranks: tuple[int, ...], middle: int, shares: tuple[float, ...], more: bool
) -> tuple[Runs, dict[str, dict[str, Any]]]:
    """(runs, cells) of 2b: the grid of facts and ranks, and at `middle` facts the controls, replay and, with `more`, a
    slower rate and the marker.
    """
    cells: dict[str, dict[str, Any]] = {}
    runs = []

    def add(arm: str, config: RunConfig, asked: str, M: int, rank: int, share: float = 0.0) -> None:
        runs.append(config)
        of = {"arm": arm, "asked": asked, "M": M, "rank": rank, "share": share}
        cells[config.run_id] = of | {"forgets": middle == M and arm != "redrawn"}

    for parent in parents:
        for M in facts_of:
            for rank in ranks:
                source = facts(parent.seed, M)
                add("grid", child(parent, source, M, rank), source, M, rank)
        source = facts(parent.seed, middle)
        for rank in (max(ranks), FULL):
            redrawn = facts(parent.seed, middle, redraw=1)
            add("redrawn", child(parent, redrawn, middle, rank), redrawn, middle, rank)
        for share in shares:
            add("replay", child(parent, source, middle, FULL, share), source, middle, FULL, share)
        one_step = dataclasses.replace(child(parent, BASE, middle, FULL, lr=UNTOUCHED), tokens=1)
        add("untouched", one_step, "", middle, FULL)
        if not more:
            continue
        add("slow", child(parent, source, middle, FULL, lr=SLOW), source, middle, FULL)
        marked = facts(parent.seed, middle, form="qa")
        add("marker", child(parent, marked, middle, FULL, seq_len=7), marked, middle, FULL)
    return tuple(runs), cells


def with_cells(frame: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """The measurements of these runs, with what the study knows of each."""
    known = pd.DataFrame.from_dict(dict(cells), orient="index").rename_axis("run").reset_index()
    kept = frame.drop(columns=[c for c in known.columns if c != "run" and c in frame.columns])
    return kept.merge(known, on="run", validate="many_to_one")


def bits_stored(M: Any, logprob: Any) -> Any:
    """Of M facts whose values have a mean log-probability, in nats; unclipped: a sure and wrong model stores less than
    none.
    """
    return M * (BITS + logprob / math.log(2))


def stored(frame: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """A row a run of 2b: `bits`, and `old`, its loss on values of the base's world, nats a token."""
    rows = with_cells(frame, cells)
    asked = rows_of(rows[rows["evaluation"].str.startswith("answers")], metric="answer_logprob")
    asked = asked.assign(bits=bits_stored(asked["M"], asked["value"])).drop(columns=["value", "stderr", "metric"])
    old = rows_of(rows, "forgetting", metric="loss").set_index("run")["value"]
    return asked.assign(old=asked["run"].map(old)).sort_values(["arm", "M", "rank", "share", "seed"], kind="stable")


def arm(frame: pd.DataFrame, cells: Cells, name: str) -> pd.DataFrame:
    rows = stored(frame, cells)
    rows = rows[rows["arm"] == name].reset_index(drop=True)
    if not len(rows):
        raise InputError(f"measurements: none of the arm {name!r}")
    return rows


def adapters(frame: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """The grid without full tuning, with F, the bits of its facts."""
    rows = arm(frame, cells, "grid")
    return rows[rows["rank"] != FULL].assign(F=lambda r: BITS * r["M"]).reset_index(drop=True)


def capacity(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """The law, fitted without the cells of most facts, forecasts these."""
    rows = adapters(frame, cells)
    most = rows["M"].max()
    found, _ = fitted(rows, "capacity", {"F": "F", "P": "n_trained"}, "bits", holdout=f"M >= {most}", cluster="seed")
    of_most = rows[rows["M"] == most].groupby("rank")
    held = of_most[["F", "n_trained", "bits"]].mean()
    predicted = found.predict(F=held["F"].to_numpy(), P=held["n_trained"].to_numpy())
    stderr = of_most["bits"].agg(noise)
    verdict = within(predicted, held["bits"].to_numpy(), WITHIN, stderr.to_numpy())
    known = ", ".join(f"{half:.0%}" for half in QUANTILE * stderr / held["bits"].abs())
    c, s = found.params["c"], found.params["s"]
    (low_c, high_c), (low_s, high_s) = found.intervals["c"], found.intervals["s"]
    seen = rows[rows["M"] < most]
    error = np.log(found.predict(F=seen["F"].to_numpy(), P=seen["n_trained"].to_numpy()) / seen["bits"].to_numpy())
    note = (
        f"c {c:.3f} [{low_c:.3f}, {high_c:.3f}] bits a parameter, s {s:.2f} [{low_s:.2f}, {high_s:.2f}], "
        f"rms of log B within {np.sqrt(np.mean(error**2)):.3f}; M {most}, ranks {', '.join(map(str, held.index))}, "
        f"known between seeds to {known}: "
    )
    return controlled(dataclasses.replace(verdict, note=note + verdict.note), redrawn=nothing(frame, cells))


def knees(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each (seed, M): the rank at which KNEE of the facts is stored, log-linear between the ranks; `side` 1 where
    the largest rank stores less, so that it is at least that, -1 where the least one stores more.
    """
    found = []
    for (seed, M), cell in rows.groupby(["seed", "M"]):
        cell = cell.sort_values("rank")
        share = np.maximum.accumulate(cell["bits"].to_numpy() / (BITS * M))
        log_rank = np.log(cell["rank"].to_numpy(float))
        side = -1 if share[0] > KNEE else 1 if share[-1] < KNEE else 0
        at = log_rank[0] if side < 0 else log_rank[-1] if side > 0 else float(np.interp(KNEE, share, log_rank))
        found.append({"seed": seed, "M": M, "rank": float(np.exp(at)), "side": side})
    return pd.DataFrame(found)


def knee(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """The slope of the knee's log rank against log M is 1."""
    found = knees(adapters(frame, cells))
    columns = {"constant": np.ones(len(found)), "slope": np.log(found["M"].to_numpy(float))}
    fit = fit_censored(columns, found["rank"], found["side"])
    low, high = fit.intervals["slope"]
    by = found[found["side"] == 0].groupby("M")["rank"].mean()
    note = (
        f"ranks {', '.join(f'{rank:.2f} at M {M}' for M, rank in by.items())}; "
        f"{fit.n_right} of {fit.n} cells beyond the largest rank, {fit.n_left} below the least"
    )
    inside = low >= 0.75 and high <= 1.25
    outside = high < 0.75 or low > 1.25
    verdict = "upheld" if inside else "refuted" if outside else "undecided"
    found_slope = Verdict("", verdict, 1.0, low, high, fit.params["slope"], note)
    return controlled(found_slope, redrawn=nothing(frame, cells))


def against_full(rows: pd.DataFrame, rank: int) -> pd.DataFrame:
    """log of the bits at a rank over those of full tuning, of each (seed, M)."""
    table = rows.pivot_table(index=["seed", "M"], columns="rank", values="bits")
    return np.log(table[rank] / table[FULL]).rename("gap").reset_index()


def runs_out(frame: pd.DataFrame, cells: Cells, middle: int) -> Verdict:
    """The largest rank stores what full tuning does up to `middle` facts, and clearly less of the most facts."""
    rows = arm(frame, cells, "grid")
    gaps = against_full(rows, int(rows["rank"].max()))
    few, most = gaps[gaps["M"] <= middle], gaps[gaps["M"] == gaps["M"].max()]
    same = null(mean_equivalence(few["gap"], EQUAL, few["seed"]), f"log ratio up to M {middle}")
    mean, low, high = mean_interval(most["gap"] - math.log(PARTED))
    short = sign(Interval(mean, low, high, len(most), np.empty(0)), -1)
    ratios = ", ".join(f"{np.exp(g):.3f} at M {M}" for M, g in gaps.groupby("M")["gap"].mean().items())
    verdict = all_of(same, short)
    verdict = dataclasses.replace(verdict, note=f"ratios {ratios}; {verdict.note}")
    return controlled(verdict, redrawn=nothing(frame, cells))


def mean_interval(values: Any) -> tuple[float, float, float]:
    """(mean, low, high), Student's t between seeds."""
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < 2:
        raise InputError("an interval between seeds needs two")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def noise(values: Any) -> float:
    """Standard error of a mean over seeds whose normal 90 % interval is Student's t between them; inf for one seed."""
    if len(values) < 2:
        return math.inf
    _, low, high = mean_interval(values)
    return (high - low) / 2 / QUANTILE


def nothing(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """Values drawn anew at every occurrence store no bits."""
    rows = arm(frame, cells, "redrawn")
    share = rows["bits"] / (BITS * rows["M"])
    verdict = null(mean_equivalence(share, NOTHING, rows["seed"]), "share of the bits of as many facts")
    bits = ", ".join(f"{bits:+.0f}" for bits in rows["bits"])
    return dataclasses.replace(verdict, note=f"bits {bits}; {verdict.note}")


def forgets_no_less(frame: pd.DataFrame, cells: Cells, middle: int) -> Verdict:
    """Loss on the base's world after the largest rank, less that after full tuning, on `middle` facts."""
    rows = arm(frame, cells, "grid")
    rows = rows[rows["M"] == middle]
    table = rows.pivot_table(index="seed", columns="rank", values="old")
    rank = int(rows["rank"].max())
    mean, low, high = mean_interval(table[rank] - table[FULL])
    verdict = "upheld" if low > -LESS else "refuted" if high < -LESS else "undecided"
    note = "loss by rank " + ", ".join(f"{r or 'full'} {x:.2f}" for r, x in table.mean().items())
    return Verdict("", verdict, 0.0, low, high, mean, f"difference, nats; {note}")


def before(frame: pd.DataFrame, cells: Cells) -> dict[int, float]:
    """Seed -> the base's loss on values of its own world, asked as its children are."""
    rows = with_cells(rows_of(frame, "forgetting", metric="loss"), cells)
    rows = rows[rows["arm"] == "untouched"]
    return dict(zip(rows["seed"], rows["value"], strict=True))


def risen(frame: pd.DataFrame, cells: Cells, middle: int) -> pd.DataFrame:
    """`rise` of the loss on the base's world by full tuning, of each (seed, share of replay), 0 among them."""
    rows = arm(frame, cells, "grid")
    none = rows[(rows["M"] == middle) & (rows["rank"] == FULL)].assign(share=0.0)
    rows = pd.concat([none, arm(frame, cells, "replay")]).reset_index(drop=True)
    return rows.assign(rise=rows["old"] - rows["seed"].map(before(frame, cells)))


def one_percent(frame: pd.DataFrame, cells: Cells, middle: int) -> Verdict:
    """The rise with 1 % of replay as a share of that without."""
    rows = risen(frame, cells, middle)
    table = rows.pivot_table(index="seed", columns="share", values="rise")
    if ONE not in table:
        raise InputError(f"measurements: no run with a share of replay of {ONE}")
    mean, low, high = mean_interval(table[ONE] / table[0.0])
    verdict = "upheld" if low > LEFT else "refuted" if high < LEFT else "undecided"
    rises = ", ".join(f"{share:.1%} {rise:.2f}" for share, rise in table.mean().items())
    return Verdict("", verdict, LEFT, low, high, mean, f"rise by share of replay, nats: {rises}")


def replay(frame: pd.DataFrame, cells: Cells, middle: int) -> Verdict:
    """The law of the rise against the share p of replay, fitted without the largest share, forecasts it."""
    rows = risen(frame, cells, middle)
    by_share = rows.groupby("share")["rise"]
    mean = by_share.mean()
    seen, most = mean.iloc[:-1], mean.index[-1]
    if len(seen) < 4 or not (mean > 0).all():
        raise InputError("replay: expected four shares with a loss that rises, and one to forecast")
    log_F, log_B, alpha = replay_law(seen.index.to_numpy(), seen.to_numpy())
    predicted = float(np.exp(log_F - alpha * np.log1p(np.exp(log_B) * most)))
    verdict = within([predicted], [mean.iloc[-1]], RISE, [by_share.agg(noise).iloc[-1]])
    note = f"F {np.exp(log_F):.2f} nats, B {np.exp(log_B):.0f}, alpha {alpha:.2f}"
    return dataclasses.replace(verdict, note=f"{note}; at {most:.0%}: {verdict.note}")


def replay_law(share: np.ndarray, rise: np.ndarray) -> tuple[float, float, float]:
    """(log F, log B, alpha) of rise = F / (1 + B p)^alpha, least squares of logs."""
    from scipy.optimize import least_squares

    def residual(t: np.ndarray) -> np.ndarray:
        return t[0] - t[2] * np.log1p(np.exp(t[1]) * share) - np.log(rise)

    starts = [np.array([np.log(rise.max()), np.log(B), 0.5]) for B in (10.0, 100.0, 1000.0)]
    best = min((least_squares(residual, start) for start in starts), key=lambda found: found.cost)
    return tuple(map(float, best.x))


def saved(frame: pd.DataFrame, cells: Cells, middle: int, name: str) -> Verdict:
    """What full tuning as in the grid forgets of the base's world, less what it forgets in another arm that stores as
    much: by a marker before the key, or at a slower rate.
    """
    rows = arm(frame, cells, "grid")
    plain = rows[(rows["M"] == middle) & (rows["rank"] == FULL)].set_index("seed")
    other = arm(frame, cells, name).set_index("seed")
    mean, low, high = mean_interval(plain["old"] - other["old"])
    less = sign(Interval(mean, low, high, len(other), np.empty(0)), +1, SAVED)
    ratio, lowest, highest = mean_interval(np.log(other["bits"] / plain["bits"]))
    bits = "refuted" if highest < -EQUAL else "upheld" if lowest > -EQUAL else "undecided"
    both = all_of(less, Verdict("", bits))
    note = f"loss {plain['old'].mean():.2f} and {other['old'].mean():.2f}; ratio of bits {np.exp(ratio):.3f}"
    return Verdict("", both.verdict, SAVED, low, high, mean, note)
