"""What is a second thought worth: many samples, a trace, or a search, against more training?

scaling study thinking            (about 1.1e13 FLOPs; --dial tiny for a form of seconds)

4a: chains of facts (`relations`), whose trace is unique, so that the chance p of each problem, and pass@k for any k, is
exact. The chains asked for are not those trained on, so that two hops must be put together of facts; their first facts
have ranks even in the logarithm. 4b: signs, whose 256 strings are all scored, so that what each way of thinking longer
would do is exact as well. Only "sampled" is generated: thoughts that miscalculate, and yet lead to right signs.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis.errors import InputError as AnalysisInputError
from analysis.forecast.passes import LAWS_OF_K, PassFit, fit_passes
from analysis.uncertainty.equivalence import slope_equivalence
from analysis.uncertainty.isotonic import isotonic
from models.errors import InputError
from scaling.config import DataConfig, ObjectiveConfig, RunConfig, ScheduleConfig
from scaling.data.store import open_store
from sweeps.define import Runs, grid, seeds, union
from sweeps.studies._rules import QUANTILE, all_of, chosen, fitted, null, rows_of, slope, within
from sweeps.studies._sizes import model, rated, tokens
from sweeps.studies._study import Claim, EvaluationSpec, Study, Verdict

QUESTION = "How does being right grow with samples, traces and search, and how much training are they worth?"
COST = "1.1e13 FLOPs"

M = 1e6
TRACE, PLAIN = "relations:hops=3,trace=1,held=1", "relations:hops=3,trace=0,held=1"
DIRECT, SHORT = "signs:k=8,largest=9", "signs:k=6,largest=5"
THINKING = f"{SHORT},thinking=1"
KS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 16384)
FIT_UP_TO = 64
BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WITH_VERIFIER = ("verifier", "beam-verifier", "best-first", "depth-first")
ALONE = ("majority", "likeliest", "beam")
ENDS = (4, 64)  # budgets that all arms have, between which a lasting fall is told of
FLAT = 0.01  # of accuracy: a fall of less, a step, counts as none; so does a slope of less, a decade
EXCHANGE = (0.3, 1.18)  # Jones 2021 (2104.03113): ten times the training is worth fifteen times the test compute
TARGET = 0.9  # of problems solved, where training and thinking are exchanged
COMMON = 4  # of the largest FLOPs, above which a cell is held out: a quarter


def runs_of(source: str, sizes: Sequence[str], D: Sequence[float], T: int, world: str, dial: float) -> Runs:
    vocab = open_store(source, "symbols").vocab_size
    base = RunConfig(
        data=DataConfig(source=source, tokenizer="symbols", seq_len=T, valid_tokens=256 * T),
        batch_size=32,
        schedule=ScheduleConfig(warmup_tokens=51_200),
        objective=ObjectiveConfig("answers_only"),
    )
    axes = {
        "model": [model(size, vocab, dial, rope_theta=100.0) for size in sizes],
        "tokens": [tokens(d, dial) for d in D],
    }
    return grid(axes, base, rated(world))


def study(dial: float = 1.0, tiny: bool = False) -> Study:
    facts, signs, thinkers = ("S1", "S3", "S5"), ("S1", "S3", "S4"), ("S1", "S3")
    D_facts, D_plain, D_signs, D_short = (0.6, 1.2, 2.4), (1.2,), (0.4, 0.8, 1.6, 3.2), (0.5, 1, 2)
    n, problems, count, T_short = 170, 256, 2, 13
    if tiny:
        facts, signs, thinkers = ("S1",), ("S1",), ("S1",)
        D_facts, D_plain, D_signs, D_short = (1, 2), (1,), (1, 2), (2,)
        n, problems, count, dial = 8, 24, 1, 0.01
        T_short = 19  # the program of the thinking runs
    few = facts[:2]
    largest = model(signs[-1], 1, dial).d_model
    traced = runs_of(TRACE, facts, [d * M for d in D_facts], 36, "facts", dial)
    again = runs_of(TRACE, few, [d * M for d in D_facts], 36, "facts", dial)
    plain = runs_of(PLAIN, few, [d * M for d in D_plain], 36, "facts", dial)
    direct = runs_of(DIRECT, signs, [d * M for d in D_signs], 17, "signs", dial)
    thinking = runs_of(THINKING, thinkers, [d * M for d in D_short], 19, "signs", dial)
    short = runs_of(SHORT, thinkers[-1:], [d * M for d in D_short], T_short, "signs", dial)
    ends = {tokens(d * M, dial) for d in (D_signs[-1], D_short[-1])}

    def is_curve(config: RunConfig) -> bool:
        """The longest runs of signs, and the weakest, are those whose whole curves are asked for."""
        weakest = config.data.source == DIRECT and config.tokens == tokens(D_signs[0] * M, dial)
        own = D_signs if config.data.source == DIRECT else D_short
        longest = config.tokens in ends and config.tokens == tokens(own[-1] * M, dial)
        return of(DIRECT, THINKING, SHORT)(config) and (longest or (weakest and config.model.d_model < largest))

    def of_largest(config: RunConfig) -> bool:
        return is_curve(config) and config.data.source == DIRECT and config.model.d_model == largest

    search = {"n": problems, "budgets": BUDGETS, "k": KS, "draws": 0}
    curve = search | {"draws": 8, "blocks": min(20, problems // 2)}
    evaluations = (
        *(
            EvaluationSpec(
                "answers", {"n": n, "k": KS, "each": hops == 2, "source": asked(hops)}, of(TRACE), f"hops{hops}"
            )
            for hops in (1, 2, 3)
        ),
        EvaluationSpec("answers", {"n": n, "k": KS, "source": asked(2, trace=0)}, of(PLAIN), "plain2"),
        EvaluationSpec("answers", {"n": n, "k": KS, "source": asked(1, trace=0)}, of(PLAIN), "plain1"),
        EvaluationSpec("search", search, lambda c: of(DIRECT, THINKING, SHORT)(c) and not is_curve(c)),
        EvaluationSpec("search", curve, is_curve, "curve"),
        EvaluationSpec("search", search | {"calculator": True}, of(THINKING), "calculator"),
        EvaluationSpec("samples", {"n": problems, "samples": 16, "k": (1, 4, 16)}, of(THINKING), "sampled"),
        EvaluationSpec("search", curve | {"proposer": "random"}, of_largest, "random"),
        EvaluationSpec("search", search | {"proposer": "untrained"}, of_largest, "untrained"),
    )
    runs = union(traced, seeds(union(again, plain, direct, thinking, short), count))
    return Study("thinking", QUESTION, runs, evaluations, claims(), table=table_rows, figures=figures)


def asked(hops: int, trace: int = 1) -> str:
    """Chains that are not trained on (of two hops and more), of the same facts, ranks of first facts even in log."""
    return f"relations:a=0.01,least={hops},hops={hops},trace={trace},held=1"


def of(*sources: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.data.source in sources


def claims() -> tuple[Claim, ...]:
    coverage = {"metric": "pass@k of chains of two hops, not trained on", "axis": "k", "runs": of(TRACE)}
    signs = {"metric": "success: chance that one sample is right", "runs": of(DIRECT)}
    curve = {"metric": "accuracy", "axis": "budget of an arm", "runs": of(DIRECT, THINKING, SHORT)}
    shuffled = ("random proposer", "model before its first step", "coin for a verifier")
    return (
        Claim(
            name="coverage-law",
            text="Coverage of facts is a power law in k, -log pass@k = a k^-b: it predicts large k best.",
            law="a k^-b; rivals: p beta-distributed over problems, and lognormal",
            controls=("signs, which have no tail of unsolvable problems",),
            holdout=f"k above {FIT_UP_TO}",
            refuted_by="a rival whose mean |log error| at the held k, over all runs, is smaller",
            decide=coverage_law,
            **coverage,
        ),
        Claim(
            name="coverage-held-out",
            text="Fitted to k <= 64, the power law predicts pass@16384 within 10 % in every run.",
            law="a k^-b",
            controls=(),
            holdout=f"k above {FIT_UP_TO}",
            refuted_by="an error above 10 % in a run, by more than its 90 % noise",
            decide=coverage_held_out,
            **coverage,
        ),
        Claim(
            name="falsification-pair",
            text="Facts have a heavy tail of hard problems and signs none: from k = 16 to 64 log(-log pass@k) falls "
            "with log k by less than 0.3 for facts, by more than 1 for signs.",
            metric="slope of log(-log pass@k) on log k, 16 to 64",
            axis="k",
            law="a power law against a decay near the exponential",
            controls=("the other world",),
            holdout="none",
            refuted_by="a run of facts steeper than -0.3, or a run of signs flatter than -1",
            decide=falsification,
            runs=of(TRACE, DIRECT),
        ),
        Claim(
            name="trace-doubles-capacity",
            text="Without a trace two hops need every fact twice: it is worth a model with a trace of half its N.",
            metric="pass@1 of chains of two hops, not trained on",
            axis="N (n_compute)",
            law="N of a model with the trace at equal pass@1, by interpolation in log N",
            controls=("one hop is learned as well without the trace",),
            holdout="none",
            refuted_by="a ratio of N outside 1.5 to 3",
            decide=trace_ratio,
            runs=of(TRACE, PLAIN),
        ),
        Claim(
            name="logit-law",
            text="The chance that one sample of signs is right has odds that are powers of N and of D.",
            axis="N (n_compute), D (tokens)",
            law="logit p = c + s log N + u log D",
            controls=shuffled,
            holdout="cells above a quarter of the largest FLOPs",
            refuted_by="an error of a held-out p above 15 %, by more than its 90 % noise",
            decide=logit_law,
            **signs,
        ),
        Claim(
            name="exchange",
            text=f"Within a size, to be right on {TARGET:.0%} of the problems, ten times the training saves a factor "
            "of 2 to 15 of thinking.",
            axis="training FLOPs",
            law="log10 C_test = c - s log10 C_train, c of each size; s from 0.3 to 1.18",
            controls=shuffled,
            holdout="none",
            refuted_by="the 90 % interval of s, clustered by trunk, lies outside 0.3 to 1.18",
            decide=exchange,
            metric="FLOPs a problem of samples with a verifier",
            runs=of(DIRECT),
        ),
        Claim(
            name="search-against-training",
            text="For the FLOPs of one greedy answer of the largest, longest run, the smallest, shortest one with a "
            "verifier is right more often.",
            metric="accuracy at equal FLOPs a problem",
            axis="FLOPs a problem",
            law="none",
            controls=shuffled,
            holdout="none",
            refuted_by="a lower accuracy, by more than the 90 % noise",
            decide=search_against_training,
            runs=of(DIRECT),
        ),
        Claim(
            name="guidance",
            text="The order of the largest, longest run helps a tree search with the exact bound: at 8 nodes it is "
            "right on 10 % more of the problems than a random order.",
            metric="accuracy of depth-first search at 8 nodes",
            axis="proposer",
            law="none",
            controls=("random order with the same bound",),
            holdout="none",
            refuted_by="a gain below 0.1, by more than the 90 % noise",
            decide=guidance,
            runs=of(DIRECT),
        ),
        Claim(
            name="monotone-with-verifier",
            text="With an exact verifier accuracy never falls with thinking time: P(monotone) above 0.95, each curve.",
            law="isotonic",
            controls=("coin for a verifier: no slope",),
            holdout="none",
            refuted_by=f"a fall of more than {FLAT} a step beyond its 90 % interval",
            decide=lambda frame: monotone(frame, WITH_VERIFIER),
            **curve,
        ),
        Claim(
            name="monotone-alone",
            text="Without a verifier (majority, the likeliest sample, beam) accuracy never falls with thinking time: "
            "P(monotone) above 0.95, each curve.",
            law="isotonic",
            controls=("coin for a verifier: no slope",),
            holdout="none",
            refuted_by=f"a fall of more than {FLAT} a step beyond its 90 % interval",
            decide=lambda frame: monotone(frame, ALONE),
            **curve,
        ),
        Claim(
            name="thinking-pays-later",
            text="Writing what is left after each sign pays once its arithmetic is learned: at equal D of a size, one "
            "sample is right less often than a direct one in the shortest run, more often in the longest.",
            metric="success: chance that one sample is right",
            axis="D (tokens)",
            law="none",
            controls=("what is left written by a calculator",),
            holdout="none",
            refuted_by="thinking ahead in the shortest run, or behind in the longest, by more than the 90 % noise",
            decide=thinking_pays,
            runs=of(THINKING, SHORT),
        ),
        Claim(
            name="controls",
            text="A random proposer is worth the exact rate of guessing, an untrained model no more, and a coin in the "
            "place of the verifier gains nothing by more samples.",
            metric="success; slope of accuracy on log10 n",
            axis="samples",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"guessing outside 3 standard errors of its exact rate; an untrained model above it; a slope of "
            f"more than {FLAT} a decade",
            decide=controls,
            runs=of(DIRECT, THINKING, SHORT),
        ),
    )


def coverage_fits(frame: pd.DataFrame) -> dict[str, dict[str, PassFit]]:
    """Run -> the laws of k, fitted to its chains of two hops; runs whose coverage is 0 or 1 somewhere left out."""
    found = {}
    for run, rows in rows_of(frame, "hops2", metric="p").groupby("run"):
        try:
            found[run] = fit_passes(KS, p=rows["value"].to_numpy(), fit_up_to=FIT_UP_TO, draws=100)
        except AnalysisInputError:
            continue
    if not found:
        raise InputError("coverage: no run has a pass@k between 0 and 1 at every k")
    return found


def coverage_law(frame: pd.DataFrame) -> Verdict:
    fits = coverage_fits(frame)
    return chosen({law: float(np.mean([f[law].error for f in fits.values()])) for law in LAWS_OF_K}, LAWS_OF_K[0])


def coverage_held_out(frame: pd.DataFrame) -> Verdict:
    ends = [fits[LAWS_OF_K[0]].held.iloc[-1] for fits in coverage_fits(frame).values()]
    predicted, measured, low, high = (
        np.array([end[name] for end in ends]) for name in ("predicted", "measured", "low", "high")
    )
    return within(predicted, measured, 0.1, measured * (high - low) / 2 / QUANTILE)


def steepness(rows: pd.DataFrame) -> pd.Series:
    """Of each run: the slope of log(-log pass@k) on log k from 16 to 64; -inf where pass@64 is 1."""
    wide = rows.pivot_table(index="run", columns="k", values="value")
    with np.errstate(divide="ignore"):
        depth = np.log(-np.log(wide[[16.0, 64.0]].to_numpy()))
    return pd.Series((depth[:, 1] - depth[:, 0]) / np.log(4), wide.index)


def falsification(frame: pd.DataFrame) -> Verdict:
    facts = steepness(rows_of(frame, "hops2", metric="pass@k"))
    signs = steepness(rows_of(signs_of(frame, DIRECT), metric="pass@k"))
    note = f"facts {facts.min():.3f} to {facts.max():.3f}, signs {signs.min():.3g} to {signs.max():.3g}"
    verdict = "upheld" if facts.min() > -0.3 and signs.max() < -1 else "refuted"
    return Verdict("", verdict, None, float(facts.min()), float(facts.max()), float(signs.max()), note)


def trace_ratio(frame: pd.DataFrame) -> Verdict:
    """Over the sizes that have both: N without the trace over the N with it of equal pass@1."""
    traced, plain = (rows_of(frame, label, metric="pass@k", k=1) for label in ("hops2", "plain2"))
    traced = traced[traced["tokens"].isin(plain["tokens"])]
    with_N = traced.groupby("n_compute")["value"].mean()
    without_N = plain.groupby("n_compute")["value"].mean()
    N, p = float(without_N.index.max()), float(without_N.iloc[-1])
    if len(with_N) < 2:
        raise InputError("trace: one size with the trace; two are needed")
    logit = np.log(with_N / (1 - with_N)).to_numpy()
    equal = float(np.exp(np.interp(np.log(p / (1 - p)), logit, np.log(with_N.index))))
    ratio, bound = N / equal, "" if p > with_N.iloc[0] else "at least, as it is below the smallest with the trace; "
    ones = [rows_of(frame, label, metric="pass@k", k=1) for label in ("hops1", "plain1")]
    one = [rows[(rows["n_compute"] == N) & rows["tokens"].isin(plain["tokens"])]["value"].mean() for rows in ones]
    note = (
        f"{bound}pass@1 of two hops at N {N:,.0f}: {p:.4f} without, {with_N.loc[N]:.4f} with; of one hop {one[1]:.3f} "
    )
    note += f"without, {one[0]:.3f} with"
    verdict = "upheld" if 1.5 <= ratio <= 3 and not bound else "refuted" if ratio > 3 or not bound else "undecided"
    return Verdict("", verdict, 2.0, 1.5, 3.0, ratio, note)


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
    verdict = "refuted" if high < EXCHANGE[0] or low > EXCHANGE[1] else "upheld"
    if verdict == "upheld" and not EXCHANGE[0] <= s <= EXCHANGE[1]:
        verdict = "undecided"
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
    return f"{row['source']} N {row['n_compute']:,} D {row['tokens'] / M:.2g}M seed {row['seed']}"


def monotone(frame: pd.DataFrame, arms: Sequence[str]) -> Verdict:
    """Over all runs that were asked for their curves: the least P(monotone), and where a curve falls beyond doubt."""
    rows = rows_of(frame, "curve", metric="block_accuracy")
    rows = rows[rows["arm"].isin(arms)]
    least, falls, lower, doubtful = 1.0, [], [], 0
    for (_, arm), cell in rows.groupby(["run", "arm"]):
        values = cell.pivot_table(index="block", columns="budget", values="value")
        if arm == "majority":
            values = values.drop(columns=2.0)  # two samples that differ decide nothing
        found = isotonic(values.columns, values.to_numpy(), tolerance=FLAT)
        least, doubtful = min(least, found.p_monotone), doubtful + (found.p_monotone < 0.95)
        if found.where_it_fails:
            where = f"{arm} of {named(cell.iloc[0])}: {found.where_it_fails}"
            falls.append((found.steps["high"][found.steps["fails"]].min(), arm, where))
        from_to = values[[b for b in ENDS if b in values]]
        change = isotonic(from_to.columns, from_to.to_numpy()).steps.iloc[0]
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
    off = (random["value"] - guess) / random["stderr"]
    exact = Verdict(
        "",
        "upheld" if abs(off) < 3 else "refuted",
        guess,
        None,
        None,
        random["value"],
        f"random {random['value']:.4f}, exactly {guess:.4f}",
    )
    above = untrained["value"] - guess > QUANTILE * untrained["stderr"]
    fresh = Verdict(
        "",
        "refuted" if above else "upheld",
        guess,
        None,
        None,
        untrained["value"],
        f"untrained {untrained['value']:.4f}",
    )
    coin = rows_of(frame, "curve", metric="accuracy", arm="coin")
    test = slope_equivalence(
        np.log10(coin["budget"]), coin["value"] - coin.groupby("run")["value"].transform("mean"), FLAT, coin["run"]
    )
    return all_of(exact, fresh, null(test, "slope with a coin"))


SHOWN = (1, 4, 16, 64, 256, 16384)
ARMS = ("greedy", "majority", "likeliest", "beam", "best-first", "depth-first")  # verifier is pass@k


def table_rows(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """pass@k of chains, and accuracy by arm and budget of the longest runs of signs; means over seeds."""
    rows = [("what", "N", "D", *map(str, SHOWN))]

    def add(what: str, table: pd.DataFrame, axis: str) -> None:
        for (n, d), cell in table.groupby(["n_compute", "tokens"]):
            mean = cell.groupby(axis)["value"].mean()
            rows.append((what, f"{n:,}", f"{d:,}", *(f"{mean[k]:.3f}" if k in mean.index else "" for k in SHOWN)))

    for label in ("hops1", "hops2", "hops3", "plain1", "plain2"):
        add(f"{label}: pass@k", rows_of(frame, label, metric="pass@k"), "k")
    for source in (DIRECT, SHORT, THINKING):
        add(f"{source}: pass@k", rows_of(signs_of(frame, source), metric="pass@k"), "k")
    add(f"{THINKING}, calculator: pass@k", rows_of(frame, "calculator", metric="pass@k"), "k")
    add(f"{THINKING}, sampled: pass@k", rows_of(frame, "sampled", metric="pass@k"), "k")
    for source in (DIRECT, SHORT, THINKING):
        table = rows_of(frame, "curve", metric="accuracy", source=source)
        for arm in ARMS:
            add(f"{source}: {arm}", table[table["arm"] == arm], "budget")
    table = rows_of(frame, "random", metric="accuracy")
    for arm in ("verifier", "best-first", "depth-first"):
        add(f"random: {arm}", table[table["arm"] == arm], "budget")
    return rows


def figures(frame: pd.DataFrame) -> dict:
    """Coverage with the power law through k <= 64, and accuracy against FLOPs a problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    fits = coverage_fits(frame)
    table = rows_of(frame, "hops2", metric="pass@k")
    for i, (run, cell) in enumerate(table[table["seed"] == 0].groupby("run")):
        label = f"N {cell['n_compute'].iloc[0]:,}, D {cell['tokens'].iloc[0] / M:.2g}M"
        axes.plot(cell["k"], -np.log(cell["value"]), "o", color=f"C{i % 10}", ms=4, label=label)
        if run in fits:
            a, b = (fits[run]["pass_at_k"].params[name] for name in "ab")
            axes.plot(KS, a * np.array(KS, float) ** -b, color=f"C{i % 10}", lw=1)
    axes.axvline(FIT_UP_TO, color="black", ls=":", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="k", ylabel="-log pass@k")
    axes.legend(fontsize=7)
    made = {"Chains of two hops, not trained on; lines are power laws fitted left of the dots": figure}
    for source in (DIRECT, THINKING):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        table = rows_of(frame, "curve", metric="accuracy", source=source)
        table = table[(table["n_compute"] == table["n_compute"].max()) & (table["seed"] == 0)]
        for arm, cell in table[table["tokens"] == table["tokens"].max()].groupby("arm"):
            cell = cell.sort_values("flops_a_problem")
            axes.plot(cell["flops_a_problem"], cell["value"], "o-", ms=3, label=arm)
        axes.set(xscale="log", xlabel="FLOPs a problem", ylabel="accuracy", title=source)
        axes.legend(fontsize=7)
        made[f"{source}: accuracy against thinking time, the largest, longest run"] = figure
    return made
