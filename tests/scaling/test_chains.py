"""Runs that start from what another run ended with: its very parameters, through stops, on meshes, or not at all."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.config import ModelConfig, replace
from models.errors import InputError
from scaling.chain import folder_beside
from scaling.config import DataConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.loop import Preempted, train
from scaling.engine.program import program_for
from scaling.engine.sharding import make_mesh
from scaling.engine.swarm import Member, train_swarm
from scaling.execution import Execution

STEPS = 20


@pytest.fixture(scope="module")
def base(corpus):
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    model = ModelConfig(d_model=16, n_layers=1, n_heads=2)
    return RunConfig(model=model, data=data, batch_size=4, tokens=STEPS * 128, schedule=ScheduleConfig("constant", 0))


@pytest.fixture(scope="module")
def home(base, tmp_path_factory):
    """A folder in which the parent has finished."""
    folder = tmp_path_factory.mktemp("runs")
    train(base, folder / base.run_id)
    return folder


def child_of(base, **changes):
    data = dataclasses.replace(base.data, seed=1)
    return dataclasses.replace(base, parent=base.run_id, data=data, **changes)


def final_params(folder, config):
    abstract = program_for(config, Execution(), make_mesh()).abstract_state
    return jax.device_get(Checkpointer(folder / "checkpoints").restore(abstract, print)[1]["params"])


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_child_starts_from_its_parents_final_parameters(base, home):
    """At a rate of nearly zero it ends where the parent ended: from other parameters it would end elsewhere. What it
    then reports is the parent's loss, and the FLOPs of both stand apart.
    """
    still = child_of(base, optim=OptimConfig(lr=1e-30, weight_decay=0.0))
    result = train(still, home / still.run_id)
    parent = train(base, home / base.run_id)
    same_bits(final_params(home / still.run_id, still), final_params(home / base.run_id, base))
    assert result.loss == parent.loss
    assert (result.flops_parents, result.flops) == (parent.flops, still.flops)
    assert parent.flops_parents == 0


def test_the_optimiser_starts_anew(base, home):
    """One step from the parent's parameters, with fresh moments, is what an unrelated optimiser makes of them."""
    one = child_of(base, tokens=128, optim=OptimConfig(lr=0.01, weight_decay=0.0, clip=0.0, b1=0.0, b2=0.0, eps=1e-30))
    train(one, home / one.run_id)
    before, after = (final_params(home / config.run_id, config) for config in (base, one))
    moved = np.concatenate(
        [np.abs(b - a).ravel() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    )
    # Without memory Adam's direction is the gradient's sign.
    np.testing.assert_allclose(np.unique(np.round(moved[moved > 1e-5], 4)), [0.01], atol=2e-4)


def test_grandchildren_and_the_flops_above_them(base, home):
    child = child_of(base)
    grandchild = child_of(child, tokens=256)
    with pytest.raises(InputError, match=f"parent = '{child.run_id}': no such run"):
        train(dataclasses.replace(grandchild, seed=5), home / "elsewhere" / "x")
    first, second = (train(config, home / config.run_id) for config in (child, grandchild))
    assert second.flops_parents == first.flops + first.flops_parents == child.flops + base.flops


def test_a_child_resumes_to_the_same_bits_and_shares_a_trunk(base, home, tmp_path, monkeypatch):
    from scaling.engine.states import Sharing

    monkeypatch.setattr("scaling.engine.loop.CHUNK_SECONDS", 0.0)
    shutil.copytree(home / base.run_id, tmp_path / base.run_id)
    child = child_of(base)
    calls = iter(range(100))
    with pytest.raises(Preempted):
        train(child, tmp_path / "child", should_stop=lambda: next(calls) == 6, sharing=Sharing((5,)))
    result = train(child, tmp_path / "child", sharing=Sharing((5,)))
    whole = train(child, home / child.run_id)
    assert result.timing["resumed_at_step"] > 0
    assert result.loss == whole.loss
    curves = [pq.read_table(folder / "curve.parquet") for folder in (tmp_path / "child", home / child.run_id)]
    assert curves[0].equals(curves[1])
    longer = child_of(base, tokens=2 * base.tokens)
    sources = Sharing(sources=((tmp_path / "child", 5),))
    branch, alone = train(longer, tmp_path / "longer", sharing=sources), train(longer, tmp_path / "alone")
    assert branch.branched_at_step == 5
    assert branch.loss == alone.loss


@pytest.mark.parametrize("line", ["fsdp=4", "data=2,tensor=2"])
def test_a_parents_parameters_are_placed_on_the_mesh(base, home, line):
    """Trained on one device, continued on several: the same to rounding, each array lying as the mesh says."""
    child = child_of(base, seed=7)
    whole = train(child, home / child.run_id)
    devices = {"fsdp=4": 4, "data=2,tensor=2": 4}[line]
    with pytest.MonkeyPatch.context() as patch:
        few = jax.devices()[:devices]
        patch.setattr(jax, "devices", lambda: few)
        result = train(child, home / line, Execution(mesh=line))
    assert result.loss == pytest.approx(whole.loss, rel=1e-5)


def test_children_of_different_parents_train_as_a_swarm(base, home):
    other = dataclasses.replace(base, seed=3)
    train(other, home / other.run_id)
    configs = [child_of(base, seed=9), child_of(other, seed=9)]
    swarm = train_swarm([Member(config, home / f"swarm-{i}") for i, config in enumerate(configs)])
    for config, result in zip(configs, swarm, strict=True):
        assert result.loss == pytest.approx(train(config, home / config.run_id).loss, rel=1e-5)
    assert swarm[0].loss != swarm[1].loss


def refused(config, folder, message):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        train(config, folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before, "a run that is refused writes nothing"


def test_a_parent_that_cannot_be_started_from(base, home, tmp_path):
    child = child_of(base)
    refused(child, tmp_path / "child", "no such run in")
    copy = tmp_path / base.run_id
    copy.mkdir()
    shutil.copy(home / base.run_id / "config.json", copy)
    refused(child, tmp_path / "child", "has not finished")
    values = json.loads((home / base.run_id / "result.json").read_text())
    diverged = values | {"status": "diverged", "loss": None, "diverged_at_step": 3}
    (copy / "result.json").write_text(json.dumps(diverged))
    refused(child, tmp_path / "child", "diverged at step 3")
    (copy / "config.json").write_text(json.dumps(child.to_dict()))
    refused(child, tmp_path / "child", "holds another run")


def test_a_parent_of_another_model_or_vocabulary(base, home):
    for model, message in (
        (replace(base.model, d_model=32), "model.d_model = 32: the parent"),
        (replace(base.model, n_layers=2), "model.n_layers = 2"),
        (replace(base.model, qk_norm=False), "model.qk_norm = False"),
    ):
        refused(child_of(base, model=model), home / "refused", message)
    bpe = dataclasses.replace(base.data, tokenizer="bpe:300")
    refused(
        dataclasses.replace(child_of(base), data=bpe, model=replace(base.model, vocab_size=300)),
        home / "refused",
        "model.vocab_size = 300: the parent",
    )


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # orbax's, of a damaged read
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_parent_whose_checkpoint_is_damaged_says_how_to_mend_it(base, home, tmp_path):
    copy = tmp_path / base.run_id
    shutil.copytree(home / base.run_id, copy)
    for path in copy.glob(f"checkpoints/{STEPS}/**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"is missing or damaged \(.*\); remove its result\.json and train it again"):
        train(child_of(base), tmp_path / "child")
    (copy / "result.json").unlink()
    train(base, copy)
    assert train(child_of(base), tmp_path / "child").loss == train(child_of(base), home / child_of(base).run_id).loss


def test_a_run_is_found_beside_by_its_id_or_in_a_folder_of_its_own_name(base, home, tmp_path):
    assert folder_beside(home / "child", base.run_id) == home / base.run_id
    shutil.copytree(home / base.run_id, tmp_path / "mine")
    assert folder_beside(tmp_path / "child", base.run_id) == tmp_path / "mine"
    assert folder_beside(tmp_path / "child", "0123456789ab") == tmp_path / "0123456789ab"


@pytest.mark.parametrize("parent", ["abc", "0123456789AB", "../../../etc/", 5])
def test_a_parent_is_a_runs_id(base, parent):
    with pytest.raises(InputError, match=r"parent = .*: expected a run's id"):
        dataclasses.replace(base, parent=parent)
