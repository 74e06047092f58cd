"""The study of thinking time: its rules on planted measurements, and its tiny form, run."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.estimators import pass_at_k_exact
from sweeps.cli.main import main
from sweeps.studies import thinking as study
from sweeps.studies._study import load_study

rng = np.random.default_rng(0)
SIZES, D = (10_000, 30_000, 60_000), (4e5, 8e5, 16e5, 32e5)


def rows_of_run(run: int, source: str, n: int, d: float, seed: int, evaluation: str, rows: list[dict]) -> list[dict]:
    about = {"run": f"r{run}", "trunk": f"{source} {n} {seed}", "source": source, "n_compute": n, "tokens": int(d)}
    about |= {"flops": 6.0 * n * d, "seed": seed, "status": "finished", "loss": 1.0, "evaluation": evaluation}
    return [about | {"stderr": 0.005, "n": 256} | row for row in rows]


def frame_of(s: float = 0.3, u: float = 0.7, fall: float = 0.0) -> pd.DataFrame:
    """Signs whose odds are 0.1 (N / 10^4)^s (D / 4e5)^u, searched with a verifier; a majority that falls at the end."""
    rows, run = [], 0
    for n in SIZES:
        for d in D:
            for seed in (0, 1):
                p = 1 / (1 + 10 * (n / 1e4) ** -s * (d / 4e5) ** -u)
                own = [{"metric": "success", "value": p}]
                own += [{"metric": "pass@k", "k": float(k), "value": 1 - (1 - p) ** k} for k in study.KS]
                own.append(
                    {"metric": "accuracy", "arm": "greedy", "budget": 1, "value": p, "flops_a_problem": 34.0 * n}
                )
                for b in study.BUDGETS:
                    spent = {"budget": b, "flops_a_problem": 2.0 * n * (10 + 7 * (1 - (1 - p) ** b) / p)}
                    own.append({"metric": "accuracy", "arm": "verifier", "value": 1 - (1 - p) ** b} | spent)
                    for arm, value in {"verifier": 1 - (1 - p) ** b, "majority": p - fall * (b > 64)}.items():
                        blocks = value + 0.001 * rng.normal(size=20)
                        own += [
                            {"metric": "block_accuracy", "arm": arm, "budget": float(b), "block": i, "value": x}
                            for i, x in enumerate(blocks)
                        ]
                rows += rows_of_run(run, study.DIRECT, n, d, seed, "curve", own)
                run += 1
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return frame_of()


def test_the_logit_law_finds_planted_exponents_beyond_what_it_was_fitted_on(frame):
    verdict = study.logit_law(frame)
    assert verdict.verdict == "upheld", verdict.note
    assert "s 0.300" in verdict.note
    assert "u 0.700" in verdict.note
    bent = frame.copy()
    large = (bent["metric"] == "success") & (bent["flops"] > bent["flops"].max() / 4)
    bent.loc[large, "value"] *= 0.7
    assert study.logit_law(bent).verdict == "refuted", "a law that fails where it was not fitted must not be upheld"


def test_the_exchange_rate_is_that_of_samples_needed(frame):
    """Samples until 90 % go as 1 / p where p is small, so s is nearly u, less for the prompt that is read once."""
    verdict = study.exchange(frame)
    assert verdict.verdict == "upheld", verdict.note
    assert 0.3 < verdict.measured < 0.7
    assert study.exchange(frame_of(u=0.01)).verdict == "refuted"


def test_a_curve_that_falls_is_found_and_named(frame):
    assert study.monotone(frame[frame["tokens"] == D[0]], ["verifier", "majority"]).verdict == "upheld"
    falling = frame_of(fall=0.05)
    verdict = study.monotone(falling[falling["tokens"] == D[0]], ["majority"])
    assert verdict.verdict == "refuted"
    assert "majority of signs:k=8,largest=9 N " in verdict.note
    assert "64 to 128" in verdict.note


def test_small_models_with_a_verifier_against_greedy_ones(frame):
    """At 6 times the FLOPs a token the large model's greedy answer, 17 tokens, costs what 102 of the small one do: more
    than it needs on average until it is right, 10 + 7 / p = 87.
    """
    verdict = study.search_against_training(frame)
    p_small, p_large = 1 / 11, 1 / (1 + 10 * 6**-0.3 * 8**-0.7)
    assert verdict.predicted == pytest.approx(p_large)
    assert 10 + 7 / p_small < 6 * 17
    assert verdict.measured == pytest.approx(1)
    assert verdict.verdict == "upheld"


def facts_of(p: np.ndarray) -> pd.DataFrame:
    rows = [{"metric": "p", "problem": i, "value": x} for i, x in enumerate(p)]
    passes = pass_at_k_exact(p, study.KS).mean(axis=0)
    rows += [{"metric": "pass@k", "k": float(k), "value": x} for k, x in zip(study.KS, passes, strict=True)]
    return pd.DataFrame(rows_of_run(99, study.TRACE, 30_000, 1e6, 0, "hops2", rows))


def test_coverage_is_told_by_its_tail(frame):
    """-log p of a density e^(b x) at its hard end gives -log pass@k ~ k^-b; equal p decay exponentially."""
    heavy = facts_of(np.exp(-rng.exponential(10, 2000)))
    both = study.falsification(pd.concat([heavy, frame[frame["flops"] > 1e11]]))
    assert both.verdict == "upheld", both.note
    equal = facts_of(np.full(2000, 0.05) * rng.uniform(0.9, 1.1, 2000))
    assert study.falsification(pd.concat([equal, frame])).verdict == "refuted"
    errors = study.coverage_fits(heavy)["r99"]
    assert set(errors) == {"pass_at_k", "pass_at_k_beta", "pass_at_k_lognormal"}


def test_what_a_trace_is_worth_in_parameters():
    """Without a trace p at N is that with one at N / 2."""
    rows = []
    for i, n in enumerate((10_000, 20_000, 40_000, 80_000)):
        for label, source, size in (("hops", study.TRACE, n), ("plain", study.PLAIN, n / 2)):
            if label == "plain" and n > 40_000:
                continue
            p = size / 1e5
            for hops, value in ((1, 0.5), (2, p / (1 + p))):
                row = [{"metric": "pass@k", "k": 1.0, "value": value}]
                rows += rows_of_run(i, source, n, 1e6, 0, f"{label}{hops}", row)
    verdict = study.trace_ratio(pd.DataFrame(rows))
    assert verdict.measured == pytest.approx(2)
    assert verdict.verdict == "upheld"


def test_every_claim_says_what_would_refute_it_and_both_dials_load():
    for dial in (None, "tiny", 2):
        _, loaded = load_study("thinking", dial)
        assert len(loaded.claims) == 12
        for spec in loaded.evaluations:
            assert any(spec.asks(config) for config in loaded.runs), f"{spec.label} is asked of no run"
        for config in loaded.runs:
            assert any(spec.asks(config) for spec in loaded.evaluations)


@pytest.mark.slow
def test_the_tiny_dial_gives_a_verdict_on_every_claim(tmp_path, capsys):
    main(["study", "thinking", "--dial", "tiny", "--out", str(tmp_path / "out"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [claim["name"] for claim in printed["claims"]] == [claim.name for claim in study.claims()]
    assert {claim["verdict"] for claim in printed["claims"]} <= {"upheld", "refuted", "undecided"}
    assert not [claim for claim in printed["claims"] if "its rule failed" in claim["note"]]
    assert printed["flops"] > 0
