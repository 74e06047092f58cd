"""Cost before launch: schedules by hand, speeds of this machine alone, FLOPs of a plan, which shapes are measured."""

import json
import random

import pytest

from models.config import ModelConfig
from scaling.config import DataConfig, RunConfig
from scaling.data.cache import cache_root
from scaling.data.store import open_store
from scaling.engine.runtime import compilation_cache
from sweeps import cost, measure
from sweeps.cost import (
    COMPILE_SECONDS,
    ENDS,
    LOAD_SHARE,
    MOST_ROWS,
    RUN_SECONDS,
    SPEEDS,
    START_SECONDS,
    Job,
    Known,
    dry_run_json,
    dry_run_text,
    interpolated,
    remember_speed,
    schedule_seconds,
)
from sweeps.plan import Unit, plan


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # whether programs are there is part of what is measured
    (tmp_path / "cache").mkdir()


def config(d=16, tokens=100_000, **fields) -> RunConfig:
    return RunConfig(model=ModelConfig(d_model=d, n_layers=2, n_heads=2), tokens=tokens, **fields)


def schedule(*jobs, workers, running=()):
    return schedule_seconds([Job(*job) for job in jobs], workers, running)


def test_schedules_by_hand():
    assert schedule(workers=3) == 0.0
    assert schedule(*[(2,)] * 5, workers=2) == 6.0
    assert schedule((5,), (4,), (3,), (2,), workers=2) == 7.0
    # Children wait for their parent, even where a worker is idle.
    assert schedule((5,), (4, 0), (3, 0), workers=2) == 9.0
    assert schedule((1,), (4, 0), (3,), workers=2) == 5.0
    assert schedule((3, 1), (2, 2), (1,), workers=8) == 6.0
    # A branch is ready once its trunk has come so far, counted from when the trunk began; not later than its end.
    assert schedule((10,), (2, 0, 3.0), workers=2) == 10.0
    assert schedule((10,), (9, 0, 3.0), workers=2) == 12.0
    assert schedule((10,), (9, 0, 99.0), workers=2) == 19.0
    assert schedule((10,), (2, 0, 3.0), workers=1) == 12.0
    # What runs already keeps its worker, though a longer job is ready, and though its parent is not done.
    assert schedule((1,), (5,), (2, 1), workers=2, running=[0, 2]) == 6.0
    with pytest.raises(ValueError, match="2 jobs wait"):
        schedule((1,), (1, 2), (1, 1), workers=2)


def test_schedules_keep_the_bounds_of_any_list_schedule():
    """Never below the mean load or the longest chain, never above their sum (Graham 1966)."""
    rng = random.Random(0)
    for _ in range(200):
        jobs, chain = [], []
        for i in range(rng.randint(1, 20)):
            after = rng.randrange(i) if i and rng.random() < 0.5 else None
            jobs.append(Job(rng.uniform(0.1, 5.0), after))
            chain.append(jobs[-1].seconds + (chain[after] if after is not None else 0.0))
        workers = rng.randint(1, 5)
        mean = sum(job.seconds for job in jobs) / workers
        found = schedule_seconds(jobs, workers)
        assert max(mean, max(chain)) - 1e-9 <= found <= mean + max(chain) + 1e-9


def test_interpolation_is_a_power_law_between_and_level_beyond():
    points = [(1e4, 2e9), (1e6, 2e11), (1e4, 2e9)]
    assert interpolated(points, 1e5) == pytest.approx(2e10)
    assert interpolated(points, 1e3) == 2e9
    assert interpolated(points, 1e7) == 2e11
    later = [(1e4, 1.0)] * 9 + [(1e4, 7.0)] * 5
    assert interpolated(later, 1e4) == 7.0


def speed_of(run, known):
    return run.flops / run.steps / known.steps_seconds(run, 1)


def test_speeds_are_of_this_machine_and_its_number_of_workers():
    run = config()
    assert not Known(2).near(run)
    a_step = run.flops / run.steps / 1e9  # seconds, at 1 GFLOP/s
    remember_speed(run, a_step, "cpu", 2, run_seconds=3.0)
    assert Known(2).near(run)
    assert speed_of(run, Known(2)) == pytest.approx(1e9)
    assert not Known(1).near(run)
    assert not Known(2, accelerated=True).near(run)
    remember_speed(run, a_step / 5, "cpu")  # of a run whose launch did not say
    assert Known(1).near(run)
    path = cache_root() / SPEEDS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | {"machine": "another"}) for line in lines))
    assert not Known(2).near(run)
    path.write_text('{"n_compute": 1e4, "flops_per_second": 1e9, "device": "cpu"}\n[1]\n{"machine"\n\xff\n')
    assert not Known(2).near(run)


def test_a_speed_speaks_for_near_sizes_in_its_regime():
    small, between, large = (config(d) for d in (16, 48, 128))
    for run in (small, large):
        remember_speed(run, 1e-3, "cpu", 1)
    known = Known(1)
    assert known.near(between)
    low, high = (speed_of(run, known) for run in (small, large))
    assert low < speed_of(between, known) < high
    assert not known.near(config(256))
    assert not known.near(config(16, batch_size=32))
    assert not known.near(config(16, data=DataConfig(seq_len=256)))
    assert not known.near(config(16, dtype="bfloat16"))
    assert known.near(config(16, tokens=7_000_000, seed=5))


def test_what_validation_costs_is_said_and_where_much_warned_of():
    """By hand: a forward pass is a third of a training step's FLOPs on as many tokens."""
    units = plan([config(tokens=t) for t in (100_000, 200_000)])
    spent = sum(unit.flops for unit in units)
    for tokens, warned in ((1_000, False), (300_000, True)):
        result = dry_run_json(units, 1, valid_tokens=dict.fromkeys((unit.run_id for unit in units), tokens))
        by_hand = sum(u.config.flops / u.config.trained_tokens / 3 * tokens for u in units)
        assert result["flops_validation"] == pytest.approx(by_hand)
        text = dry_run_text(result, "no clock here")
        assert f"validation, once a run: {by_hand:.4g} more" in text
        assert ("warning: validation costs" in text) == warned
        advised = result["valid_tokens_advised"]
        assert (advised is not None) == warned
        if warned:
            assert by_hand / tokens * advised == pytest.approx(0.05 * spent, rel=0.06)
            assert f"data.valid_tokens = {advised}" in text


def test_a_dry_run_adds_up():
    """Two workers; nothing measured: every constant is assumed, each shape compiled once and loaded once."""
    runs = [config(16, 1_000_000), config(16, 500_000), config(64, 1_000_000)]
    long, short, other = runs
    at = plan(runs)[1].at
    assert at == int(0.8 * short.steps)
    known = Known(2)
    result = dry_run_json(plan(runs), 2, known=known)
    spent = long.flops + other.flops + short.flops * (short.steps - at) / short.steps
    assert result["flops_wanted"] == sum(run.flops for run in runs)
    assert result["flops_spent"] == pytest.approx(spent, rel=1e-12)
    assert result["flops_shared"] == pytest.approx(result["flops_wanted"] - spent)
    trunk, beside = (known.steps_seconds(run, run.steps) + RUN_SECONDS + COMPILE_SECONDS for run in (long, other))
    branch = known.steps_seconds(short, short.steps - at) + RUN_SECONDS + LOAD_SHARE * COMPILE_SECONDS
    assert result["seconds"] == pytest.approx(START_SECONDS + max(min(trunk, beside) + branch, trunk, beside), abs=0.06)
    assert not result["measured"]
    alone = dry_run_json(plan(runs, sharing=False), 2, known=known)
    assert (alone["flops_spent"], alone["flops_shared"]) == (result["flops_wanted"], 0.0)
    text = dry_run_text(result)
    assert f"from step {at}" in text
    assert "not measured on this machine" in text
    assert f"{result['flops_shared']:.4g} shared" in text
    done = dry_run_json(plan(runs), 2, {run.run_id for run in runs}, known)
    assert done["seconds"] == 0.0
    assert done["flops_wanted"] == result["flops_wanted"]
    unknown = dry_run_json(plan(runs), 2)
    assert (unknown["seconds"], unknown["measured"]) == (None, False)
    assert unknown["flops_spent"] == result["flops_spent"]
    assert dry_run_text(unknown, "no clock here").endswith("no clock here")


def test_of_very_many_runs_the_ends_are_printed():
    """A table of a hundred thousand rows takes half a minute to lay out, and nobody reads it."""
    runs = [config(16, 100_000 + 1024 * i) for i in range(MOST_ROWS + 1)]
    result = dry_run_json(plan(runs, sharing=False), 2)
    text = dry_run_text(result, "no clock")
    assert len(text.splitlines()) < 3 * ENDS
    assert f"... {MOST_ROWS + 1 - 2 * ENDS:,} more" in text
    assert runs[0].run_id in text
    assert runs[-1].run_id in text
    assert runs[500].run_id not in text
    assert len(result["runs"]) == MOST_ROWS + 1
    assert len(dry_run_text(dry_run_json(plan(runs[:-1], sharing=False), 2), "no clock").splitlines()) > MOST_ROWS


def test_a_run_waits_for_what_it_needs_to_end():
    """Two workers: a child begins when its parent has ended, so both take as long as one after the other."""
    parent, child = config(16, 400_000), config(16, 300_000)
    units = [Unit(parent), Unit(child, needs=(parent.run_id,))]
    known = Known(2)
    alone = [dry_run_json([Unit(run)], 2, known=known)["seconds"] - START_SECONDS for run in (parent, child)]
    together = dry_run_json(units, 2, known=known)["seconds"] - START_SECONDS
    saved = (1 - LOAD_SHARE) * COMPILE_SECONDS  # the child's program is there
    assert together == pytest.approx(sum(alone) - saved, abs=0.3)


def test_programs_that_lie_in_the_cache_are_not_compiled_again():
    run = config()
    before = dry_run_json(plan([run]), 1, known=Known(1))["seconds"]
    compilation_cache().mkdir()
    reference = cost.interpolated(cost.REFERENCE, run.counts.n_compute)
    remember_speed(run, run.flops / run.steps / reference, "cpu", 1)
    after = dry_run_json(plan([run]), 1, known=Known(1))["seconds"]
    assert before - after == pytest.approx((1 - LOAD_SHARE) * COMPILE_SECONDS, abs=0.11)


def test_representatives_span_the_sweep():
    sizes = [config(d, tokens) for d in (16, 20, 24, 32, 48, 64, 96) for tokens in (10_000, 20_000)]
    chosen = [run.model.d_model for run in measure.representatives(sizes)]
    assert len(chosen) == measure.SHAPES
    assert {16, 96} <= set(chosen)
    assert all(any(abs(d - c) <= 16 for c in chosen) for d in (16, 20, 24, 32, 48, 64, 96))
    batches = [config(16, batch_size=b) for b in (2, 4, 8, 16, 32)]
    assert {2, 32} <= {run.batch_size for run in measure.representatives(batches)}
    two = [config(16), config(16, data=DataConfig(seq_len=64))]
    assert len(measure.representatives(two)) == 2
    assert measure.representatives([]) == []


@pytest.mark.slow
def test_measuring_trains_short_runs_and_remembers(corpus, monkeypatch):
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1, repeat=True)
    runs = [config(d, 20_000, data=data, batch_size=4) for d in (8, 16)]
    open_store(corpus, "bytes", valid_fraction=0.1)
    places = [{"cores": "0"}, {"cores": "0"}]
    known = measure.measure_missing(runs, places)
    assert all(known.near(run) for run in runs)
    (speeds,) = known.speeds.values()
    assert len(speeds) == 4
    assert all(s.run_seconds > 0 and s.start_seconds > 0 for s in speeds)
    assert sum(s.compile_seconds is not None for s in speeds) == 2
    assert dry_run_json(plan(runs), 2, known=known)["measured"]
    assert [p.name for p in cache_root().glob("measure-*")] == []
    monkeypatch.setattr(measure, "measured", None)  # what is known is not measured again
    measure.measure_missing(runs, places)
