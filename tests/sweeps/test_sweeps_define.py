"""Definitions: pure, checked, printable."""

import dataclasses
import itertools
import signal

import numpy as np
import pytest

from models.config import ModelConfig, replace
from models.errors import InputError
from scaling.config import ObjectiveConfig, RunConfig
from scaling.fields import leaves
from sweeps.cli import sweep as sweep_commands
from sweeps.cli.main import main
from sweeps.cost import Known, dry_run_json, dry_run_text, duration
from sweeps.define import (
    Sweep,
    configure,
    grid,
    horizons,
    isoflop,
    ladder,
    listed,
    load_sweep,
    product,
    seeds,
    sized,
    table_text,
    union,
    where,
)
from sweeps.hyperparameters import PowerRule
from sweeps.plan import plan


def test_grid_is_every_combination():
    runs = grid({"n": [2e4, 4e4], "tokens": [1e5, 2e5, 4e5], "seed": [0, 1]})
    assert len(runs) == 12
    assert {c.tokens for c in runs} == {100_000, 200_000, 400_000}
    assert all(isinstance(c.tokens, int) for c in runs)
    assert len({c.run_id for c in runs}) == 12
    for wanted in (2e4, 4e4):
        assert any(abs(c.counts.n_compute / wanted - 1) < 0.05 for c in runs)


def test_model_fields_lie_on_top_of_the_size():
    (config,) = grid({"model.activation": ["relu2"], "model": [ModelConfig(d_model=32, n_heads=2)]})
    assert (config.model.d_model, config.model.activation, config.model.d_ff) == (32, "relu2", 128)


def test_the_order_of_axes_does_not_matter_and_nothing_given_is_lost():
    one = grid({"model.d_ff": [64, 128], "model.d_model": [32]})
    two = grid({"model.d_model": [32], "model.d_ff": [64, 128]})
    assert [c.model.d_ff for c in one] == [c.model.d_ff for c in two] == [64, 128]
    (config,) = grid({"model.n_heads": [6], "model.d_model": [96]})
    assert (config.model.head_dim, config.model.d_ff, config.model.n_kv_heads) == (16, 256, 6)
    base = RunConfig(model=ModelConfig(qk_norm=False, z_loss=1e-4, rope_theta=100.0, n_kv_heads=2))
    for axes in ({"n": [1e6]}, {"model.d_model": [128]}):
        (config,) = grid(axes, base=base)
        assert (config.model.qk_norm, config.model.z_loss, config.model.rope_theta) == (False, 1e-4, 100.0)
        assert config.model.n_kv_heads == 2


def test_n_is_met_whatever_else_is_set():
    for extra in ({"model.vocab_size": 1024}, {"model.z_loss": 1e-4}, {"model.n_layers": 4}):
        config = configure(RunConfig(), {"n": 5e5} | extra)
        assert abs(config.counts.n_compute / 5e5 - 1) <= 0.05
    with pytest.raises(InputError, match="n sets the model's width"):
        configure(RunConfig(), {"n": 5e5, "model.d_model": 64})


@pytest.mark.parametrize("f", dataclasses.fields(ModelConfig), ids=lambda f: f.name)
def test_a_size_keeps_all_that_is_not_of_size(f):
    """If this fails for a new field of the model, `--n` trains another model than was asked for: mark it SIZE only if
    models.sizing.for_size sets it."""
    if "size" in f.metadata:
        assert f.name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        return
    default = f.default
    other = not default if isinstance(default, bool) else {"swiglu": "gelu", "standard": "mup", 0.0: 1.5}.get(default)
    value = default * 2 if other is None else other
    model = replace(ModelConfig(), **{f.name: value})
    assert getattr(sized(model, 5e4, {}), f.name) == value


def test_a_part_can_be_an_axis():
    objectives = [ObjectiveConfig(), ObjectiveConfig(name="answers")]
    assert [c.objective for c in grid({"objective": objectives})] == objectives
    assert {c.objective.name for c in grid({"objective.name": ["next_token", "answers"]})} == {"next_token", "answers"}


def test_numbers_of_other_kinds_are_plain_numbers():
    given = {"optim.lr": np.float32(0.5), "tokens": np.int64(10**6), "batch_size": 16.0}
    assert configure(RunConfig(), given).run_id == configure(RunConfig(), {"optim.lr": 0.5, "batch_size": 16}).run_id


def test_rule_sets_what_the_axes_leave_open():
    rule = PowerRule(c=0.01, p=-0.5, q=0.0, batch_size=4, n_range=(1e4, 1e6), d_range=(1e5, 1e7))
    (ruled,) = grid({"n": [1e5]}, rule=rule)
    assert ruled.batch_size == 4
    assert ruled.optim.lr == pytest.approx(0.01 * (ruled.counts.n_compute / 1e5) ** -0.5, rel=5e-3)
    (pinned,) = grid({"n": [1e5], "optim.lr": [0.3]}, rule=rule)
    assert (pinned.optim.lr, pinned.batch_size) == (0.3, 4)


def test_keep_filters():
    assert len(grid({"n": [2e4, 4e4], "tokens": [1e5, 4e5]}, keep=lambda c: c.tokens > 2e5)) == 2


def test_isoflop_slices_cost_their_budget():
    """In counted FLOPs, within the rounding to whole steps. At these sizes 6ND would be a third off."""
    budgets = [3e11, 1.2e12]
    runs = isoflop(budgets, {"n": [2e4, 4e4, 8e4], "seed": [0, 1]}, RunConfig(batch_size=2))
    assert len(runs) == 12
    for i, config in enumerate(runs):
        C = budgets[i % 2]
        assert abs(config.flops - C) <= 0.51 * config.flops / config.steps
        assert 6 * config.counts.n_compute * config.trained_tokens < 0.9 * C
    by_size = [[c.tokens for c in runs if c.counts == counts] for counts in dict.fromkeys(c.counts for c in runs)]
    assert all(a > b for a, b in itertools.pairwise(by_size)), "a larger size has fewer tokens"


def test_ladders_keep_their_tokens_per_parameter():
    runs = ladder([20, 80], {"n": [2e4, 8e4]})
    assert [round(c.trained_tokens / c.counts.n_compute) for c in runs] == [20, 80, 20, 80]
    assert ladder(20, {"n": [2e4, 8e4]}) == runs[::2]


def test_a_rule_sees_the_tokens_that_follow():
    rule = PowerRule(c=0.01, p=0.0, q=-1.0, batch_size=2, n_range=(1e4, 1e6), d_range=(1e5, 1e7))
    for config in ladder([20, 80], {"n": [2e4]}, rule=rule):
        assert config.optim.lr == pytest.approx(0.01 * 1e6 / config.tokens, rel=5e-3)
        assert config.batch_size == 2


def test_horizons_belong_to_their_size():
    small, large = ModelConfig(d_model=16, n_heads=2), ModelConfig(d_model=32, n_heads=2)
    runs = horizons({small: [1e5, 2e5, 4e5], large: [1e5]}, {"seed": [0, 1]})
    assert [(c.model is small, c.tokens, c.seed) for c in runs] == [
        (True, 100_000, 0),
        (True, 100_000, 1),
        (True, 200_000, 0),
        (True, 200_000, 1),
        (True, 400_000, 0),
        (True, 400_000, 1),
        (False, 100_000, 0),
        (False, 100_000, 1),
    ]
    assert [c.tokens for c in horizons({2e4: [1e5], 4e4: [2e5]})] == [100_000, 200_000]


def test_lists_products_and_seeds():
    runs = listed([{"n": 2e4, "tokens": 1e5}, {"tokens": 2e5, "optim.lr": 0.3}, {"n": 2e4, "tokens": 1e5}])
    assert [(c.tokens, c.optim.lr) for c in runs] == [(100_000, 0.01), (200_000, 0.3)]
    crossed = product(runs, {"optim.weight_decay": [0.0, 0.1], "dtype": ["float32", "bfloat16"]})
    assert len(crossed) == 8
    assert {(c.tokens, c.optim.lr) for c in crossed} == {(100_000, 0.01), (200_000, 0.3)}, "the runs' own values stay"
    repeated = seeds(runs, 3)
    assert [c.seed for c in repeated] == [0, 1, 2, 0, 1, 2]
    assert {c.data.seed for c in repeated} == {0}


def test_unions_and_filters_are_those_of_sets_in_order():
    cheap = grid({"n": [2e4], "tokens": [1e5, 2e5]})
    long = grid({"n": [2e4], "tokens": [4e5, 2e5]})
    both = union(cheap, long)
    assert [c.tokens for c in both] == [100_000, 200_000, 400_000]
    assert union(both, cheap) == both
    assert union(Sweep(cheap), long) == both
    assert where(both, lambda c: c in cheap) == cheap
    assert union(where(both, lambda c: c.tokens < 2e5), where(both, lambda c: c.tokens >= 2e5)) == both


def test_a_sweep_prints_the_fields_that_differ():
    sweep = Sweep(grid({"n": [2e4, 4e4], "tokens": [1e5], "optim.lr": [0.5, 0.25]}), holdout="flops > 2e10")
    header, *rows, total = str(sweep).splitlines()
    assert "optim.lr" in header
    assert "model.d_model" in header
    assert "batch_size" not in header
    assert [row.split()[0] for row in rows] == [c.run_id for c in sweep.runs]
    assert total == f"4 runs, {sum(c.flops for c in sweep.runs):.4g} FLOPs; held out: flops > 2e10"
    assert table_text(sweep.runs) == "\n".join([header, *rows])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: isoflop([1e5], {"n": [2e4]}), "steps of 1,024 tokens; raise the budget or the ratio"),
        (lambda: isoflop([1e11, -1], {"n": [2e4]}), "isoflop: budgets = [100000000000.0, -1]: expected a list"),
        (lambda: isoflop(1e11, {"n": [2e4]}), "isoflop: budgets = 100000000000.0: expected a list"),
        (lambda: isoflop([1e11], {"n": [2e4], "tokens": [1e5]}), "'tokens' follows from the budget or the ratio"),
        (lambda: ladder([0], {"n": [2e4]}), "ladder: ratios = [0]: expected a list of positive numbers"),
        (lambda: ladder([20], {"nn": [2e4]}), "axis 'nn': no such field of a run"),
        (lambda: horizons({2e4: 1e5}), "axis 'tokens' = 100000.0: expected a list of values"),
        (lambda: listed([{"tokenz": 5}]), "did you mean 'tokens'"),
        (lambda: product([3], {"seed": [1]}), "runs holds 3, expected RunConfigs"),
        (lambda: seeds([RunConfig()], 0), "seeds: count = 0"),
        (lambda: where([RunConfig()], lambda c: False), "none of the 1 runs is kept"),
    ],
)
def test_bad_definitions_are_named(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"optim.lrr": [1]}, "axis 'optim.lrr': no such field of a run, did you mean 'optim.lr'?"),
        ({"tokens": 5}, "axis 'tokens' = 5: expected a list of values"),
        ({"tokens": [-1]}, "tokens = -1"),
        ({"n": [5]}, "model size n = 5"),
        ({"n": [1e5], "model": [ModelConfig()]}, "'n' and 'model' both set the model"),
        ({"model": [3]}, "model = 3: expected an object (ModelConfig)"),
        ({"optim.lr": ["0.01"]}, "optim.lr = '0.01': expected a finite number"),
        ({"model.tied": ["no"]}, "model.tied = 'no': expected true or false"),
    ],
)
def test_bad_axes_are_named(axes, message):
    with pytest.raises(InputError) as caught:
        grid(axes)
    assert message in str(caught.value)


def test_empty_sweeps_are_refused_and_doubles_removed():
    with pytest.raises(InputError, match="no runs"):
        Sweep(())
    assert len(Sweep((RunConfig(), RunConfig())).runs) == 1


def test_every_field_can_be_an_axis():
    for path, kind in leaves(RunConfig).items():
        if path.startswith("model."):
            continue
        value = {int: 300, float: 0.25, bool: True}.get(kind)
        if value is not None:
            base = configure(RunConfig(), {"lora.rank": 2} if path.startswith("lora.") else {})  # else it says nothing
            assert configure(base, {path: value}).run_id != base.run_id


def test_quickstart_is_what_the_readme_says():
    _, sweep = load_sweep("quickstart")
    n = sorted({c.counts.n_compute for c in sweep.runs})
    d = sorted({c.tokens for c in sweep.runs})
    assert len(n) >= 4
    assert n[-1] / n[0] >= 15
    assert len(d) >= 4
    assert d[-1] / d[0] >= 8
    largest = max(c.flops for c in sweep.runs)
    threshold = float(sweep.holdout.split(">")[1])
    assert threshold == pytest.approx(largest / 4)
    rule_runs = load_sweep("quickstart_tuning")[1].runs
    assert max(c.flops for c in rule_runs) <= threshold, "the rule was tuned on a run as dear as the held-out ones"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def sweep(:", "failed with SyntaxError"),
        ("x = 1", "defines no function sweep()"),
        ("def sweep(): return 3", "returned int, expected a Sweep"),
        ("def sweep(): raise KeyError('a')", "failed with KeyError"),
        ("import sys\nsys.exit(3)", "failed with SystemExit"),
        ("def sweep(): raise KeyboardInterrupt('not by a key')", "failed with KeyboardInterrupt: not by a key"),
        ("class Odd(BaseException): pass\ndef sweep(): raise Odd('one\\ntwo')", "failed with Odd: one"),
        ("import sys\nsys.path.clear()", "defines no function sweep()"),
        ("from sweeps.define import *\ndef sweep(): return Sweep([1])", "runs holds 1, expected RunConfigs"),
        (
            "from sweeps.define import *\ndef sweep(): return Sweep(grid({}), holdout=5)",
            "holdout = 5, expected a string",
        ),
        ("from sweeps.define import *\ndef sweep(): return Sweep(grid({'seeed': [1]}))", "did you mean 'seed'"),
    ],
)
def test_bad_definition_files_are_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_sweep(str(path))
    assert message in str(caught.value)
    assert "mine.py" in str(caught.value)


def test_ctrl_c_within_a_definition_is_ctrl_c(tmp_path):
    """By the key, unlike a KeyboardInterrupt that the definition raises itself: the user wants to leave."""
    path = tmp_path / "slow.py"
    path.write_text("import os, signal\ndef sweep(): os.kill(os.getpid(), signal.SIGINT)")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        load_sweep(str(path))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_definition_that_takes_long_is_heard_of(tmp_path, monkeypatch, capsys):
    """A hundred thousand runs take a while: on standard error, so that --json stays JSON."""
    monkeypatch.setattr(sweep_commands, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(0.2)\ndef sweep(): raise ValueError")
    with pytest.raises(SystemExit):
        main(["sweep", str(path), "--dry-run", "--json"])
    captured = capsys.readouterr()
    assert "reading the definition: 0 s" in captured.err
    assert captured.out == ""


def test_the_dial_is_handed_on_and_checked(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from sweeps.define import *\ndef sweep(dial=1): return Sweep(grid({'tokens': [1e5 * dial]}))")
    assert [load_sweep(str(path), dial)[1].runs[0].tokens for dial in (None, 1, 3)] == [100_000, 100_000, 300_000]
    for dial in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"dial = .*: expected a positive number"):
            load_sweep(str(path), dial)
    with pytest.raises(InputError, match="'quickstart': takes no dial"):
        load_sweep("quickstart", 2)


def test_what_is_used_up_at_the_first_time_is_no_axis():
    for make in (grid, lambda axes: product(grid({"n": [1e4, 2e4]}), axes)):
        with pytest.raises(InputError, match=r"axis 'seed' = <generator .* expected a list of values"):
            make({"seed": (s for s in range(2))})
    with pytest.raises(InputError, match="isoflop: budgets"):
        isoflop((b for b in [1e10]), {"n": [1e4]})


def test_a_definition_may_import_its_neighbours(tmp_path):
    (tmp_path / "my_sizes.py").write_text("SIZES = [1e4, 2e4]\n")
    path = tmp_path / "mine.py"
    code = "from my_sizes import SIZES\nfrom sweeps.define import Sweep, grid\n"
    path.write_text(code + 'def sweep():\n    return Sweep(grid({"n": SIZES, "tokens": [1e5]}))\n')
    assert len(load_sweep(str(path))[1].runs) == 2


def test_unknown_names_offer_the_nearest():
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_sweep("quickstrat")
    with pytest.raises(InputError, match="not found"):
        load_sweep("nowhere.py")


def test_dry_run_shows_each_run_and_the_total():
    runs = grid({"n": [2e4, 4e4], "tokens": [1e5, 2e5]})
    text = dry_run_text(dry_run_json(plan(runs), 2, {runs[0].run_id}, Known(2)))
    for config in runs:
        (line,) = [line for line in text.splitlines() if config.run_id in line]
        for part in (f"{config.counts.n_compute:,}", f"{config.trained_tokens:,}", f"{config.steps:,}", "MiB"):
            assert part in line
        assert line.endswith("finished") == (config is runs[0])
    assert f"{sum(c.flops for c in runs):.4g} FLOPs" in text.splitlines()[-1]
    assert "3 of 4 runs to train" in text.splitlines()[-1]


def test_durations_read_well():
    assert [duration(s) for s in (5, 300, 36_000)] == ["5 s", "5.0 min", "10.0 h"]


def test_rule_is_the_formula():
    rule = PowerRule(c=0.003, p=-0.4, q=-0.5, batch_size=2, n_range=(1e4, 1e6), d_range=(1e5, 1e7))
    assert rule.lr(1e5, 1e6) == 0.003
    assert rule.lr(2e5, 4e6) == pytest.approx(0.003 * 2**-0.4 / 2, rel=5e-3)
