"""What is a second thought worth: many samples, a trace, or a search, against more training?

scaling study thinking            (about 1.1e13 FLOPs; --dial tiny for a form of seconds)

4a (`_coverage.py`): chains of facts (`relations`), whose trace is unique, so that the chance p of each problem, and
pass@k for any k, is exact. The chains asked for are not those trained on, so that two hops must be put together of
facts; their first facts have ranks even in the logarithm. 4b (`_search.py`): signs, whose 256 strings are all scored,
so that what each way of thinking longer would do is exact as well. Only "sampled" is generated: thoughts that
miscalculate, and yet lead to right signs.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from scaling.config import DataConfig, ObjectiveConfig, RunConfig, ScheduleConfig
from scaling.data.store import open_store
from sweeps.define import Runs, grid, seeds, union
from sweeps.studies import _coverage as coverage
from sweeps.studies import _search as search
from sweeps.studies._coverage import FIT_UP_TO, KS, PLAIN, TRACE
from sweeps.studies._rules import rows_of
from sweeps.studies._search import BUDGETS, DIRECT, FLAT, SHORT, TARGET, THINKING, signs_of
from sweeps.studies._sizes import model, rated, tokens
from sweeps.studies._study import Claim, EvaluationSpec, Study

QUESTION = "How does being right grow with samples, traces and search, and how much training are they worth?"
COST = "1.1e13 FLOPs"

M = 1e6


def runs_of(
    source: str, sizes: Sequence[str], D: Sequence[float], T: int, world: str, dial: float, layers: int = 2
) -> Runs:
    vocab = open_store(source, "symbols").vocab_size
    base = RunConfig(
        data=DataConfig(source=source, tokenizer="symbols", seq_len=T, valid_tokens=256 * T),
        batch_size=32,
        schedule=ScheduleConfig(warmup_tokens=51_200),
        objective=ObjectiveConfig("answers_only"),
    )
    axes = {
        "model": [model(size, vocab, dial, n_layers=layers, rope_theta=100.0) for size in sizes],
        "tokens": [tokens(d, dial) for d in D],
    }
    return grid(axes, base, rated(world))


def study(dial: float = 1.0, tiny: bool = False) -> Study:
    facts, signs, thinkers = ("S1", "S3", "S5"), ("S1", "S3", "S4"), ("S1", "S3")
    D_facts, D_plain, D_signs, D_short = (0.6, 1.2, 2.4), (1.2,), (0.4, 0.8, 1.6, 3.2), (0.5, 1, 2)
    n, problems, count, T_direct, T_short, layers = 170, 256, 2, 17, 13, 2
    if tiny:
        facts, signs, thinkers = ("S1",), ("S1",), ("S1",)
        D_facts, D_plain, D_signs, D_short = (2,), (2,), (1, 2), (2,)
        n, problems, count, dial, layers = 8, 24, 1, 0.01, 1
        T_direct = T_short = 19  # the program of the thinking runs
    few = facts[:2]
    largest = model(signs[-1], 1, dial).d_model
    traced = runs_of(TRACE, facts, [d * M for d in D_facts], 36, "facts", dial, layers)
    again = runs_of(TRACE, few, [d * M for d in D_facts], 36, "facts", dial, layers)
    plain = runs_of(PLAIN, few, [d * M for d in D_plain], 36, "facts", dial, layers)
    direct = runs_of(DIRECT, signs, [d * M for d in D_signs], T_direct, "signs", dial, layers)
    thinking = runs_of(THINKING, thinkers, [d * M for d in D_short], 19, "signs", dial, layers)
    short = runs_of(SHORT, thinkers[-1:], [d * M for d in D_short], T_short, "signs", dial, layers)
    ends = {tokens(d * M, dial) for d in (D_signs[-1], D_short[-1])}

    def is_curve(config: RunConfig) -> bool:
        """The longest runs of signs, and the weakest, are those whose whole curves are asked for."""
        weakest = config.data.source == DIRECT and config.tokens == tokens(D_signs[0] * M, dial)
        own = D_signs if config.data.source == DIRECT else D_short
        longest = config.tokens in ends and config.tokens == tokens(own[-1] * M, dial)
        return of(DIRECT, THINKING, SHORT)(config) and (longest or (weakest and config.model.d_model < largest))

    def of_largest(config: RunConfig) -> bool:
        return is_curve(config) and config.data.source == DIRECT and config.model.d_model == largest

    searched = {"n": problems, "budgets": BUDGETS, "k": KS, "draws": 0}
    curve = searched | {"draws": 8, "blocks": min(20, problems // 2)}
    evaluations = (
        *(
            EvaluationSpec(
                "answers", {"n": n, "k": KS, "each": hops == 2, "source": asked(hops)}, of(TRACE), f"hops{hops}"
            )
            for hops in (1, 2, 3)
        ),
        EvaluationSpec("answers", {"n": n, "k": KS, "source": asked(2, trace=0)}, of(PLAIN), "plain2"),
        EvaluationSpec("answers", {"n": n, "k": KS, "source": asked(1, trace=0)}, of(PLAIN), "plain1"),
        EvaluationSpec("search", searched, lambda c: of(DIRECT, THINKING, SHORT)(c) and not is_curve(c)),
        EvaluationSpec("search", curve, is_curve, "curve"),
        EvaluationSpec("search", searched | {"calculator": True}, of(THINKING), "calculator"),
        EvaluationSpec("samples", {"n": problems, "samples": 16, "k": (1, 4, 16)}, of(THINKING), "sampled"),
        EvaluationSpec("search", curve | {"proposer": "random"}, of_largest, "random"),
        EvaluationSpec("search", searched | {"proposer": "untrained"}, of_largest, "untrained"),
    )
    runs = union(traced, seeds(union(again, plain, direct, thinking, short), count))
    return Study("thinking", QUESTION, runs, evaluations, claims(), table=table_rows, figures=figures)


def asked(hops: int, trace: int = 1) -> str:
    """Chains that are not trained on (of two hops and more), of the same facts, ranks of first facts even in log."""
    return f"relations:a=0.01,least={hops},hops={hops},trace={trace},held=1"


def of(*sources: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.data.source in sources


def claims() -> tuple[Claim, ...]:
    return (*claims_of_facts(), *claims_of_signs())


def claims_of_facts() -> tuple[Claim, ...]:
    of_k = {"metric": "pass@k of chains of two hops, not trained on", "axis": "k", "runs": of(TRACE)}
    return (
        Claim(
            name="coverage-law",
            text="Coverage of facts is a power law in k, -log pass@k = a k^-b: it predicts large k best.",
            law="a k^-b; rivals: p beta-distributed over problems, and lognormal",
            controls=("signs, which have no tail of unsolvable problems",),
            holdout=f"k above {FIT_UP_TO}",
            refuted_by="a rival whose mean |log error| at the held k, over all runs, is smaller",
            decide=coverage.coverage_law,
            **of_k,
        ),
        Claim(
            name="coverage-held-out",
            text="Fitted to k <= 64, the power law predicts pass@16384 within 10 % in every run.",
            law="a k^-b",
            controls=(),
            holdout=f"k above {FIT_UP_TO}",
            refuted_by="an error above 10 % in a run, by more than its 90 % noise",
            decide=coverage.coverage_held_out,
            **of_k,
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
            decide=coverage.falsification,
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
            decide=coverage.trace_ratio,
            runs=of(TRACE, PLAIN),
        ),
    )


def claims_of_signs() -> tuple[Claim, ...]:
    signs = {"metric": "success: chance that one sample is right", "runs": of(DIRECT)}
    curve = {"metric": "accuracy", "axis": "budget of an arm", "runs": of(DIRECT, THINKING, SHORT)}
    shuffled = ("random proposer", "model before its first step", "coin for a verifier")
    return (
        Claim(
            name="logit-law",
            text="The chance that one sample of signs is right has odds that are powers of N and of D.",
            axis="N (n_compute), D (tokens)",
            law="logit p = c + s log N + u log D",
            controls=shuffled,
            holdout="cells above a quarter of the largest FLOPs",
            refuted_by="an error of a held-out p above 15 %, by more than its 90 % noise",
            decide=search.logit_law,
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
            decide=search.exchange,
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
            decide=search.search_against_training,
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
            decide=search.guidance,
            runs=of(DIRECT),
        ),
        Claim(
            name="monotone-with-verifier",
            text="With an exact verifier accuracy never falls with thinking time: P(monotone) above 0.95, each curve.",
            law="isotonic",
            controls=("coin for a verifier: no slope",),
            holdout="none",
            refuted_by=f"a fall of more than {FLAT} a step beyond its 90 % interval",
            decide=lambda frame: search.monotone(frame, search.WITH_VERIFIER),
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
            decide=lambda frame: search.monotone(frame, search.ALONE),
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
            decide=search.thinking_pays,
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
            decide=search.controls,
            runs=of(DIRECT, THINKING, SHORT),
        ),
    )


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
    fits, _ = coverage.coverage_fits(frame)
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
