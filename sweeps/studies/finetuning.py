"""What is pretraining worth for finetuning, when do adapters run out of room, and what is forgotten?

scaling study finetuning         (1.6e13 FLOPs; --dial tiny for a form of seconds)

Transfer (`_transferred.py`): models pretrained on facts are finetuned on questions about a world that shares none, half
or all of them; D_T is what models from scratch would need to get as good, less what finetuning took. Storage
(`_stored.py`): M fresh facts of 10 bits through adapters of a rank, or by full tuning; the bits that come back, the
loss on the base's world, and replay.

At the default dial 7 claims upheld, 3 refuted, 5 undecided (docs/studies.md): adapters hold 1.4 bits a parameter; a
third of D_T comes without one shared fact; forgetting is a matter of the rate.
"""

from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from sweeps.define import union, where
from sweeps.studies import _stored as stored
from sweeps.studies import _transferred as transferred
from sweeps.studies._study import Claim, EvaluationSpec, Study

QUESTION = "What is pretraining worth for finetuning, when do adapters run out of room, and what is forgotten?"
COST = "1.6e13 FLOPs"

SIZES = ("S1", "S3", "S4")
D_P = (0.5e6, 1e6, 2e6)
D_F = tuple(float(2**k) for k in (12, 14, 16, 18))
D_SCRATCH = tuple(float(2**k) for k in range(12, 22))
FACTS = (125, 250, 500, 1000, 2000)
RANKS = (1, 2, 4, 8, 16, stored.FULL)
MIDDLE = 500  # facts, of the controls and of replay


def study(dial: float = 1.0, tiny: bool = False) -> Study:
    """dial: of the compute of transfer; above 1, N and D grow with its root. What is stored keeps its size, as the law
    is one of parameters and bits.
    """
    if tiny:
        return assembled(
            ("S1",), (20_000.0,), (2**10, 2**12), (2**12, 2**13, 2**14), (32, 64), (1, stored.FULL), 1, 1, layers=1
        )
    return assembled(SIZES, D_P, D_F, D_SCRATCH, FACTS, RANKS, 3, dial)


def assembled(
    sizes: tuple[str, ...],
    D_p: tuple[float, ...],
    D_F: tuple[float, ...],
    D_scratch: tuple[float, ...],
    facts: tuple[int, ...],
    ranks: tuple[int, ...],
    count: int,
    dial: float,
    layers: int = 2,
) -> Study:
    """count: seeds of what is stored; transfer has one less, at least one."""
    every = transferred.pretraining(sizes, D_p, count, dial, layers)
    parents = where(every, lambda run: run.seed < max(1, count - 1))
    asked, cells = transferred.planned(parents, sizes, D_scratch, D_F, dial)
    bases = transferred.pretraining(("S3",) if "S3" in sizes else sizes[:1], D_p[-1:], count, min(dial, 1.0), layers)
    whole = MIDDLE in facts
    middle, shares = (MIDDLE, stored.SHARES) if whole else (facts[0], stored.SHARES[-1:])
    stores, held = stored.planned(bases, facts, ranks, middle, shares, whole)
    return Study(
        "finetuning",
        QUESTION,
        union(parents, asked, bases, stores),
        evaluations(held),
        (*claims_of_transfer(cells), *claims_of_storage(held, middle)),
        table=lambda frame: table_rows(frame, cells, held),
        figures=lambda frame: figures(frame, cells, held),
    )


def evaluations(held: stored.Cells) -> tuple[EvaluationSpec, ...]:
    """Bits of every run that stores facts, of those alone where replay is mixed in; and what is forgotten."""
    own = {run for run, cell in held.items() if cell["arm"] not in ("replay", "untouched")}
    mixed = {cell["asked"] for cell in held.values() if cell["arm"] == "replay"}
    asked = [EvaluationSpec("answers", {"n": 16_384}, lambda run: run.run_id in own)]
    for i, source in enumerate(sorted(mixed)):
        of = {run for run, cell in held.items() if cell["arm"] == "replay" and cell["asked"] == source}
        options = {"n": 16_384, "source": source}
        asked.append(EvaluationSpec("answers", options, lambda run, of=of: run.run_id in of, f"answers-{i}"))
    old = {"source": stored.BASE, "subset": "answer", "n": 4096}
    forgot = {run for run, cell in held.items() if cell["forgets"]}
    return (*asked, EvaluationSpec("loss", old, lambda run: run.run_id in forgot, "forgetting"))


def claims_of_transfer(cells: transferred.Cells) -> tuple[Claim, ...]:
    shared = {
        "metric": "tokens transferred: D_T = D_scratch(L) - D_F",
        "axis": "rho, N (n_compute) and D_F (tokens of finetuning)",
        "runs": lambda run: run.run_id in cells,
    }
    facts = "rho 0 with permuted symbols: what is transferred without a fact or a symbol in its place"
    of_law = "D_T = k D_F^alpha N^beta at rho 1, points beyond the horizon from scratch kept as at least that"
    largest = "finetuned runs above a quarter of the largest FLOPs"
    factor, alike = transferred.FACTOR, transferred.ALIKE
    return (
        Claim(
            name="sharing-pays",
            text="D_T rises with the share of facts that finetuning has in common with pretraining: rho 0 < 0.5 < 1.",
            law="none",
            controls=(facts,),
            holdout="none",
            refuted_by="a mean log ratio of D_T, 0.5 to 0 or 1 to 0.5, whose 90 % interval by parent lies below 0",
            decide=lambda frame: transferred.sharing_pays(frame, cells),
            **shared,
        ),
        Claim(
            name="transfer-law",
            text=f"The law of D_T forecasts the D_T of the largest runs within a factor of {factor}.",
            law=of_law,
            controls=(facts,),
            holdout=largest,
            refuted_by=f"a held-out D_T that is off by more than a factor of {factor}; beyond the horizon, a forecast "
            "that falls short of the horizon by as much",
            decide=lambda frame: transferred.held_out(frame, cells),
            **shared,
        ),
        Claim(
            name="larger-models-gain-more",
            text="At equal D_F a larger model gains more tokens from its pretraining: beta > 0.",
            law=of_law,
            controls=(facts,),
            holdout=largest,
            refuted_by="a 90 % interval of beta, by parent, that lies below 0",
            decide=lambda frame: transferred.larger_gain_more(frame, cells),
            **shared,
        ),
        Claim(
            name="better-than-its-rival",
            text="The loss of the largest runs is forecast better through D_T than by L = (A D_p^-alpha + G) D_F^-beta "
            "+ E, fitted at each N.",
            law="transfer, against pretrained",
            controls=(),
            holdout=largest,
            refuted_by=f"a root mean square error of log loss that is above the rival's by a factor of "
            f"{transferred.BETTER}",
            decide=lambda frame: transferred.against_rival(frame, cells),
            **shared,
        ),
        Claim(
            name="symbols-do-not-matter",
            text="Without shared facts D_T does not depend on whether the symbols are those of pretraining.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a mean ratio of D_T, rho 0 to permuted, that differs from 1, by more than a factor of {alike}",
            decide=lambda frame: transferred.symbols_do_not_matter(frame, cells),
            **shared,
        ),
        Claim(
            name="nothing-from-another-world",
            text="With no fact shared and symbols permuted D_T is near 0: below a tenth of that with all facts shared.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a mean ratio of D_T, permuted to rho 1, whose 90 % interval by parent lies above "
            f"{transferred.NEAR_ZERO}",
            decide=lambda frame: transferred.nothing_from_another_world(frame, cells),
            **shared,
        ),
    )


def claims_of_storage(held: stored.Cells, middle: int) -> tuple[Claim, ...]:
    shared = {"runs": lambda run: run.run_id in held}
    bits = {"metric": "bits stored: M (10 + mean log-probability of a value / ln 2)", "axis": "rank and M"} | shared
    old = {"metric": "loss on values of the base's world, nats a token", "axis": "rank, replay"} | shared
    redrawn = "values redrawn at every occurrence: 0 bits"
    parted, equal = f"{stored.PARTED:.0%}", f"{stored.EQUAL:.0%}"
    return (
        Claim(
            name="capacity",
            text="The law of capacity, fitted without the most facts, forecasts the bits that each rank stores of "
            f"these within {stored.WITHIN:.0%}.",
            law="B = ((10 M)^-s + (c P)^-s)^(-1/s), P parameters of the adapters",
            controls=(redrawn,),
            holdout="all cells of the largest M",
            refuted_by=f"a held-out cell, the mean of its seeds, that is off by more than {stored.WITHIN:.0%}",
            decide=lambda frame: stored.capacity(frame, held),
            **bits,
        ),
        Claim(
            name="knee",
            text=f"The rank that stores {stored.KNEE:.0%} of the facts grows in proportion to M: slope 1 in logs.",
            law="log rank = a + b log M, cells whose knee lies beyond the ranks kept as censored",
            controls=(redrawn,),
            holdout="none",
            refuted_by="a 90 % interval of the slope that lies outside of 0.75 to 1.25",
            decide=lambda frame: stored.knee(frame, held),
            **bits,
        ),
        Claim(
            name="runs-out-of-room",
            text=f"The largest rank stores what full tuning does up to M {middle}, and below {parted} of it at the "
            "most facts.",
            law="none",
            controls=(redrawn,),
            holdout="none",
            refuted_by=f"a mean ratio that differs from 1 and by more than {equal} up to M {middle}; or one at the "
            f"most facts whose 90 % interval lies above {parted}",
            decide=lambda frame: stored.runs_out(frame, held, middle),
            **bits,
        ),
        Claim(
            name="nothing-to-store",
            text="Values that are redrawn at every occurrence store no bits.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a mean that differs from 0 and by more than {stored.NOTHING:.0%} of the bits of as many facts",
            decide=lambda frame: stored.nothing(frame, held),
            **bits,
        ),
        Claim(
            name="adapters-forget-no-less",
            text=f"At M {middle}, where both store all, the largest rank does not forget less of the base's world than "
            "full tuning.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a difference of the losses, adapters less full, whose 90 % interval lies below -{stored.LESS}",
            decide=lambda frame: stored.forgets_no_less(frame, held, middle),
            **old,
        ),
        Claim(
            name="one-percent-is-not-enough",
            text="1 % of replay leaves more than a tenth of the rise of the loss on the base's world.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a share of the rise without replay whose 90 % interval lies below {stored.LEFT}",
            decide=lambda frame: stored.one_percent(frame, held, middle),
            **old,
        ),
        Claim(
            name="replay-law",
            text=f"The rise of that loss falls with the share p of replay as F / (1 + B p)^alpha; half of the rows are "
            f"forecast within {stored.RISE:.0%}.",
            law="log rise = log F - alpha log(1 + B p), 2502.06042 at one size and number of tokens",
            controls=(),
            holdout="the largest share",
            refuted_by=f"a rise at the largest share, the mean of its seeds, off by more than {stored.RISE:.0%}",
            decide=lambda frame: stored.replay(frame, held, middle),
            **old,
        ),
        Claim(
            name="marker",
            text=f"A marker before the key saves at least {stored.SAVED} nats of the loss on the base's world, at an "
            "equal rate and no fewer bits.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a difference of the losses, without less with the marker, whose 90 % interval lies below "
            f"{stored.SAVED}; or bits that are fewer by more than {equal}",
            decide=lambda frame: stored.saved(frame, held, middle, "marker"),
            **old,
        ),
        Claim(
            name="slower-forgets-less",
            text=f"Full tuning at a quarter of the rate, {stored.SLOW} for {stored.TUNING}, saves at least "
            f"{stored.SAVED} nats of that loss, at no fewer bits.",
            law="none",
            controls=(),
            holdout="none",
            refuted_by=f"a difference of the losses, whose 90 % interval lies below {stored.SAVED}; or bits that are "
            f"fewer by more than {equal}",
            decide=lambda frame: stored.saved(frame, held, middle, "slow"),
            **old,
        ),
    )


def table_rows(frame: pd.DataFrame, cells: transferred.Cells, held: stored.Cells) -> list[tuple[str, ...]]:
    """D_T of every cell; bits and loss on the base's world by facts and rank, and of the other arms: means of seeds."""
    rows = [*transfer_rows(frame, cells), (), *storage_rows(stored.stored(frame, held))]
    width = max(map(len, rows))
    return [row + ("",) * (width - len(row)) for row in rows]


def transfer_rows(frame: pd.DataFrame, cells: transferred.Cells) -> list[tuple[str, ...]]:
    """Geometric means of the seeds; > where one of them is beyond the horizon, < where below what can be told."""
    try:
        table = transferred.transfers(frame, cells)
    except InputError:  # runs are lacking: the verdicts say which
        return [("D_T, tokens",)]
    D = sorted(table["tokens"].unique())
    rows = [("D_T, tokens", "N", "D_p", *(f"D_F {d:,}" for d in D))]
    for (arm, n, D_p), of in table.groupby(["arm", "n_compute", "D_p"]):
        shown = []
        for d in D:
            cell = of[of["tokens"] == d]
            bound = ">" if (cell["side"] > 0).any() else "<" if (cell["side"] < 0).any() else ""
            shown.append(f"{bound}{np.exp(np.log(cell['D_T']).mean()):,.0f}" if len(cell) else "")
        name = arm if arm == transferred.PERMUTED else f"rho {arm}"
        rows.append((name, f"{n:,}", f"{D_p:,.0f}", *shown))
    return rows


def storage_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    grid = table[table["arm"] == "grid"]
    ranks = sorted(grid["rank"].unique(), key=lambda rank: rank or np.inf)
    rows = [("bits stored", "M", "", *(f"rank {rank}" if rank else "full" for rank in ranks))]
    for M, of in grid.groupby("M"):
        mean = of.groupby("rank")["bits"].mean()
        rows.append(("grid", f"{M:,}", "", *(f"{mean[rank]:,.0f}" for rank in ranks)))
    forgot = grid[grid["old"].notna()]
    for M, of in forgot.groupby("M"):
        mean = of.groupby("rank")["old"].mean()
        rows.append(("loss on the base's world", f"{M:,}", "", *(f"{mean[rank]:.2f}" for rank in ranks)))
    rows += [(), ("other arms", "M", "rank", "replay", "bits", "loss on the base's world")]
    for (arm, M, rank, share), of in table[table["arm"] != "grid"].groupby(["arm", "M", "rank", "share"]):
        old = "" if of["old"].isna().all() else f"{of['old'].mean():.3f}"
        rows.append((arm, f"{M:,}", str(rank or "full"), f"{share:.1%}", f"{of['bits'].mean():,.0f}", old))
    return rows


def figures(frame: pd.DataFrame, cells: transferred.Cells, held: stored.Cells) -> dict[str, Any]:
    """D_T against D_F, an arm a panel, with the law; and bits stored against the adapters' parameters."""
    from matplotlib.figure import Figure

    made = {}
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(transferred.ARMS), sharey=True)
    for panel, arm in zip(panels, transferred.ARMS, strict=True):
        rows = transferred.main_arm(frame, cells, arm)
        for i, (n, of) in enumerate(rows.groupby("n_compute")):
            for side, marker in {0: "o", 1: "^", -1: "v"}.items():
                some = of[of["side"] == side]
                face = ["white" if held_out else f"C{i}" for held_out in some["held"]]
                panel.scatter(some["tokens"], some["D_T"], c=face, edgecolors=f"C{i}", marker=marker, zorder=3)
            panel.plot([], [], "o", color=f"C{i}", label=f"N = {n:,}")
            if arm == transferred.ALL:
                D = np.geomspace(of["tokens"].min(), of["tokens"].max(), 20)
                at = pd.DataFrame({"tokens": D, "n_compute": n})
                panel.plot(D, transferred.forecast(transferred.law(rows), at), color=f"C{i}", lw=1)
        name = arm if arm == transferred.PERMUTED else f"rho = {arm}"
        panel.set(xscale="log", yscale="log", xlabel="D_F, tokens", title=name)
    panels[0].set(ylabel="D_T, tokens")
    panels[0].legend(fontsize=7)
    made["Data transferred; the law at rho 1, held-out runs open; triangles are bounds"] = figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (M, of) in enumerate(stored.adapters(frame, held).groupby("M")):
        axes.scatter(of["n_trained"], of["bits"], color=f"C{i}", label=f"M = {M:,}", s=14)
        axes.axhline(stored.BITS * M, color=f"C{i}", ls=":", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="parameters of the adapters", ylabel="bits stored")
    axes.legend(fontsize=8)
    made["Bits stored by adapters; dotted, the bits of the facts"] = figure
    return made
