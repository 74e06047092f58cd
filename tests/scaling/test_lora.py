"""Runs of which only adapters are trained: the base is read from the parent, never written, and merged for asking."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from scaling.config import OPTIMIZERS, DataConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.data.store import open_store
from scaling.engine.loop import Preempted, train
from scaling.engine.parameters import parts_of
from scaling.engine.program import abstract_state
from scaling.engine.sharding import make_mesh
from scaling.engine.swarm import Member, train_swarm
from scaling.execution import Execution
from scaling.load import load
from sweeps.table import row

STEPS = 20


@pytest.fixture(scope="module")
def base(corpus):
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    model = ModelConfig(d_model=16, n_layers=2, n_heads=2)
    return RunConfig(model=model, data=data, batch_size=4, tokens=STEPS * 128, schedule=ScheduleConfig("constant", 0))


@pytest.fixture(scope="module")
def home(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(base, folder / base.run_id)
    return folder


def adapted(parent, rank=2, **changes):
    data, lora = dataclasses.replace(parent.data, seed=1), LoraConfig(rank=rank)
    return dataclasses.replace(parent, parent=parent.run_id, data=data, lora=lora, **changes)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_adapters_are_trained_and_kept(base, home):
    before = files(home / base.run_id)
    child = adapted(base)
    result = train(child, home / child.run_id)
    assert files(home / base.run_id) == before, "the base is read, not written"
    whole = load(home / child.run_id)
    assert result.n_trained == row(home / child.run_id)["n_trained"] == child.n_trained
    assert result.n_trained < result.n_total / 2
    assert row(home / base.run_id)["n_trained"] == base.counts.n_total
    changed = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), whole.params, load(home / base.run_id).params)
    assert all(leaf == 0 for path, leaf in jax.tree.leaves_with_path(changed) if path[-1].key == "scale")
    assert all(leaf > 0 for path, leaf in jax.tree.leaves_with_path(changed) if path[-1].key != "scale")
    kept = json.loads((home / child.run_id / f"checkpoints/{child.steps}/default/_METADATA").read_text())
    names = [[key["key"] for key in leaf["key_metadata"]] for leaf in kept["tree_metadata"].values()]
    arrays = [name for name in names if name[0] == "params"]
    assert arrays, "orbax's own list of what it has written"
    assert {name[-1] for name in arrays} == {"a", "b"}, "the base is saved twice"


def test_what_is_loaded_is_what_was_trained(base, home):
    """The validation loss of the merged model is the loss that the run recorded, over the same windows."""
    child = adapted(base, tokens=1280)
    result = train(child, home / child.run_id)
    windows = open_store(base.data.source, "bytes", valid_fraction=0.1).valid_windows(32)
    assert -load(home / child.run_id).token_logprobs(windows).mean() == pytest.approx(result.loss, rel=1e-6)
    assert result.loss < train(base, home / base.run_id).loss


def test_a_run_of_adapters_resumes_to_the_same_bits(base, home, tmp_path, monkeypatch):
    monkeypatch.setattr("scaling.engine.loop.CHUNK_SECONDS", 0.0)
    shutil.copytree(home / base.run_id, tmp_path / base.run_id)
    child = adapted(base)
    calls = iter(range(100))
    with pytest.raises(Preempted):
        train(child, tmp_path / "child", should_stop=lambda: next(calls) == 6)
    resumed, alone = train(child, tmp_path / "child"), train(child, home / child.run_id)
    assert resumed.timing["resumed_at_step"] > 0
    assert resumed.loss == alone.loss
    curves = [pq.read_table(folder / "curve.parquet") for folder in (tmp_path / "child", home / child.run_id)]
    assert curves[0].equals(curves[1])


def test_chains_through_adapters(base, home):
    """A child of an adapted run starts from the merged model, whether it trains all of it or adapters again."""
    child = adapted(base)
    train(child, home / child.run_id)
    expected = load(home / child.run_id).params
    still = OptimConfig(lr=1e-30, weight_decay=0.0)
    for lora in (LoraConfig(), LoraConfig(rank=3, targets=("up",))):
        grandchild = dataclasses.replace(base, parent=child.run_id, lora=lora, optim=still, tokens=256)
        train(grandchild, home / grandchild.run_id)
        found = load(home / grandchild.run_id).params
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("line", ["fsdp=4", "data=2,tensor=2"])
def test_adapters_on_a_mesh(base, home, line):
    child = adapted(base)
    alone = train(child, home / child.run_id)
    few = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: few)
        result = train(child, home / line, Execution(mesh=line))
    assert result.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_takes_adapters(base, name):
    """Their state is that of the adapters: some look at an array's name or shape."""
    parts = parts_of(adapted(base))
    state = abstract_state(parts, OptimConfig(name=name), make_mesh())
    size = sum(x.size for x in jax.tree.leaves(state["params"]))
    assert size == adapted(base).n_trained
    assert sum(x.size for x in jax.tree.leaves(state["opt"])) < 2 * size + 10


def test_adapters_of_one_parent_train_as_a_swarm(base, home):
    configs = [adapted(base, optim=OptimConfig(lr=lr)) for lr in (0.005, 0.01, 0.02)]
    swarm = train_swarm([Member(config, home / f"swarm-{i}") for i, config in enumerate(configs)])
    for config, result in zip(configs, swarm, strict=True):
        assert result.loss == pytest.approx(train(config, home / config.run_id).loss, rel=1e-5)
    assert len({result.loss for result in swarm}) == 3


def test_adapters_want_a_base(base, tmp_path):
    alone = dataclasses.replace(base, lora=LoraConfig(rank=2))
    with pytest.raises(InputError, match=r"lora\.rank = 2: adapters stand on a trained model; give its run as parent"):
        train(alone, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for model, message in (
        (dataclasses.replace(base.model, parametrization="mup"), "only where model.parametrization is standard"),
        (dataclasses.replace(base.model, tied=True), "lora.targets = head: a tied model has no head of its own"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(base, model=model, lora=LoraConfig(rank=2, targets=("head",)))


def test_a_base_that_is_gone_is_told(base, home, tmp_path):
    child = adapted(base)
    train(child, home / child.run_id)
    shutil.copytree(home / child.run_id, tmp_path / child.run_id)
    with pytest.raises(InputError, match=f"parent = '{base.run_id}': no such run"):
        load(tmp_path / child.run_id)
