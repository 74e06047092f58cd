"""`scaling bench`: the count of FLOPs is the house's, a row is what the issue of it says, a trace is written."""

import subprocess
import sys

import pytest

from models.config import ModelConfig
from models.sizing import counts, flops_per_token
from scaling.bench import generate as writing
from scaling.bench import train as bench
from scaling.bench.overhead import bench_overhead
from scaling.engine.runtime import cores
from sweeps.cli.bench import generate_text, overhead_text, train_text


@pytest.mark.parametrize("one", bench.CPU + bench.GPU)
def test_flops_of_a_step_are_counted_product_by_product(one):
    config = one.run()
    # With T - 1 in the place of T a position attends to T / 2 others: the count of the table, to the last digit.
    assert one.flops == flops_per_token(config.model, one.seq_len - 1) * config.tokens_per_step
    norms = counts(config.model).n_compute - 12 * one.n_layers * one.d_model**2 - one.vocab_size * one.d_model
    assert norms == (2 * one.n_layers + 1) * one.d_model


def test_rates_of_processes_add_up():
    one = bench.CPU[0]
    common = {"peak_flops": 1e11, "peak_from": "measured", "compile_seconds": 1.0, "device": "a CPU", "jax": "0"}
    reports = [
        {"step_seconds": s, "step_seconds_p10": s, "step_seconds_p90": s, "peak_bytes": b, **common}
        for s, b in ((0.01, 5), (0.02, 7))
    ]
    row = bench.row(one, 1, reports)
    assert (row["processes"], row["peak_bytes"], row["step_seconds"]) == (2, 7, 0.02)
    assert row["gflops"] == pytest.approx(one.flops * 150 / 1e9, abs=0.01)
    assert row["share_of_peak"] == pytest.approx(one.flops * 150 / 2e11, abs=1e-4)
    assert row["tokens_per_second"] == pytest.approx(150 * 16 * 128)
    assert "d32 L2" in train_text([row])


@pytest.mark.slow
def test_a_measured_row_and_its_trace(monkeypatch, tmp_path):
    two = cores()[:2]
    monkeypatch.setattr(bench, "cores", lambda: two)
    monkeypatch.setitem(bench.PRESETS, "cpu", bench.CPU[:1])
    rows = bench.bench("cpu", 0.1, tmp_path)
    assert [(r["processes"], r["devices"]) for r in rows] == [(1, 1), (1, 2), (2, 1)][: 3 if len(two) == 2 else 1]
    for r in rows:
        assert min(r["gflops"], r["compile_seconds"]) > 0
        assert r["step_seconds_p10"] <= r["step_seconds"] <= r["step_seconds_p90"]
        assert r["peak_bytes"] > 2**26  # JAX alone is more
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert list(tmp_path.rglob("*.trace.json.gz"))


def test_an_accelerators_shapes_are_refused_on_a_cpu():
    command = [sys.executable, "-m", "sweeps.cli", "bench", "train", "--preset", "gpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "wants an accelerator" in done.stderr


@pytest.mark.slow
def test_overhead_of_runs_in_a_warm_worker():
    rows = bench_overhead()
    assert [r["shape_is"] for r in rows] == ["the worker's first", *["new", "known"] * 3]
    assert [r["model"] for r in rows[1::2]] == [r["model"] for r in rows[2::2]]
    assert rows[0]["model"] in overhead_text(rows)


def test_writing_is_measured_beside_its_bounds():
    """Nothing here says how fast: only that a row is what its columns say."""
    model = ModelConfig(d_model=16, n_layers=1, n_heads=2)
    rows = writing.bench_generate(0.01, (model,), (1, 2))
    assert [row["batch"] for row in rows] == [1, 2]
    assert rows[0]["times_smallest_batch"] == 1
    for row in rows:
        share = row["tokens_per_second"] / row["bound_tokens_per_second"]
        assert row["share_of_bound"] == pytest.approx(share, rel=0.01, abs=1e-4)
        assert row["bound_by"] in ("arithmetic", "memory")
        assert row["prefill_tokens_per_second"] > 0
    assert "d16 L1" in generate_text(rows)


def test_the_bounds_of_writing_are_those_of_its_products_and_bytes(monkeypatch):
    """By hand for one layer: 12 D^2 and the head, attention over the mean length, and every byte of both read once."""
    monkeypatch.setattr(writing, "reading_rate", lambda size: 1e9)
    model = ModelConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, activation="gelu", qk_norm=False)
    length = writing.PROMPT + writing.TOKENS / 2
    weights = 8 * (8 + 2 * 4) + 8 * 8 + 2 * 8 * 32 + 8 * 10
    norms = 3 * 8
    arithmetic, memory = writing.bounds(model, 5, peak=1e9)
    assert arithmetic == pytest.approx(1e9 / (2 * weights + 4 * 8 * length), rel=0.1)
    assert memory == pytest.approx(5 * 1e9 / (4 * (weights + norms + 5 * 2 * 4 * length)), rel=0.02)
