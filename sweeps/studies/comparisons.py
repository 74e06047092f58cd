"""How far can a policy be pushed against a learned reward before the true reward falls?

scaling study comparisons        (about 6.5e12 FLOPs; --dial tiny for a form of seconds)

A policy writes strings of a Markov source; a judge of known taste compares pairs of them; reward models learn from the
pairs. The true reward g = z - b z^2 turns at z = 1 / (2 b), which hardly a pair shows. Arms, each scored by the true
reward: best of n and the exact optimum of E[proxy] - beta KL, both from one pool of the policy's strings, for every n
and beta at once; and policies trained by DPO on the same pairs. Laws: Gao et al. (2210.10760), in d = sqrt(KL).
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.uncertainty.clustered import Interval, clustered
from analysis.uncertainty.equivalence import slope_equivalence
from models.errors import InputError
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig, canonical_json
from scaling.data.store import open_store
from sweeps.define import Runs, children
from sweeps.studies import _gao as gao
from sweeps.studies import _rules as rules
from sweeps.studies._sizes import WIDTHS, of_width, tokens, width
from sweeps.studies._study import Claim, EvaluationSpec, Study, Verdict

QUESTION = "How far can a policy be pushed against a learned reward before the true reward falls?"
COST = "6.5e12 FLOPs"

T = 24  # of a string
NOISY = "comparisons:taste=symbols"
B = 0.2  # of its true reward z - b z^2
STRAIGHT, COIN = f"{NOISY},b=0", f"{NOISY},labels=random"
SIZES = {"d8": 8} | {size: WIDTHS[size] for size in ("S1", "S3", "S5")}
#: Pairs that a proxy learns from, and the epochs of its horizons, of which the better one is taken.
EPOCHS = {300: (4, 8), 1_000: (2, 4), 3_000: (1, 2), 10_000: (1,), 30_000: (1,)}
BETAS = (0.1, 0.3, 1.0, 3.0)
DRAWS = 8  # of random numbers
HELD_SIZE = "S5"  # and the largest number of pairs
BATCH = 16  # pairs of a step
RATE = 0.007  # at width 32

FORM = 0.05  # rms error of a forecast beyond n = 512, in the true reward, whose deviation on the source is 1.05
COEFFICIENTS = 0.1  # the same for curves that are predicted from N and pairs alone
FLAT = 0.1  # slope of the true reward over d that counts as none
NEAR = 0.1  # of the log of a ratio of predicted and measured d of the top
HUMP = 0.05  # of the true reward below its top: a fall of more is a hump


@dataclass(frozen=True)
class Cell:
    """What a run is in the study. arm: policy, proxy, coin (labels by chance), straight (b = 0), or dpo."""

    arm: str
    size: str = "S3"
    pairs: int = 0
    seed: int = 0
    beta: float = 0.0


Plan = dict[RunConfig, Cell]  # of a proxy's cell there is a run a horizon


class Dialled(NamedTuple):
    """What the dial sets of a run: the multiple of its compute, layers, and pairs that it is validated on."""

    dial: float
    layers: int = 2
    held: int = 4_096


def study(dial: float = 1.0, tiny: bool = False) -> Study:
    plan, M = (tiny_plan(), 2_048) if tiny else (full_plan(dial), 65_536)
    cells = {config.run_id: cell for config, cell in plan.items()}
    policy = next(config for config, cell in plan.items() if cell.arm == "policy")
    asked = (
        EvaluationSpec("gold", {"source": NOISY, "M": M // 4}, runs=of(cells, "dpo")),
        EvaluationSpec("pool", {"source": NOISY, "proxy": "gold", "M": M}, of(cells, "policy"), "pool-gold"),
        *(
            EvaluationSpec(
                "pool", {"source": NOISY, "proxy": "random", "draw": i, "M": M}, of(cells, "policy"), f"random-{i}"
            )
            for i in range(DRAWS)
        ),
    )
    return Study(
        "comparisons",
        QUESTION,
        tuple(plan),
        asked,
        claims(cells),
        then=functools.partial(pools, plan, {"policy": policy.run_id, "M": M}),
        table=functools.partial(table, cells),
        figures=functools.partial(figures, cells),
    )


def full_plan(dial: float) -> Plan:
    policy, set_by = policy_of(width(SIZES["S3"], dial), tokens(1e6, dial)), Dialled(dial)
    plan = {policy: Cell("policy")}
    for size in SIZES:
        for pairs in (3_000, 10_000) if size == HELD_SIZE else EPOCHS:
            for seed in range(1 if size == HELD_SIZE or pairs == max(EPOCHS) else 2):
                plan |= proxies("proxy", NOISY, size, pairs, seed, set_by)
    for seed in range(4):
        plan |= proxies("coin", COIN, "S1", 3_000, seed, set_by)
    for seed in range(3):
        plan |= proxies("straight", STRAIGHT, "S1", 10_000, seed, set_by)
    for pairs in (1_000, 3_000, 10_000):
        for beta in BETAS:
            for seed in range(2):
                plan |= pushed_by_dpo(policy, pairs, beta, seed, set_by)
    return plan


def tiny_plan() -> Plan:
    set_by = Dialled(0.1, layers=1, held=512)
    policy = policy_of(SIZES["S1"], 64 * T * 32, set_by.layers)
    plan = {policy: Cell("policy")}
    for size, pairs in (("d8", 300), ("d8", 1_000), ("S1", 300), ("S1", 1_000), ("S1", 3_000)):
        plan |= proxies("proxy", NOISY, size, pairs, 0, set_by)
    plan |= proxies("coin", COIN, "S1", 300, 0, set_by) | proxies("straight", STRAIGHT, "S1", 300, 0, set_by)
    return plan | pushed_by_dpo(policy, 300, 1.0, 0, set_by)


def policy_of(d_model: int, D: int, layers: int = 2) -> RunConfig:
    return RunConfig(
        model=of_width(d_model, vocab_size(), layers, rope_theta=100.0),
        data=DataConfig(source="markov", tokenizer="symbols", seq_len=T, valid_tokens=2_048 * T),
        optim=OptimConfig(lr=0.01, b2=0.98),
        schedule=ScheduleConfig(warmup_tokens=100 * BATCH * T),
        tokens=D,
        batch_size=64,
    )


@functools.cache
def vocab_size() -> int:
    return open_store(NOISY, "symbols").vocab_size


def data(source: str, pairs: int, seed: int, held: int) -> DataConfig:
    """Seeds differ in the pairs that are drawn too: what is learned from few pairs hangs on which."""
    return DataConfig(source, "symbols", T, seed=seed, repeat=True, unique_tokens=pairs * T, valid_tokens=held * T)


def proxies(arm: str, source: str, size: str, nominal: int, seed: int, set_by: Dialled) -> Plan:
    """The horizons of a reward model, which share a trunk."""
    d_model, pairs = width(SIZES[size], set_by.dial), tokens(nominal, set_by.dial)
    base = RunConfig(
        model=of_width(d_model, vocab_size(), set_by.layers, rope_theta=100.0),
        data=data(source, pairs, seed, set_by.held),
        optim=OptimConfig(lr=float(f"{RATE * (32 / d_model) ** 0.5:.3g}"), b2=0.98),
        schedule=ScheduleConfig(warmup_tokens=20 * BATCH * T),
        batch_size=BATCH,
        seed=seed,
        objective=ObjectiveConfig("reward"),
    )
    cell = Cell(arm, size, pairs, seed)
    return {replace(base, tokens=epochs * pairs * T): cell for epochs in EPOCHS[nominal]}


def pushed_by_dpo(policy: RunConfig, nominal: int, beta: float, seed: int, set_by: Dialled) -> Plan:
    """DPO from the policy, on the pairs that the proxy of the same size and seed sees."""
    pairs = tokens(nominal, set_by.dial)
    base = RunConfig(
        data=data(NOISY, pairs, seed, set_by.held),
        optim=OptimConfig(lr=0.001, b2=0.98, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_tokens=20 * BATCH * T),
        tokens=max(EPOCHS[nominal]) * pairs * T,
        batch_size=BATCH,
        objective=ObjectiveConfig("dpo", canonical_json({"beta": beta})),
    )
    size = next(size for size, d in SIZES.items() if d <= policy.model.d_model < 2 * d)
    return dict.fromkeys(children([policy], {"seed": [seed]}, base), Cell("dpo", size, pairs, seed, beta))


def of(cells: dict[str, Cell], *arms: str):
    return lambda config: config.run_id in cells and cells[config.run_id].arm in arms


def pools(plan: Plan, options: dict, frame: pd.DataFrame) -> tuple[Runs, tuple[EvaluationSpec, ...]]:
    """The second stage: of each reward model the horizon of the lower validation loss is asked; nothing is trained."""
    loss = frame[frame["evaluation"] == "result"].set_index("run")["value"]
    best: dict[Cell, RunConfig] = {}
    for config, cell in plan.items():
        if cell.arm in ("proxy", "coin", "straight"):
            best[cell] = min(best.get(cell, config), config, key=lambda c: loss[c.run_id])
    specs = []
    for arm in ("proxy", "coin", "straight"):
        chosen = {config.run_id for cell, config in best.items() if cell.arm == arm}
        source = STRAIGHT if arm == "straight" else NOISY
        runs = functools.partial(lambda chosen, config: config.run_id in chosen, chosen)
        specs.append(EvaluationSpec("pool", {**options, "source": source}, runs, label=f"pool-{arm}"))
    return (), tuple(specs)


def claims(cells: dict[str, Cell]) -> tuple[Claim, ...]:
    bind = functools.partial
    shared = {
        "metric": "true reward, over that of the policy",
        "controls": ("proxy = gold only rises", "a random proxy is flat", "b = 0 has no hump"),
    }
    bon = {"axis": "n of best of n, as d = sqrt(ln n - (n - 1)/n)", "law": "d (alpha - beta d)"}
    return (
        Claim(
            name="form",
            text="The form of best of n, fitted to n <= 512 of each proxy, forecasts n = 1024 to 4096.",
            holdout="n > 512",
            refuted_by=f"an rms error above {FORM} with its whole 90 % interval",
            decide=bind(decide_form, cells),
            **shared,
            **bon,
        ),
        Claim(
            name="peak",
            text="Where the true reward turns before n = 4096, the fit to n <= 512 says at which d, within 10 %.",
            holdout="n > 512",
            refuted_by="a mean of log(predicted / measured d) of the top whose 90 % interval lies beyond +-0.1",
            decide=bind(decide_peak, cells),
            **shared,
            **bon,
        ),
        Claim(
            name="coefficients",
            text="alpha and beta linear in log N and log pairs predict the curves of S5 and of the most pairs.",
            holdout="the S5 proxies and those of the largest number of pairs",
            refuted_by=f"an rms error above {COEFFICIENTS} with its whole 90 % interval",
            decide=bind(decide_coefficients, cells),
            **shared,
            **bon,
        ),
        Claim(
            name="more-pairs-more-reward",
            text="alpha rises with the number of pairs, at the same N.",
            holdout="none",
            refuted_by="a slope of alpha over log10 pairs whose 90 % interval lies below 0",
            decide=bind(decide_trend, cells, "pairs"),
            **shared,
            **bon,
        ),
        Claim(
            name="larger-proxy-more-reward",
            text="alpha rises with N of the reward model, at the same number of pairs.",
            holdout="none",
            refuted_by="a slope of alpha over log10 N whose 90 % interval lies below 0",
            decide=bind(decide_trend, cells, "n_compute"),
            **shared,
            **bon,
        ),
        Claim(
            name="optimum-follows-best-of-n",
            text="The exact optimum follows d (alpha - beta d), as a tilted normal does, not d (alpha - beta log d).",
            axis="beta of the optimum, as d = sqrt(KL), KL < ln M - 3",
            law="d (alpha - beta d) against Gao's for RL, d (alpha - beta log d)",
            holdout="the upper half of the KL",
            refuted_by="the form for RL forecasts the upper half with the smaller rms error",
            decide=bind(decide_optimum, cells),
            **shared,
        ),
        Claim(
            name="gold-only-rises",
            text="Control: the best of n by the true reward itself only rises.",
            holdout="none",
            refuted_by="a fall between two n of more than twice its standard error",
            decide=bind(decide_gold, cells),
            runs=of(cells, "policy"),
            **shared,
            **bon,
        ),
        Claim(
            name="false-alarm",
            text="Yet the form fitted to it at n <= 512 announces a fall by n = 4096 that is not there.",
            holdout="n > 512",
            refuted_by=f"a forecast for n = 4096 that is less than {HUMP} below what is measured",
            decide=bind(decide_alarm, cells),
            runs=of(cells, "policy"),
            **shared,
            **bon,
        ),
        Claim(
            name="random-is-flat",
            text="Control: best of n by random numbers leaves the true reward as it is.",
            holdout="none",
            refuted_by=f"a slope over d beyond +-{FLAT}, whose 90 % interval excludes 0",
            decide=bind(decide_flat, cells),
            runs=of(cells, "policy", "coin"),
            **shared,
            **bon,
        ),
        Claim(
            name="no-curvature-no-hump",
            text="Control: where the true reward is z itself, b = 0, no reward model makes it fall by n = 4096.",
            holdout="none",
            refuted_by=f"a mean fall from the top to n = 4096 of more than {HUMP}, with its whole 90 % interval",
            decide=bind(decide_straight, cells),
            runs=of(cells, "policy", "straight", "proxy"),
            **shared,
            **bon,
        ),
        Claim(
            name="dpo-below-the-optimum",
            text="A policy trained by DPO has less true reward than the optimum of a reward model of the same pairs "
            "at the same KL.",
            axis="KL to the policy, nats a string",
            law="none: against the optimum, interpolated in d",
            holdout="none",
            refuted_by="a mean difference above 0 with its whole 90 % interval",
            decide=bind(decide_dpo, cells),
            runs=of(cells, "policy", "dpo", "proxy"),
            **shared,
        ),
    )


def decide_form(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    curve = gao.curves(frame, cells, "pool-proxy")
    return gao.below(gao.forecast(curve, curve["k"] <= gao.FITTED), FORM)


def decide_peak(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    curve = gao.curves(frame, cells, "pool-proxy")
    found = []
    for run, rows in curve.groupby("run"):
        rows = rows.sort_values("k")
        fall = rows["gain"].max() - rows["gain"].iloc[-1]
        alpha, beta = gao.coefficients(rows[rows["k"] <= gao.FITTED])
        if fall > HUMP and np.isfinite(gao.top_of(rows)):
            predicted = alpha / (2 * beta) if beta > 0 else np.inf
            found.append({"run": run, "measured": gao.top_of(rows), "predicted": predicted})
    total = curve["run"].nunique()
    if len(found) < 3:
        raise InputError(f"{len(found)} of {total} proxies turn by more than {HUMP} before n = 4096; 3 are needed")
    tops = pd.DataFrame(found)
    tops["error"] = np.log(tops["predicted"] / tops["measured"])
    test = clustered(tops, lambda rows: float(rows["error"].mean()), "run", draws=400)
    near, far = max(-test.low, test.high) <= NEAR, max(test.low, -test.high) > NEAR
    verdict = "upheld" if near else "refuted" if far else "undecided"
    said = f"{len(tops)} of {total} proxies turn; log ratio {test.value:+.3f} [{test.low:+.3f}, {test.high:+.3f}]"
    measured, predicted = (float(np.exp(np.log(tops[x]).mean())) for x in ("measured", "predicted"))
    ends = [measured * np.exp(x) for x in (test.low, test.high)]
    return Verdict("", verdict, predicted, *ends, measured, f"{said}; d of the top, geometric means")


def is_held(rows: pd.DataFrame) -> pd.Series:
    return (rows["size"] == HELD_SIZE) | (rows["pairs"] == rows["pairs"].max())


def decide_coefficients(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    curve = gao.curves(frame, cells, "pool-proxy")
    runs = gao.by_run(curve)
    seen, held = runs[~is_held(runs)], runs[is_held(runs)]
    weights = np.linalg.lstsq(gao.design(seen), seen[["alpha", "beta"]].to_numpy(), rcond=None)[0]
    predicted = dict(zip(held["run"], gao.design(held) @ weights, strict=True))
    rows = curve[is_held(curve)].reset_index(drop=True)
    of_run = np.stack([predicted[run] for run in rows["run"]])
    rows["predicted"] = np.sum(gao.form(rows["d"].to_numpy(), "best_of_n") * of_run, axis=1)
    (_, a_n, a_p), (_, b_n, b_p) = weights.T
    said = f"a decade of N: alpha {a_n:+.3f}, beta {b_n:+.3f}; of pairs: alpha {a_p:+.3f}, beta {b_p:+.3f}"
    return gao.below(rows, COEFFICIENTS, said)


def decide_trend(cells: dict[str, Cell], along: str, frame: pd.DataFrame) -> Verdict:
    runs = gao.by_run(gao.curves(frame, cells, "pool-proxy"))
    column = {"n_compute": 1, "pairs": 2}[along]
    # Of cells, as seeds of one share N and pairs; both axes are in the fit, so that neither stands for the other.
    runs["cell"] = [f"{size} {pairs}" for size, pairs in zip(runs["size"], runs["pairs"], strict=True)]

    def slope(rows: pd.DataFrame, of: str = "alpha") -> float:
        return float(np.linalg.lstsq(gao.design(rows), rows[of].to_numpy(), rcond=None)[0][column])

    also = f"of beta {slope(runs, 'beta'):+.3f}; a decade"
    return rules.sign(clustered(runs, slope, "cell", draws=400), +1, note=also)


def decide_optimum(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    curve = gao.curves(frame, cells, "pool-proxy", "optimum")
    lower = curve["kl"] <= curve.groupby("run")["kl"].transform("max") / 2
    errors = {law: gao.rms(gao.forecast(curve, lower, law)) for law in ("best_of_n", "rl_reward")}
    return rules.chosen(errors, "best_of_n")


def gold_curve(cells: dict[str, Cell], frame: pd.DataFrame) -> pd.DataFrame:
    return gao.curves(frame, cells, "pool-gold").sort_values("k").reset_index(drop=True)


def decide_gold(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    rows = gold_curve(cells, frame)
    error = rows["stderr"].to_numpy()
    steps, noise = np.diff(rows["value"]), np.hypot(error[1:], error[:-1])
    worst = int(np.argmin(steps / noise))
    verdict = "refuted" if steps[worst] < -2 * noise[worst] else "upheld"
    note = f"smallest step up {steps[worst]:+.4f}, to n = {rows['k'].iloc[worst + 1]:.0f}"
    return Verdict("", verdict, None, None, None, steps[worst], note)


def decide_alarm(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    rows = gold_curve(cells, frame)
    last = gao.forecast(rows, rows["k"] <= gao.FITTED).iloc[-1]
    alpha, beta = gao.coefficients(rows[rows["k"] <= gao.FITTED])
    short = last["gain"] - last["predicted"]
    note = f"a top announced at d = {alpha / (2 * beta):.2f}, n = {last['k']:.0f} forecast {short:.3f} too low"
    verdict = "upheld" if short > HUMP and beta > 0 else "refuted"
    return Verdict("", verdict, last["predicted"], None, None, last["gain"], note)


def decide_flat(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    """Of labels by chance a reward model of 16 tastes learns a direction of its own, by chance along the true one or
    against it: their slopes are shown, and scatter around zero.
    """
    draws = [gao.curves(frame, cells, f"random-{i}").assign(draw=i) for i in range(DRAWS)]
    random = pd.concat(draws, ignore_index=True)
    test = slope_equivalence(random["d"], random["gain"], FLAT, random["draw"])
    coin = gao.curves(frame, cells, "pool-coin").groupby("run")
    slopes = [f"{np.polyfit(rows['d'], rows['gain'], 1)[0]:+.3f}" for _, rows in coin]
    return noted(rules.null(test, "slope over d"), f"reward models of labels by chance: {', '.join(slopes)}")


def noted(verdict: Verdict, note: str) -> Verdict:
    return replace(verdict, note=rules.joined(verdict.note, note))


def decide_straight(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    falls = gao.fall_of(gao.curves(frame, cells, "pool-straight"))
    bent = gao.fall_of(gao.curves(frame, cells, "pool-proxy"))
    found = clustered(falls, lambda rows: float(rows["fall"].mean()), "run", draws=400)
    verdict = "upheld" if found.high <= HUMP else "refuted" if found.low > HUMP else "undecided"
    note = f"mean fall of {found.clusters} proxies; with b = 0.2 {bent['fall'].mean():.3f} of {len(bent)}"
    return Verdict("", verdict, 0.0, found.low, found.high, found.value, note)


def pushed(cells: dict[str, Cell], frame: pd.DataFrame) -> pd.DataFrame:
    """A row a DPO run: beta, pairs, seed, its KL and true reward over the policy's, and that of the optimum there."""
    rows = rules.rows_of(frame, "gold")
    wide = rows.pivot_table(index="run", columns="metric", values="value").reset_index()
    base = rules.rows_of(frame, "pool-gold", metric="best_of_n", k=1)["value"].iloc[0]
    about = pd.DataFrame([vars(cells[run]) for run in wide["run"]])
    wide = pd.concat([wide.assign(gain=wide["gold"] - base, d=np.sqrt(wide["kl"])), about], axis=1)
    optima = gao.curves(frame, cells, "pool-proxy", "optimum")

    def at_same_kl(row: pd.Series) -> float:
        same = optima[(optima["size"] == row["size"]) & (optima["pairs"] == row["pairs"])]
        same = same.groupby("kl", as_index=False)[["d", "gain"]].mean().sort_values("d")
        inside = len(same) and row["d"] <= same["d"].max()
        return float(np.interp(row["d"], [0, *same["d"]], [0, *same["gain"]])) if inside else np.nan

    return wide.assign(optimum=wide.apply(at_same_kl, axis=1))


def decide_dpo(cells: dict[str, Cell], frame: pd.DataFrame) -> Verdict:
    rows = pushed(cells, frame)
    inside = rows.dropna(subset=["optimum"])
    if len(inside) < 3:
        raise InputError(f"{len(inside)} of {len(rows)} policies have a KL that a pool reaches; 3 are needed")
    found: Interval = clustered(inside, lambda r: float((r["gain"] - r["optimum"]).mean()), "run", draws=400)
    return rules.sign(found, -1, note=f"{len(inside)} of {len(rows)} policies have a KL that the pool reaches")


def table(cells: dict[str, Cell], frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """Of each proxy its loss, correlation with the true reward, coefficients and tops of best of n, and coefficients of
    the optimum, where theory has beta = b alpha^2; then the policies.
    """
    curve, optima = (gao.curves(frame, cells, "pool-proxy", arm) for arm in ("best_of_n", "optimum"))
    correlation = rules.rows_of(frame, "pool-proxy", metric="correlation").set_index("run")["value"]
    loss = frame[frame["evaluation"] == "result"].set_index("run")["value"]
    falls = gao.fall_of(curve).set_index("run")["fall"]
    heads = ("loss", "r", "alpha", "beta", "top d: fit", "measured", "fall", "optimum: alpha", "beta", "b alpha^2")
    rows = [("proxy", "N", "pairs", "seed", *heads)]
    for _, row in gao.by_run(curve).sort_values(["n_compute", "pairs", "seed"]).iterrows():
        run = row["run"]
        top = row["alpha"] / (2 * row["beta"]) if row["beta"] > 0 else np.inf
        alpha, beta = gao.coefficients(optima[optima["run"] == run])
        numbers = (loss[run], correlation[run], row["alpha"], row["beta"], top, gao.top_of(curve[curve["run"] == run]))
        names = (row["size"], f"{row['n_compute']:,}", f"{row['pairs']:,}", str(row["seed"]))
        rows.append((*names, *map(shown, (*numbers, falls[run], alpha, beta, B * alpha**2))))
    blank = ("",) * (len(heads) - 3)
    rows.append(("DPO", "beta", "pairs", "seed", "KL", "gold", "optimum", *blank))
    for _, row in pushed(cells, frame).sort_values(["pairs", "beta", "seed"]).iterrows():
        names = (row["size"], f"{row['beta']:g}", f"{row['pairs']:,}", str(row["seed"]))
        rows.append((*names, *map(shown, (row["kl"], row["gain"], row["optimum"])), *blank))
    return rows


def shown(x: float) -> str:
    return f"{x:.3f}" if np.isfinite(x) else "-"


def figures(cells: dict[str, Cell], frame: pd.DataFrame) -> dict:
    """True reward against d: best of n and optimum of each number of pairs, and the policies of DPO."""
    from matplotlib.figure import Figure

    made = {}
    for arm, law in (("best_of_n", "best of n"), ("optimum", "exact optimum and DPO (crosses)")):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        curve = gao.curves(frame, cells, "pool-proxy", arm)
        for i, (pairs, cell) in enumerate(curve.groupby("pairs")):
            for j, (_, rows) in enumerate(cell.sort_values("d").groupby("run")):
                axes.plot(rows["d"], rows["gain"], color=f"C{i}", lw=1, label=f"{pairs:,} pairs" if j == 0 else None)
        gold = gao.curves(frame, cells, "pool-gold", arm).sort_values("d")
        axes.plot(gold["d"], gold["gain"], color="black", ls="--", label="by the true reward")
        if arm == "optimum":
            dpo = pushed(cells, frame)
            colours = {pairs: f"C{i}" for i, pairs in enumerate(sorted(curve["pairs"].unique()))}
            axes.scatter(dpo["d"], dpo["gain"], marker="x", c=[colours.get(pairs, "grey") for pairs in dpo["pairs"]])
        axes.set(xlabel="d = sqrt(KL), nats", ylabel="true reward over the policy's", title=law)
        axes.legend(fontsize=8)
        made[f"{law}: true reward against distance from the policy"] = figure
    return made
