"""Study 2a: what pretraining is worth in tokens of the finetuning task, against N and D_F.

Models pretrained on facts are asked about a world that shares a part rho of them; models from scratch of the same
sizes are trained on the same questions. Data transferred is what they would need to get as good: D_T = D_scratch(L) -
D_F. All losses of a seed are on the same questions, so that the luck of the test sample drops out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.fitting.censored import CensoredFit
from analysis.forecast.transfer import Scratch, data_transferred, fit_transfer, scratch
from analysis.metric import LEVEL
from analysis.uncertainty.clustered import Interval, clustered
from analysis.uncertainty.equivalence import mean_equivalence
from models.errors import InputError
from scaling.config import DataConfig, ObjectiveConfig, RunConfig, ScheduleConfig
from sweeps.define import Runs, children, grid, seeds, union
from sweeps.studies._measure import RESULT
from sweeps.studies._rules import all_of, chosen, fitted, joined, null, rows_of, sign
from sweeps.studies._sizes import model, rated, tokens
from sweeps.studies._study import Verdict

BASE = "facts"
RHO = {"0": 0.0, "0.5": 0.5, "1": 1.0}  # of the facts that the parents saw, the share in an arm's world
ALL, HALF, NONE, PERMUTED = "1", "0.5", "0", "permuted"
ARMS = (ALL, HALF, NONE, PERMUTED)
V = 48  # of the world's symbols
T = 70  # of a row: 14 facts, or 10 questions
BATCH = 4  # of finetuning and from scratch alike; pretraining takes 16
#: Rates as multiples of pretraining's; tuned on a seed that the study does not use.
FROM_SCRATCH, FINETUNING = 0.7, 0.35

FACTOR = 1.5  # of a held-out D_T
ALIKE = 1.3  # factor in D_T: less is no difference
NEAR_ZERO = 0.1  # of the D_T with all facts shared
BETTER = 1.25  # factor between the errors of two laws

Cells = Mapping[str, Mapping[str, Any]]  # run id -> what the study knows of a run


def asked(arm: str, seed: int) -> str:
    """Questions about a world that shares a part of its facts with that of the parents."""
    permuted = ",permuted=7" if arm == PERMUTED else ""
    return f"facts:seed={1 + seed},of=0,shared={RHO.get(arm, 0.0):g}{permuted},form=qa"


def based(source: str, batch_size: int, warmup: int, objective: str, seed: int = 0) -> RunConfig:
    return RunConfig(
        data=DataConfig(source=source, tokenizer="symbols", seq_len=T, valid_tokens=512 * T),
        batch_size=batch_size,
        schedule=ScheduleConfig(warmup_tokens=warmup),
        seed=seed,
        objective=ObjectiveConfig(objective),
    )


def sized(sizes: tuple[str, ...], D: tuple[float, ...], dial: float, layers: int) -> dict[str, list]:
    models = [model(size, V, dial, n_layers=layers, rope_theta=100.0) for size in sizes]
    return {"model": models, "tokens": [tokens(d, dial) for d in D]}


def pretraining(sizes: tuple[str, ...], D: tuple[float, ...], count: int, dial: float, layers: int) -> Runs:
    return seeds(grid(sized(sizes, D, dial, layers), based(BASE, 16, 51_200, "next_token"), rated("facts")), count)


def planned(
    parents: Runs, sizes: tuple[str, ...], D_scratch: tuple[float, ...], D_F: tuple[float, ...], dial: float
) -> tuple[Runs, dict[str, dict[str, Any]]]:
    """(runs, cells) of 2a beside the parents: from scratch, and finetuned with every arm where the parent is one of
    most tokens, else with all facts shared and on all but the most tokens.
    """
    cells: dict[str, dict[str, Any]] = {}
    most, layers = max(parent.tokens for parent in parents), parents[0].model.n_layers

    def add(runs: Runs, arm: str, parent: RunConfig | None = None) -> Runs:
        of = {} if parent is None else {"D_p": parent.trained_tokens, "main": parent.tokens == most}
        cells.update({run.run_id: {"arm": arm} | of for run in runs})
        return runs

    parts = []
    for seed in sorted({parent.seed for parent in parents}):
        base = based(asked(NONE, seed), BATCH, 5_600, "answers_only", seed)
        parts.append(add(grid(sized(sizes, D_scratch, dial, layers), base, rated("facts", FROM_SCRATCH)), "scratch"))
    for parent in parents:
        main = parent.tokens == most
        axes = {"tokens": [tokens(d, dial) for d in (D_F if main else D_F[:-1])]}
        for arm in ARMS if main else (ALL,):
            base = based(asked(arm, parent.seed), BATCH, 560, "answers_only", parent.seed)
            parts.append(add(children([parent], axes, base, rated("facts", FINETUNING)), arm, parent))
    return union(*parts), cells


def with_cells(frame: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """The measurements of these runs, with what the study knows of each."""
    known = pd.DataFrame.from_dict(dict(cells), orient="index").rename_axis("run").reset_index()
    return frame.merge(known, on="run", validate="many_to_one")


def curves(frame: pd.DataFrame, cells: Cells) -> dict[tuple[int, int], Scratch]:
    """(n_compute, seed) -> the loss of models from scratch against their tokens."""
    rows = with_cells(rows_of(frame, RESULT, metric="loss"), cells)
    rows = rows[rows["arm"] == "scratch"]
    return {key: scratch(cell["tokens"], cell["value"]) for key, cell in rows.groupby(["n_compute", "seed"])}


def transfers(frame: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """A row a finetuned run: `D_T`, and `side`, 1 where it is beyond what was trained from scratch and so at least
    that, -1 where it is too little to be told from nothing.
    """
    rows = with_cells(rows_of(frame, RESULT, metric="loss"), cells)
    rows = rows[rows["arm"] != "scratch"].reset_index(drop=True)
    of = curves(frame, cells)
    D_T, side = np.zeros(len(rows)), np.zeros(len(rows), int)
    for key, at in rows.groupby(["n_compute", "seed"]).indices.items():
        if key not in of:
            raise InputError(f"no runs from scratch at N = {key[0]}, seed {key[1]}")
        D_T[at], side[at] = data_transferred(of[key], rows["tokens"].to_numpy()[at], rows["value"].to_numpy()[at])
    return rows.assign(D_T=D_T, side=side, held=rows["flops"] > rows["flops"].max() / 4)


def main_arm(frame: pd.DataFrame, cells: Cells, arm: str) -> pd.DataFrame:
    """The transfers of an arm from the parents of most tokens."""
    rows = transfers(frame, cells)
    rows = rows[(rows["arm"] == arm) & rows["main"].astype(bool)]
    if not len(rows):
        raise InputError(f"measurements: none of the arm {arm!r}")
    return rows.sort_values(["n_compute", "tokens", "seed"], kind="stable").reset_index(drop=True)


def paired(frame: pd.DataFrame, cells: Cells, more: str, less: str) -> pd.DataFrame:
    """`gap`: log D_T of one arm over another's, of each (parent, D_F), and its `side`: 1 where it is at least that, as
    one of the two is a bound, -1 where at most. Without pairs that are both unknown in the same way.
    """
    keys = ["parent", "n_compute", "seed", "tokens"]
    a, b = (main_arm(frame, cells, arm)[[*keys, "D_T", "side"]] for arm in (more, less))
    both = a.merge(b, on=keys, suffixes=("", "_less"))
    unknown = (both["side"] != 0) & (both["side"] == both["side_less"])
    kept = both[~unknown].reset_index(drop=True)
    if not len(kept):
        raise InputError(f"no pair of {more} and {less} of which both are measured")
    bounds = np.sign(kept["side"] - kept["side_less"])
    return kept.assign(gap=np.log(kept["D_T"] / kept["D_T_less"]), side=bounds).drop(columns="side_less")


def without_bounds(gaps: pd.DataFrame, *sides: int) -> tuple[pd.DataFrame, str]:
    """(pairs without those whose gap is a bound on these sides, what was left out in words, "" where nothing)."""
    bounds = gaps["side"].isin(sides)
    if bounds.all():
        raise InputError("every ratio of D_T that there is, is only a bound")
    words = f"{bounds.sum()} of {len(gaps)} pairs left out, whose ratio is only a bound" if bounds.any() else ""
    return gaps[~bounds].reset_index(drop=True), words


def open_where(left_out: str, verdict: Verdict) -> Verdict:
    """Undecided where pairs were left out that may speak against the claim."""
    if not left_out:
        return verdict
    return dataclasses.replace(verdict, verdict="undecided", note=joined(left_out, verdict.note))


def by_tokens(gaps: pd.DataFrame) -> str:
    return ", ".join(f"{np.exp(gap):.2f} at {D:,.0f}" for D, gap in gaps.groupby("tokens")["gap"].mean().items())


def geometric(gaps: pd.DataFrame) -> Interval:
    return clustered(gaps, lambda rows: float(rows["gap"].mean()), cluster="parent")


def sharing_pays(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """D_T rises from no shared facts to half of them, and from half to all. Ratios that are only at most so much would
    lean to that, and are left out, which leaves it undecided.
    """
    parts = []
    for more, less in ((HALF, NONE), (ALL, HALF)):
        gaps, left_out = without_bounds(paired(frame, cells, more, less), -1)
        part = sign(geometric(gaps), +1, note=f"ratio of {more} to {less} {by_tokens(gaps)}")
        if part.verdict == "refuted" and (gaps["side"] > 0).any():
            left_out = joined(left_out, "some ratios are only at least so much")
        parts.append(open_where(left_out, part))
    return all_of(*parts)


def symbols_do_not_matter(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """Without shared facts D_T is the same whether the parent saw these symbols in these places or others."""
    gaps, left_out = without_bounds(paired(frame, cells, NONE, PERMUTED), -1, 1)
    verdict = null(mean_equivalence(gaps["gap"], np.log(ALIKE), gaps["parent"]), "log ratio")
    return open_where(left_out, dataclasses.replace(verdict, note=f"ratio {by_tokens(gaps)}; {verdict.note}"))


def nothing_from_another_world(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """D_T of a world without these facts and symbols is next to nothing, beside that of all facts."""
    gaps, left_out = without_bounds(paired(frame, cells, PERMUTED, ALL), 1)
    found = geometric(gaps)
    low, high, share = np.exp([found.low, found.high, found.value])
    verdict = "upheld" if high < NEAR_ZERO else "refuted" if low > NEAR_ZERO else "undecided"
    note = f"share {by_tokens(gaps)}"
    if verdict == "refuted":
        # Pairs left out have a larger share, those that are kept and only bounds may have a smaller one.
        left_out = "some shares are only at most so much" * bool((gaps["side"] < 0).any())
    return open_where(left_out, Verdict("", verdict, 0.0, low, high, share, note))


def law(rows: pd.DataFrame) -> CensoredFit:
    seen = rows[~rows["held"]]
    return fit_transfer(seen["tokens"], seen["n_compute"], seen["D_T"], seen["side"], seen["parent"])


def forecast(found: CensoredFit, rows: pd.DataFrame) -> np.ndarray:
    return found.predict(alpha=np.log(rows["tokens"].to_numpy(float)), beta=np.log(rows["n_compute"].to_numpy(float)))


def between_seeds(rows: pd.DataFrame) -> float:
    """Half the 90 % interval of one log D_T, from the spread of seeds at each (N, D_F), pooled; inf for one seed."""
    logs = np.log(rows.loc[rows["side"] == 0, "D_T"])
    cells = logs.groupby([rows["n_compute"], rows["tokens"]])
    dof = int((cells.size() - 1).sum())
    if not dof:
        return np.inf
    return float(stats.t.ppf((1 + LEVEL) / 2, dof) * np.sqrt(np.sum((logs - cells.transform("mean")) ** 2) / dof))


def held_out(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """The law of D_T, fitted without the largest cells, forecasts these. Of one beyond the horizon from scratch only a
    forecast that falls short counts, of one too little to be told only one that is too large. Upheld only if at least
    half are measured, and by more than the noise between seeds.
    """
    rows = main_arm(frame, cells, ALL)
    found = law(rows)
    held = rows[rows["held"]]
    if not len(held):
        raise InputError("no cell is held out")
    error = np.log(forecast(found, held) / held["D_T"].to_numpy())
    side = held["side"].to_numpy()
    error = np.where(side > 0, np.minimum(error, 0.0), np.where(side < 0, np.maximum(error, 0.0), error))
    half, few = between_seeds(rows), 2 * np.sum(side == 0) < len(held)
    if (np.abs(error) > np.log(FACTOR)).any():  # as the claim says what refutes it, before any noise was known
        verdict = "refuted"
    else:
        verdict = "undecided" if few or (np.abs(error) + half > np.log(FACTOR)).any() else "upheld"
    worst = int(np.argmax(np.abs(error)))
    measured = float(held["D_T"].iloc[worst])
    errors = ", ".join(f"{np.expm1(e):+.0%}" for e in error)
    note = f"{described(found)}; held out {errors}, {int((side > 0).sum())} of them beyond the horizon and "
    note += f"{int((side < 0).sum())} below what can be told; a factor of {np.exp(half):.2f} between seeds"
    note += "; too few are measured" * bool(few)
    predicted = float(forecast(found, held)[worst])
    return Verdict("", verdict, predicted, measured / FACTOR, measured * FACTOR, measured, note)


def described(found: CensoredFit) -> str:
    params = ", ".join(
        f"{name} {found.params[name]:.3f} [{low:.3f}, {high:.3f}]" for name, (low, high) in found.intervals.items()
    )
    return f"{params}; {found.n} runs, {found.n_right} beyond the horizon, {found.n_left} below what can be told"


def larger_gain_more(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """beta of the law is above 0."""
    found = law(main_arm(frame, cells, ALL))
    low, high = found.intervals["beta"]
    return sign(Interval(found.params["beta"], low, high, found.clusters, np.empty(0)), +1, note=described(found))


def against_rival(frame: pd.DataFrame, cells: Cells) -> Verdict:
    """Of the loss of the held-out runs, the law of D_T against one of the loss itself, fitted at each N."""
    every, of = transfers(frame, cells), curves(frame, cells)
    every = every[every["arm"] == ALL]
    found = law(every[every["main"].astype(bool)])
    errors: dict[str, list[float]] = {"transfer": [], "pretrained": []}
    for n, rows in every.groupby("n_compute"):
        held = rows[rows["held"] & rows["main"].astype(bool)]
        if not len(held):
            continue
        seen = rows[~rows["held"]]
        rival, _ = fitted(seen, "pretrained", {"P": "D_p", "F": "tokens"}, cluster="none", draws=2)
        predicted = rival.predict(P=held["D_p"].to_numpy(float), F=held["tokens"].to_numpy(float))
        reached = held["tokens"].to_numpy() + forecast(found, held)
        by_transfer = [float(of[n, s].loss_at(d)) for s, d in zip(held["seed"], reached, strict=True)]
        for name, values in {"transfer": by_transfer, "pretrained": predicted}.items():
            errors[name] += list(np.log(values / held["value"].to_numpy()))
    if not errors["transfer"]:
        raise InputError("no cell is held out")
    return chosen({name: float(np.sqrt(np.mean(np.square(e)))) for name, e in errors.items()}, "transfer", BETTER)
