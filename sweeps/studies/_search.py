"""Study 4b: what samples, search and more training are worth on signs, and what thoughts are.

All strings of signs are scored, so that what each way of thinking longer would do is exact, up to the noise of the
problems; only "sampled" is generated.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.uncertainty.equivalence import slope_equivalence
from analysis.uncertainty.isotonic import isotonic
from models.errors import InputError
from scaling.data.store import open_store
from sweeps.studies._rules import QUANTILE, all_of, curves_of, fitted, null, rows_of, slope, within
from sweeps.studies._rules import monotone as never_turns
from sweeps.studies._study import Verdict

DIRECT, SHORT = "signs:k=8,largest=9", "signs:k=6,largest=5"
THINKING = f"{SHORT},thinking=1"
BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WITH_VERIFIER = ("verifier", "beam-verifier", "best-first", "depth-first")
ALONE = ("majority", "likeliest", "beam")
ENDS = (4, 64)  # budgets that all arms have, between which a lasting fall is told of
FLAT = 0.01  # of accuracy: a fall of less, a step, counts as none; so does a slope of less, a decade
EXCHANGE = (0.3, 1.18)  # Jones 2021 (2104.03113): ten times the training is worth fifteen times the test compute
TARGET = 0.9  # of problems solved, where training and thinking are exchanged
COMMON = 4  # of the largest FLOPs, above which a cell is held out: a quarter


def signs_of(frame: pd.DataFrame, source: str, *labels: str) -> pd.DataFrame:
    """The rows of the search evaluations on the runs of a source, by the model as it was trained."""
    return frame[frame["evaluation"].isin(labels or ("search", "curve")) & (frame["source"] == source)]


def successes(frame: pd.DataFrame, source: str, *labels: str) -> pd.DataFrame:
    rows = rows_of(signs_of(frame, source, *labels), metric="success")
    return rows.sort_values(["flops", "seed"]).reset_index(drop=True)


def logit_law(frame: pd.DataFrame) -> Verdict:
    rows = successes(frame, DIRECT)
    found, runs = fitted(
        rows,
        "logit_power",
        {"N": "n_compute", "D": "tokens"},
        holdout=f"flops > {float(rows['flops'].max()) / COMMON!r}",
    )
    held = runs.holdout
    predicted = found.predict(N=runs.n[held], D=runs.d[held])
    verdict = within(predicted, runs.loss[held], 0.15, rows["stderr"].to_numpy()[held])
    terms = ", ".join(
        f"{name} {found.params[name]:.3f} [{low:.3f}, {high:.3f}]"
        for name, (low, high) in found.intervals.items()
        if name in found.params
    )
    return Verdict(
        "", verdict.verdict, verdict.predicted, verdict.low, verdict.high, verdict.measured, f"{terms}; {verdict.note}"
    )


def reach(rows: pd.DataFrame, column: str, target: float) -> float:
    """Where a curve of accuracies comes to the target, by interpolation of its logit in the column's logarithm."""
    rows = rows.sort_values("budget")
    accuracy = np.clip(rows["value"].to_numpy(), 1e-6, 1 - 1e-6)
    if not accuracy[0] < target < accuracy[-1]:
        return np.nan
    aim = np.log(target / (1 - target))
    return float(np.exp(np.interp(aim, np.log(accuracy / (1 - accuracy)), np.log(rows[column]))))


def exchange(frame: pd.DataFrame) -> Verdict:
    rows = rows_of(signs_of(frame, DIRECT), metric="accuracy", arm="verifier")
    keys = ["run", "n_compute", "flops", "trunk"]
    points = pd.DataFrame(
        [(*key, reach(cell, "flops_a_problem", TARGET)) for key, cell in rows.groupby(keys)], columns=[*keys, "test"]
    ).dropna()
    if len(points) < 4:
        raise InputError(f"exchange: {len(points)} runs come to {TARGET:.0%}; at least 4 are needed")
    x, y = (
        np.log10(points[name]) - np.log10(points[name]).groupby(points["n_compute"]).transform("mean")
        for name in ("flops", "test")
    )
    found = slope(x, y, points["trunk"])
    s, low, high = -found.value, -found.high, -found.low
    inside = low >= EXCHANGE[0] and high <= EXCHANGE[1]
    outside = high < EXCHANGE[0] or low > EXCHANGE[1]
    verdict = "upheld" if inside else "refuted" if outside else "undecided"
    longest = points.sort_values("flops").groupby("n_compute").tail(1)
    note = f"ten times the training saves a factor of {10**s:.3g}; FLOPs a problem at the longest run of each N: "
    note += ", ".join(f"{n:,}: {c:.3g}" for n, c in zip(longest["n_compute"], longest["test"], strict=True))
    return Verdict("", verdict, 1.18, low, high, s, note)


def difference(larger: pd.DataFrame, smaller: pd.DataFrame, least: float, note: str) -> Verdict:
    """Of two accuracies, means over runs, whether the first is larger by `least`; noise of problems."""

    def mean(rows: pd.DataFrame) -> tuple[float, float]:
        # The runs answer the same problems, so their errors do not average out.
        return float(rows["value"].mean()), float(rows["stderr"].mean())

    (a, a_err), (b, b_err) = mean(larger), mean(smaller)
    half = QUANTILE * float(np.hypot(a_err, b_err))
    gain = a - b
    verdict = "upheld" if gain - half > least else "refuted" if gain + half < least else "undecided"
    return Verdict("", verdict, b + least, b + least - half, b + least + half, a, f"{note}: {a:.3f} against {b:.3f}")


def at_flops(rows: pd.DataFrame, flops: float) -> float:
    """Accuracy of a curve at so many FLOPs a problem, linear in their logarithm."""
    rows = rows.sort_values("flops_a_problem")
    return float(np.interp(np.log(flops), np.log(rows["flops_a_problem"]), rows["value"]))


def search_against_training(frame: pd.DataFrame) -> Verdict:
    rows = rows_of(signs_of(frame, DIRECT), metric="accuracy")
    ends = rows["flops"].min(), rows["flops"].max()
    if ends[0] == ends[1]:
        raise InputError("signs: one run alone")
    greedy = rows[(rows["flops"] == ends[1]) & (rows["arm"] == "greedy")]
    small = rows[(rows["flops"] == ends[0]) & (rows["arm"] == "verifier")]
    budget = float(greedy["flops_a_problem"].mean())
    curves = [(at_flops(cell, budget), cell["stderr"].max()) for _, cell in small.groupby("run")]
    found = pd.DataFrame(curves, columns=["value", "stderr"])
    return difference(found, greedy, 0.0, f"at {budget:.3g} FLOPs a problem, samples of the smallest with a verifier")


def guidance(frame: pd.DataFrame) -> Verdict:
    rows = rows_of(frame, metric="accuracy", arm="depth-first", budget=8)
    own, random = rows_of(rows, "curve", source=DIRECT), rows_of(rows, "random")
    own = own[own["run"].isin(random["run"])]
    return difference(own, random, 0.1, "at 8 nodes, by the model and at random")


def named(row: pd.Series) -> str:
    return f"{row['source']} N {row['n_compute']:,} D {row['tokens'] / 1e6:.2g}M seed {row['seed']}"


def monotone(frame: pd.DataFrame, arms: Sequence[str]) -> Verdict:
    """Over all runs that were asked for their curves: the least P(monotone), and where a curve falls beyond doubt."""
    rows = rows_of(frame, "curve", metric="block_accuracy")
    rows = rows[rows["arm"].isin(arms)]
    least, falls, lower, doubtful = 1.0, [], [], 0
    for (_, arm), cell in rows.groupby(["run", "arm"]):
        if arm == "majority":
            cell = cell[cell["budget"] != 2]  # two samples that differ decide nothing
        budgets, values = curves_of(cell, "budget", "block")
        found = isotonic(budgets, values, tolerance=FLAT)
        least, doubtful = min(least, found.p_monotone), doubtful + (found.p_monotone < 0.95)
        if never_turns(found).verdict == "refuted":
            where = f"{arm} of {named(cell.iloc[0])}: {found.where_it_fails}"
            falls.append((found.steps["high"][found.steps["fails"]].min(), arm, where))
        at = np.isin(budgets, ENDS)
        change = isotonic(budgets[at], values[:, at]).steps.iloc[0]
        if change["high"] < 0:
            text = f"{change['change']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
            lower.append((change["high"], f"{arm} of {named(cell.iloc[0])} {text}"))
    curves = rows.groupby(["run", "arm"]).ngroups
    verdict = "refuted" if falls else "undecided" if doubtful else "upheld"
    note = f"{curves} curves, {doubtful} with P(monotone) below 0.95, {len(falls)} with a fall beyond doubt"
    if falls:
        count = pd.Series([arm for _, arm, _ in falls]).value_counts()
        note += f" ({', '.join(f'{arm} {n}' for arm, n in count.items())})"
    note += "".join(f"; {text}" for *_, text in sorted(falls)[:3])
    if lower:
        note += f"; lower at {ENDS[1]} than at {ENDS[0]}: {'; '.join(text for _, text in sorted(lower)[:4])}"
    return Verdict("", verdict, 1.0, 0.95, 1.0, least, note)


def thinking_pays(frame: pd.DataFrame) -> Verdict:
    """By samples and the verifier, which sees signs alone: `success` of a tree lets no miscalculated thought pass."""
    thinking, direct = rows_of(frame, "sampled", metric="pass@k", k=1), successes(frame, SHORT)
    # N differs by the tokens of the vocabulary alone, of which both have the same: the size that both have.
    thinking = thinking[thinking["n_compute"].isin(direct["n_compute"])]
    shortest, longest = (
        [rows[rows["tokens"] == end(rows["tokens"])] for rows in (thinking, direct)] for end in (min, max)
    )
    if shortest[1]["tokens"].max() == longest[1]["tokens"].max():
        raise InputError("signs: one D alone; two are needed")
    exact = successes(frame, THINKING)
    strict = exact[exact["run"].isin(shortest[0]["run"])]["value"].mean()
    return all_of(
        difference(
            *shortest[::-1], 0.0, f"in the shortest runs (thoughts right too: {strict:.3f}), direct and thinking"
        ),
        difference(*longest, 0.0, "in the longest runs, thinking and direct"),
    )


def controls(frame: pd.DataFrame) -> Verdict:
    guess = open_store(DIRECT, "symbols").task.exact()["guess_accuracy"]
    random, untrained = (rows_of(frame, label, metric="success").iloc[0] for label in ("random", "untrained"))
    parts = []
    for name, row in {"random": random, "untrained": untrained}.items():
        off, half = row["value"] - guess, QUANTILE * row["stderr"]
        refuted = abs(off) >= 3 * row["stderr"] if name == "random" else off > half
        # Noise that is wider than FLAT would hide a difference, and shows none.
        beyond = abs(off) if name == "random" else off
        verdict = "refuted" if refuted else "upheld" if beyond + half <= FLAT else "undecided"
        note = f"{name} {row['value']:.4f} +- {half:.4f}, exactly {guess:.4f}, margin {FLAT:.3g}"
        parts.append(Verdict("", verdict, guess, None, None, row["value"], note))
    coin = rows_of(frame, "curve", metric="accuracy", arm="coin")
    test = slope_equivalence(
        np.log10(coin["budget"]), coin["value"] - coin.groupby("run")["value"].transform("mean"), FLAT, coin["run"]
    )
    return all_of(*parts, null(test, "slope with a coin"))
