"""Does a sweep over N and D recover the true entropy of its source, inside its interval?

scaling study entropy            (about 3.0e13 FLOPs; --dial tiny for a form of seconds)

World F (`facts`) has a known entropy of each value token, 0.6508 nats at eps = 0.1, and a random walk on a graph a
known entropy of each node. Loss is measured on value tokens, as entropy + excess: the excess over who knows the world,
on the same tokens, so that the luck of the test sample drops out of it. No fit is told the entropy.

Result: the graph's entropy is found (0.958 [0.917, 0.984] for 0.936); the floor fitted to facts lies 13 % above theirs
(docs/studies.md).
"""

import numpy as np
import pandas as pd

from analysis.metric import Prediction
from analysis.report.findings import Findings, analyse
from analysis.runs import read_runs
from analysis.uncertainty.equivalence import slope_equivalence
from models.config import ModelConfig
from scaling.config import DataConfig, RunConfig, ScheduleConfig
from scaling.data.store import open_store
from sweeps.define import Runs, grid, seeds, union
from sweeps.studies import _rules as rules
from sweeps.studies._sizes import WIDTHS, rated, tokens, width
from sweeps.studies._study import Claim, EvaluationSpec, Study, Verdict

QUESTION = "Does a sweep over N and D recover the true entropy of its source, inside its interval?"
COST = "3.0e13 FLOPs"

SIZES = ("S1", "S2", "S3", "S4", "S5")
MAIN, NOISY, STEEP, REDRAWN = "facts", "facts:eps=0.2", "facts:a=1", "facts:redraw=1"
GRAPH = "graph:nodes=128,edges=384"
T = 80  # of a row: 16 facts, or a walk of 40 nodes
WITHIN = 0.01  # of the held-out loss
WIDEST = 0.2  # share of an entropy: an interval of its estimate that is wider says nothing
FLAT = 0.005  # slope of log loss a decade of N that counts as none
AXES = {"N": "n_compute", "D": "tokens"}
THEORY = {"alpha": lambda a: a, "beta": lambda a: a / (1 + a)}  # Hutter 2102.04074, Michaud 2303.13506


def shape(size: str, vocab_size: int, dial: float, layers: int) -> ModelConfig:
    """Two heads at every size, so that width alone changes: with heads 16 wide, S2 has one and lies 4 % off the law."""
    d = width(WIDTHS[size], dial)
    return ModelConfig(vocab_size=vocab_size, d_model=d, n_layers=layers, n_heads=2, rope_theta=100.0)


def runs_of(source: str, sizes: tuple[str, ...], D: tuple[float, ...], dial: float, layers: int = 2) -> Runs:
    vocab = open_store(source, "symbols").vocab_size
    base = RunConfig(
        data=DataConfig(source=source, tokenizer="symbols", seq_len=T, valid_tokens=256 * T, seed=1),
        batch_size=16,
        schedule=ScheduleConfig(warmup_tokens=51_200),
    )
    axes = {
        "model": [shape(size, vocab, dial, layers) for size in sizes],
        "tokens": [tokens(d, dial) for d in D],
    }
    return grid(axes, base, rated("facts"))


def study(dial: float = 1.0, tiny: bool = False) -> Study:
    M = 1e6
    sizes, few, D, made = SIZES, SIZES[:4], (0.375 * M, 0.75 * M, 1.5 * M, 3 * M, 6 * M), {"dial": dial}
    if tiny:
        sizes, few, D, made = SIZES[:3], SIZES[:1], (M, 2 * M, 4 * M), {"dial": 0.01, "layers": 1}
    main = runs_of(MAIN, sizes, D, **made)
    again = runs_of(MAIN, ("S1", "S3"), D[:-1], **made)
    controls = union(
        runs_of(NOISY, few, D[:4], **made),
        runs_of(STEEP, few, D[:4], **made),
        seeds(runs_of(REDRAWN, ("S1", "S3"), (max(D[:4]),), **made), 2),
        runs_of(GRAPH, few, D[:4], **made),
    )
    runs = union(main, seeds(again, 2 if tiny else 3), controls)
    return Study(
        "entropy",
        QUESTION,
        runs,
        (EvaluationSpec("loss", {"subset": "answer", "n": 128 if tiny else 2048}),),
        claims(),
        table=table_rows,
        figures=figures,
    )


def claims() -> tuple[Claim, ...]:
    shared = {
        "metric": "loss of answer tokens, nats",
        "axis": "N (n_compute) and D (tokens)",
        "controls": ("values redrawn at every occurrence: no slope in N", "eps 0.1 -> 0.2 moves E by 0.506 alone"),
    }
    return (
        Claim(
            name="entropy",
            text="The floor E of the law fitted to facts is the entropy of a value token, inside its 90 % interval.",
            law="the one that forecasts best within the fitted runs, of chinchilla and coupled",
            holdout="the cells above a quarter of the largest FLOPs",
            refuted_by="the entropy lies outside the 90 % interval of E",
            decide=lambda frame: floor(frame, MAIN),
            runs=of_source(MAIN),
            **shared,
        ),
        Claim(
            name="held-out",
            text="The same fit predicts the largest runs within 1 %.",
            law="as for entropy",
            holdout="the cells above a quarter of the largest FLOPs",
            refuted_by="an error of a held-out run above 1 %",
            decide=held_out,
            runs=of_source(MAIN),
            **shared,
        ),
        Claim(
            name="noise-moves-the-floor",
            text="More noise in the values, eps 0.2, raises E by the difference of the entropies, 0.506.",
            law="chinchilla, on the same cells of both worlds",
            holdout="none",
            refuted_by="0.506 lies outside the 90 % interval of the difference",
            decide=moved,
            runs=of_source(MAIN, NOISY),
            **shared,
        ),
        Claim(
            name="noise-leaves-the-exponents",
            text="More noise leaves alpha and beta as they are.",
            law="chinchilla, on the same cells of both worlds",
            holdout="none",
            refuted_by="0 lies outside the 90 % interval of the difference of alpha or of beta",
            decide=same_exponents,
            runs=of_source(MAIN, NOISY),
            **shared,
        ),
        Claim(
            name="nothing-to-learn",
            text="With values redrawn at every occurrence the loss does not depend on N.",
            law="slope of log loss over log10 N",
            holdout="none",
            refuted_by=f"a slope whose 90 % interval excludes 0, of more than {FLAT} a decade",
            decide=flat,
            runs=of_source(REDRAWN),
            **shared,
        ),
        Claim(
            name="steeper-with-a",
            text="With a lighter tail of rare facts, a = 1 for 0.5, the excess falls faster with N and with D.",
            law="log excess over log N and log D, least squares on the same cells",
            holdout="none",
            refuted_by="a slope that is not steeper by its 90 % interval, clustered by trunk",
            decide=steeper,
            runs=of_source(MAIN, STEEP),
            **shared,
        ),
        Claim(
            name="exponents-of-theory",
            text="alpha = a and beta = a / (1 + a), a = 0.5.",
            law="chinchilla",
            holdout="the cells above a quarter of the largest FLOPs",
            refuted_by="one of 0.5 and 0.333 lies outside the 90 % interval of its exponent",
            decide=exponents,
            runs=of_source(MAIN),
            **shared,
        ),
        Claim(
            name="second-source",
            text="The floor of a random walk on a graph is its entropy, inside the 90 % interval of E.",
            law="as for entropy",
            holdout="the cells above a quarter of the largest FLOPs",
            refuted_by="the entropy lies outside the 90 % interval of E",
            decide=lambda frame: floor(frame, GRAPH),
            runs=of_source(GRAPH),
            **shared,
        ),
    )


def of_source(*sources: str):
    return lambda config: config.data.source in sources


def entropy_of(source: str) -> float:
    """Nats of an answer token to who knows the source."""
    return open_store(source, "symbols").task.exact()["value_token"]


def losses(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """A row a run of a source: the loss of answer tokens without the luck of the test sample."""
    rows = frame[(frame["metric"] == "excess") & (frame["source"] == source)]
    return rows.assign(loss=entropy_of(source) + rows["value"]).sort_values("flops").reset_index(drop=True)


def findings(frame: pd.DataFrame, source: str, law: str = "auto", holdout: str | None = None) -> Findings:
    rows = losses(frame, source)
    return analyse(read_runs(rows.drop(columns=["value", "stderr"]), holdout=holdout), law, cluster="trunk")


def largest(frame: pd.DataFrame, source: str) -> str:
    """The hold-out: cells above a quarter of the largest FLOPs."""
    return f"flops > {float(losses(frame, source)['flops'].max()) / 4!r}"


def floor(frame: pd.DataFrame, source: str) -> Verdict:
    found, truth = findings(frame, source, holdout=largest(frame, source)), entropy_of(source)
    lowest = losses(frame, source)["value"].min() / truth
    note = f"law {found.law}; measured is the entropy; the lowest excess is {lowest:.0%} of it"
    low, high = found.fit.intervals["E"]
    return rules.contains(Prediction(found.fit.params["E"], low, high), truth, widest=WIDEST * truth, note=note)


def held_out(frame: pd.DataFrame) -> Verdict:
    found = findings(frame, MAIN, holdout=largest(frame, MAIN))
    held = found.holdout[found.holdout["law"] == found.law]
    return rules.within(held["predicted"], held["measured"], WITHIN)


def same_cells(frame: pd.DataFrame, *sources: str) -> list[pd.DataFrame]:
    """The losses of each source in the cells (size, D, seed) that all of them have."""
    tables = [losses(frame, source) for source in sources]
    keys = [set(map(tuple, table[["n_compute", "tokens", "seed"]].to_numpy())) for table in tables]
    common = set.intersection(*keys)
    kept = []
    for table in tables:
        rows = [tuple(row) in common for row in table[["n_compute", "tokens", "seed"]].to_numpy()]
        kept.append(table[rows].drop(columns=["value", "stderr"]).reset_index(drop=True))
    return kept


def chinchilla(rows: pd.DataFrame) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(estimates, bootstrap draws) of the parameters of the additive law."""
    fitted = analyse(read_runs(rows), "chinchilla", cluster="trunk").fit
    return fitted.params, fitted.params_of(fitted.draws)


def change(frame: pd.DataFrame, name: str) -> Prediction:
    """By how much a parameter of the fit to facts changes with their noise, on the same cells."""
    (plain, plain_draws), (noisy, noisy_draws) = map(chinchilla, same_cells(frame, MAIN, NOISY))
    draws = noisy_draws[name] - plain_draws[name]
    low, high = np.quantile(draws[np.isfinite(draws)], [0.05, 0.95])
    return Prediction(noisy[name] - plain[name], float(low), float(high))


def moved(frame: pd.DataFrame) -> Verdict:
    truth = entropy_of(NOISY) - entropy_of(MAIN)
    return rules.contains(change(frame, "E"), truth, widest=truth / 2, note="measured is the worlds' difference")


def same_exponents(frame: pd.DataFrame) -> Verdict:
    """An interval wider than the exponents of a = 0.5 and 1 are apart in theory says nothing."""
    return rules.all_of(
        *(
            rules.contains(change(frame, name), 0.0, widest=theory(1.0) - theory(0.5), note=f"change of {name}")
            for name, theory in THEORY.items()
        )
    )


def flat(frame: pd.DataFrame) -> Verdict:
    rows = losses(frame, REDRAWN)
    test = slope_equivalence(np.log10(rows["n_compute"]), np.log(rows["loss"]), FLAT, rows["run"])
    return rules.null(test, "slope of log loss a decade of N")


def steeper(frame: pd.DataFrame) -> Verdict:
    """Least squares of log excess with exponents and a constant of each world; the change of each exponent."""
    plain, steep = same_cells(frame, MAIN, STEEP)
    both = pd.concat([plain, steep], ignore_index=True)
    is_steep = (np.arange(len(both)) >= len(plain)).astype(float)
    excess = both["loss"] - np.where(is_steep > 0, entropy_of(STEEP), entropy_of(MAIN))
    logs = {name: np.log(both[column] / both[column].median()) for name, column in AXES.items()}
    verdicts = []
    for name in AXES:
        others = [is_steep * logs[other] for other in AXES if other != name]
        design = np.stack([-is_steep * logs[name], *others, *logs.values(), is_steep, np.ones(len(both))], axis=1)
        found = rules.coefficient(design.astype(float), np.log(excess), both["trunk"])
        verdicts.append(rules.sign(found, +1, note=f"change of the exponent of {name}: {found.value:+.3f}"))
    return rules.all_of(*verdicts)


def exponents(frame: pd.DataFrame) -> Verdict:
    """An interval wider than the exponent itself says nothing."""
    fitted = findings(frame, MAIN, "chinchilla", largest(frame, MAIN)).fit
    verdicts = []
    for name, theory in THEORY.items():
        low, high = fitted.intervals[name]
        note = f"{name} {fitted.params[name]:.3f} [{low:.3f}, {high:.3f}], in theory {theory(0.5):.3f}"
        found = Prediction(fitted.params[name], low, high)
        verdicts.append(rules.contains(found, theory(0.5), widest=theory(0.5), note=note))
    return rules.all_of(*verdicts)


def table_rows(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """The loss of every cell, seeds side by side."""
    rows = [("source", "N", "D", "seeds", "loss", "excess")]
    for source in (MAIN, NOISY, STEEP, REDRAWN, GRAPH):
        table = losses(frame, source)
        for (n, d), cell in table.groupby(["n_compute", "tokens"]):
            seen = [f"{x:.4f}" for x in cell["loss"]], f"{cell['value'].mean():.4f}"
            rows.append((source, f"{n:,}", f"{d:,}", str(len(cell)), " ".join(seen[0]), seen[1]))
    return rows


def figures(frame: pd.DataFrame) -> dict:
    """Loss against N for each D, the law through it, and the entropy that no fit was told."""
    from matplotlib.figure import Figure

    made = {}
    for source in (MAIN, GRAPH):
        found = findings(frame, source, holdout=largest(frame, source))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        table, held = losses(frame, source), found.runs.holdout
        for i, (d, cells) in enumerate(table.groupby("tokens")):
            n = np.geomspace(table["n_compute"].min(), table["n_compute"].max(), 50)
            axes.plot(n, found.fit.predict(n, np.full(50, float(d))), color=f"C{i}", lw=1)
            open_marks = held[cells.index]
            axes.scatter(
                cells["n_compute"],
                cells["loss"],
                c=["white" if h else f"C{i}" for h in open_marks],
                edgecolors=f"C{i}",
                label=f"D = {d / 1e6:.1f}M",
                zorder=3,
            )
        axes.axhline(entropy_of(source), color="black", ls="--", lw=1)
        axes.set(xscale="log", xlabel="N (n_compute)", ylabel="loss of answer tokens, nats", title=source)
        axes.legend(fontsize=8)
        made[f"{source}: the fitted law; held-out runs are open, the dashed line is the entropy"] = figure
    return made
