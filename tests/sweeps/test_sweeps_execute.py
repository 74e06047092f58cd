"""Plans: who branches from whom, and what the ledger says of it."""

import dataclasses
import json

import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import OptimConfig, RunConfig, ScheduleConfig
from sweeps.plan import common_steps, ledger, plan, plan_in, read_plan, sources, unit_of, write_plan

STEP = 8 * 128
BASE = RunConfig(model=ModelConfig(d_model=16, n_layers=1, n_heads=1), schedule=ScheduleConfig(warmup_tokens=10 * STEP))


def horizons(*steps, base=BASE):
    return [dataclasses.replace(base, tokens=n * STEP) for n in steps]


def test_doubling_horizons_cost_what_the_formula_says():
    runs = horizons(1000, 2000, 4000)
    units = plan(runs)
    assert [u.config for u in units] == runs
    assert [u.after for u in units] == [runs[2].run_id, runs[2].run_id, None]
    assert [u.at for u in units] == [800, 1600, 0]
    assert units[2].saves == (800, 1600, 3200)  # the last for a longer run, should one be added
    spent, per_step = ledger(units), runs[0].flops / 1000
    assert spent["flops_spent"] == pytest.approx(((1 - 0.2) * 4000 + 0.2 * (1000 + 2000 + 4000)) * per_step, rel=1e-15)
    assert spent["flops_spent"] <= 2 / 3 * spent["flops_wanted"]
    assert spent["flops_shared"] == pytest.approx(spent["flops_wanted"] - spent["flops_spent"])


def test_without_sharing_all_is_spent():
    units = plan(horizons(1000, 2000), sharing=False)
    assert all(u.after is None and u.saves == () for u in units)
    assert ledger(units)["flops_spent"] == sum(u.config.flops for u in units)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optim": OptimConfig(lr=0.02)},
        {"batch_size": 4, "tokens": 1000 * STEP},
        {"dtype": "bfloat16"},
        {"schedule": ScheduleConfig(warmup_tokens=20 * STEP)},
        {"model": ModelConfig(d_model=32, n_layers=1, n_heads=1)},
    ],
    ids=str,
)
def test_runs_that_differ_in_more_than_their_end_share_nothing(change):
    short, long = horizons(1000, 2000)
    assert [u.after for u in plan([dataclasses.replace(short, **change), long])] == [None, None]


def test_other_ends_of_one_horizon_share_as_well():
    run = horizons(1000)[0]
    late = dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, decay_fraction=0.1))
    units = {u.config: u for u in plan([run, late])}
    assert {u.at for u in units.values()} == {0, 800}


def test_a_constant_schedule_shares_the_whole_of_the_shorter_run():
    runs = horizons(500, 1000, base=dataclasses.replace(BASE, schedule=ScheduleConfig(name="constant")))
    assert [u.at for u in plan(runs)] == [500, 0]


def test_cosines_share_too_little_to_wait_for():
    runs = horizons(500, 1000, base=dataclasses.replace(BASE, schedule=ScheduleConfig("cosine", 10 * STEP)))
    assert [u.after for u in plan(runs)] == [None, None]
    assert common_steps(*runs) >= 9


def test_a_longer_run_added_later_finds_the_old_trunk():
    old = plan(horizons(1000, 2000))
    new = plan(horizons(1000, 2000, 4000))
    assert (old[1].run_id, 1600) in sources(new[2], new)
    assert 1600 in old[1].saves


def test_a_trunk_that_has_passed_leaves_what_it_kept(tmp_path):
    """The trunk ended before the shorter run was wanted, and kept its state at 800 of the 1,600 steps both share."""
    short, middle, long = horizons(1000, 2000, 4000)

    def at() -> list[int]:
        return [unit.at for unit in plan_in(tmp_path, [short, middle, long])]

    assert at() == [800, 1600, 0]
    trunk = tmp_path / "runs" / long.run_id
    (trunk / "checkpoints" / "1500").mkdir(parents=True)
    assert at() == [0, 1600, 0]  # past 800, and 1,600 is still to come
    (trunk / "branches" / "800").mkdir(parents=True)
    (trunk / "result.json").write_text("{}")
    units = plan_in(tmp_path, [short, middle, long])
    assert [(unit.after, unit.at) for unit in units] == [(long.run_id, 800), (None, 800), (None, 0)]
    (tmp_path / "runs" / short.run_id / "branches" / "900").mkdir(parents=True)  # no run shares 900 steps with that
    assert at() == [800, 800, 0]
    assert [unit.at for unit in plan_in(tmp_path, [short, middle, long], sharing=False)] == [0, 0, 0]


def test_a_link_that_leads_nowhere_is_no_kept_state(tmp_path):
    """A loop at a run's checkpoints stopped the whole launch; the runs that do not need them go on."""
    short, long = horizons(1000, 2000)
    trunk = tmp_path / "runs" / long.run_id
    trunk.mkdir(parents=True)
    for name in ("checkpoints", "branches"):
        (trunk / name).symlink_to(trunk / name)
    assert [unit.at for unit in plan_in(tmp_path, [short, long])] == [800, 0]


def test_a_plan_is_read_back(tmp_path):
    units = plan(horizons(1000, 2000))
    write_plan(tmp_path, units, "one")
    assert read_plan(tmp_path) == ("one", units)
    needing = [units[0], dataclasses.replace(units[1], needs=("0123456789ab",))]
    write_plan(tmp_path, needing, "two")
    assert read_plan(tmp_path) == ("two", tuple(needing))


def test_a_plan_without_needs_is_read():
    """As earlier versions wrote it."""
    unit = plan(horizons(1000))[0]
    row = {"id": unit.run_id, "config": unit.config.to_dict(), "after": None, "at": 0, "saves": list(unit.saves)}
    assert unit_of(row) == unit


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"id": "../../elsewhere"},
        {"after": "../elsewhere"},
        {"after": 7},
        {"at": -1},
        {"at": 1001},
        {"at": "1"},
        {"saves": [0.5]},
        {"saves": None},
        {"needs": "abc"},
        {"needs": [None]},
        {"config": []},
        {"needs": ["SELF"]},
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(tmp_path, damage):
    """In one line, and before a worker follows it: a run that waits for itself would wait for ever."""
    (unit,) = plan(horizons(1000))
    write_plan(tmp_path, [unit], "one")
    content = json.loads((tmp_path / "plan.json").read_text())
    damage = {k: [unit.run_id] if v == ["SELF"] else v for k, v in damage.items()}
    content["units"] = [content["units"][0] | damage] if damage else [{}]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="launch the sweep again"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"launch": 1, "units": []}', '{"launch": "x", "units": 7}', "[" * 99_999]
)
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        read_plan(tmp_path)
