"""Chains in sweeps: parents are handed over, trained first, and a child of one that fails is not trained."""

import dataclasses
import json
import shutil
import subprocess

import pyarrow.parquet as pq
import pytest
from processes import wait_for

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.engine.loop import train
from scaling.execution import Execution
from scaling.folder import read_json
from scaling.result import read_result
from sweeps.cli.main import main
from sweeps.cost import dry_run_json, dry_run_text
from sweeps.define import Sweep, children, configure, grid, seeds, union
from sweeps.launch import local
from sweeps.launch.engine import worker_command
from sweeps.launch.prepare import check_sweep, prepare, write_launch
from sweeps.plan import plan
from sweeps.status import sweep_status
from sweeps.summary import describe
from sweeps.table import table


@pytest.fixture(scope="module")
def base(corpus):
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1, repeat=True)
    model = ModelConfig(d_model=8, n_layers=1, n_heads=2)
    return RunConfig(model=model, data=data, batch_size=4, tokens=2560, schedule=ScheduleConfig(warmup_tokens=0))


def chain(base):
    """(parents, children): each parent has two children that share a trunk, and one of another rate."""
    parents = seeds([base], 2)
    tuned = children(parents, {"tokens": [2560, 5120]}, base)
    return parents, union(tuned, children(parents, {"optim.lr": [1e-3]}, base))


def test_children_have_their_parents_model_and_name_it(base):
    parents = grid({"model": [ModelConfig(d_model=d, n_layers=1, n_heads=2) for d in (8, 16)]}, base)
    made = children(parents, {"optim.lr": [0.01, 0.02], "data.seed": [1]}, base)
    assert [(c.parent, c.model) for c in made] == [(p.run_id, p.model) for p in parents for _ in range(2)]
    assert {c.optim.lr for c in made} == {0.01, 0.02}
    again = children(made, {"tokens": [128]}, base)
    assert {c.parent for c in again} == {c.run_id for c in made}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"model.d_model": [16]}, "model.d_model = 16: the parent"),
        ({"parent": ["0123456789ab"]}, "children: parent = '0123456789ab'"),
        ({"data.tokenizer": ["bpe:256"]}, "data.tokenizer = 'bpe:256': the parent"),
    ],
)
def test_what_is_the_parents_is_no_axis(base, axes, message):
    with pytest.raises(InputError) as caught:
        children([base], axes, base)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "reward"}, "text has no pairs, which the objective wants"),
        ({"objective.name": "dpo"}, "objective.name = 'dpo': compares with the run it starts from"),
        ({"lora.rank": 2}, "lora.rank = 2: adapters stand on a trained model"),
        (
            {"data.source": "comparisons", "data.tokenizer": "symbols", "model.vocab_size": 17},
            "this task gives pairs, which only an objective on pairs",
        ),
    ],
)
def test_what_a_run_lacks_is_told_before_a_sweep_begins(base, tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        prepare("chain", Sweep([configure(base, changes)]), tmp_path / "sweep")
    assert message in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_seeds_of_children_are_no_repeats(base):
    """Two runs of one result under two ids would look like two measurements without noise."""
    tuned = children([base], {"data.seed": [1]}, base)
    with pytest.raises(InputError, match=r"its own seed changes nothing in it; vary the parent's seed, or data\.seed"):
        seeds(tuned, 2)
    assert len(seeds(children([base], {"lora.rank": [2]}, base), 2)) == 2, "adapters are drawn at random"
    with pytest.raises(InputError, match=r"children: run .* its own seed changes nothing in it"):
        children([base], {"seed": [0, 1], "lora.rank": [0, 2]}, base)
    assert len(children([base], {"seed": [0, 1], "lora.rank": [2]}, base)) == 2
    paired = children([base], {"seed": [0, 1], "data.seed": [0, 1]}, base, keep=lambda c: c.seed == c.data.seed)
    assert len(paired) == 2, "these differ in their data"


def test_a_sweep_takes_the_parents_it_needs(base):
    """Handed over with others; and upwards, a grandparent too. What nobody starts from is not trained."""
    parents, tuned = chain(base)
    grandchild = children(tuned[:1], {"data.seed": [3]}, base)
    sweep = Sweep(grandchild, parents=union(tuned, parents))
    assert sweep.runs == (parents[0], tuned[0], *grandchild)
    assert Sweep(tuned).runs == tuned
    with pytest.raises(InputError, match=f"parent = '{parents[0].run_id}': not among the runs of this sweep; hand it"):
        check_sweep(Sweep(tuned))


def test_parents_come_first_in_plan_cost_and_schedule(base):
    parents, tuned = chain(base)
    units = {unit.run_id: unit for unit in plan(union(tuned, parents))}
    assert all(units[c.run_id].needs == (c.parent,) for c in tuned)
    assert all(units[p.run_id].needs == () for p in parents)
    branches = [unit for unit in units.values() if unit.after]
    assert [units[b.after].config.parent for b in branches] == [b.config.parent for b in branches]
    assert len(branches) == 2, "the children of one parent share a trunk, those of two do not"
    result = dry_run_json(list(units.values()), 2)
    assert f"parent {parents[0].run_id}, from step" in dry_run_text(result, "no clock")


def test_a_chain_is_trained_parents_first_and_tabled(base, tmp_path):
    parents, tuned = chain(base)
    sweep, out = Sweep(tuned, parents=parents), tmp_path / "sweep"
    prepare("chain", sweep, out)
    waiting = sweep_status(out)
    assert waiting["waiting"] == len(sweep.runs)
    state = local.launch(sweep, out, workers=2)
    assert (state.finished, state.failed) == (len(sweep.runs), {})
    frame = table(out).set_index("run")
    for config in tuned:
        row = frame.loc[config.run_id]
        assert (row["parent"], row["flops_parents"], row["flops"]) == (config.parent, base.flops, config.flops)
    assert (frame.loc[[p.run_id for p in parents], "flops_parents"] == 0).all()
    spent = frame["flops_spent"].sum()
    assert describe(out)["flops"] == spent
    assert spent < frame["flops"].sum()
    # A parent that has finished in the folder need not be handed over, nor its own parent.
    more = Sweep(children(tuned[:1], {"data.seed": [4]}, base))
    prepare("chain", more, out)
    assert local.launch(more, out, workers=1).finished == 1
    with pytest.raises(InputError, match=r"parent = '0123456789ab': not among the runs of this sweep, nor in"):
        prepare("chain", Sweep([dataclasses.replace(tuned[0], parent="0123456789ab")]), out)


def test_a_child_of_a_parent_that_diverged_is_not_trained_and_says_so(base, tmp_path):
    parent = dataclasses.replace(base, optim=OptimConfig(lr=1e30, clip=0.0))
    child = children([parent], {"optim.lr": [0.01]}, base)
    grandchild = children(child, {"optim.lr": [0.02]}, base)
    sweep, out = Sweep(union([parent], child, grandchild)), tmp_path / "sweep"
    prepare("chain", sweep, out)
    state = local.launch(sweep, out, workers=1)
    assert (state.finished, state.diverged) == (0, 1)
    assert state.failed == {
        child[0].run_id: f"needs run {parent.run_id}, which diverged",
        grandchild[0].run_id: f"needs run {child[0].run_id}, which was not trained",
    }
    assert not (out / "runs" / child[0].run_id / "config.json").exists()
    with pytest.raises(InputError, match="diverged at step"):
        prepare("chain", Sweep(child), out)


@pytest.mark.slow
def test_killed_in_the_parent_and_in_the_child_the_table_is_the_same(base, tmp_path):
    """kill -9 of a worker while the parent is trained, then of the next one while a child is; a third ends it. A child
    that began before its parent's model was whole, or from a model that was read otherwise, would end elsewhere.
    """
    parent = dataclasses.replace(base, tokens=200_000)
    tuned = children([parent], {"lora.rank": [0, 2]}, parent)
    sweep, out = Sweep(tuned, parents=[parent]), tmp_path / "sweep"
    prepare("chain", sweep, out)
    write_launch(sweep, out, Execution(checkpoint_seconds=0.05))

    def under_way(runs):
        folders = [out / "runs" / run.run_id for run in runs]
        kept = [f for f in folders if any(step.name.isdigit() for step in f.glob("checkpoints/*"))]
        return [f for f in kept if not (f / "result.json").exists()]

    for victims in ([parent], tuned):
        worker = subprocess.Popen(worker_command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda victims=victims: under_way(victims), seconds=300)
        worker.kill()
        worker.wait()
        assert under_way(victims), "killed too late: nothing is under way"
    last = subprocess.run(worker_command(out), capture_output=True, text=True, timeout=400, check=False)
    assert last.returncode == 0, last.stderr
    assert "continuing from step" in last.stdout
    for config in sweep.runs:
        undisturbed = train(config, tmp_path / "alone" / config.run_id)
        result = read_result(out / "runs" / config.run_id)
        assert (result.loss, result.flops_parents) == (undisturbed.loss, undisturbed.flops_parents)
        curves = [path / config.run_id / "curve.parquet" for path in (out / "runs", tmp_path / "alone")]
        assert pq.read_table(curves[0]).equals(pq.read_table(curves[1]))


def test_a_single_child_by_its_parents_folder(base, tmp_path, capsys):
    """In its model where no other is given, and from that very folder or not at all."""
    options = [f"--data.source={base.data.source}", "--data.seq-len=32", "--data.valid-fraction=0.1"]
    options += ["--tokens=2560", "--schedule.warmup-tokens=0"]
    model = ["--model.d-model=8", "--model.n-layers=1", "--model.n-heads=2"]
    assert main(["train", *options, *model, "--out", str(tmp_path / "base")]) == 0
    run = read_json(tmp_path / "base" / "result.json")["run"]
    assert main(["train", *options, "--data.seed=1", "--parent", str(tmp_path / "base")]) == 0
    capsys.readouterr()
    (child,) = (path for path in tmp_path.iterdir() if path.name != "base")
    assert json.loads((child / "config.json").read_text())["parent"] == run
    assert json.loads((child / "config.json").read_text())["model"]["d_model"] == 8
    (tmp_path / "a").mkdir()
    shutil.copytree(tmp_path / "base", tmp_path / "two" / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "two" / run)
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (["--parent", str(tmp_path / "none")], f"--parent '{tmp_path / 'none'}': expected a run's folder, or the id"),
        (
            ["--parent", str(tmp_path / "base"), "--out", str(tmp_path / "a" / "b")],
            f"must lie beside the run, in {tmp_path / 'a'};",
        ),
        (["--parent", str(tmp_path / "two" / "base")], f"{tmp_path / 'two' / run} is that run too and comes first"),
        (["--parent", str(tmp_path / "base"), "--out", str(tmp_path / "two" / "new")], "must lie beside the run, in"),
        (["--parent", run, "--out", str(tmp_path / "a" / "b")], f"no such run in {tmp_path / 'a'}"),
        (["--parent", str(tmp_path / "base"), "--model.d-model=16"], "model.d_model = 16: the parent"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["train", *options, *arguments])
        assert ended.value.code == 2
        printed, error = capsys.readouterr()
        assert printed == ""
        assert message in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
