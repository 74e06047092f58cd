"""Parametrisations as experiments: what moves with the size of a model, and which learning rate is best."""

import dataclasses

import jax
import numpy as np
import pytest

from models.config import ModelConfig, replace
from models.errors import InputError
from models.parametrization import Multipliers, Rule, multipliers, rule
from models.transformer import init
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine.coordinates import changes_over, depths, slopes, topics, widths
from scaling.engine.optim import make_direction
from scaling.engine.program import CHUNK_STEPS, program_for
from scaling.engine.sharding import batch_sharding, make_mesh
from scaling.execution import Execution
from sweeps.define import configure
from sweeps.health import FLAT

ARRAYS = ("embed", "head", "qkv", "attention_out", "up", "down", "scale", "norm_out")
BASE = ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=4, base_width=64, base_depth=2)


def run(parametrization: str, lr: float = 0.002, **changes) -> RunConfig:
    model = replace(BASE, parametrization=parametrization, **changes)
    return RunConfig(model=model, data=DataConfig(seq_len=32), optim=OptimConfig(lr=lr), batch_size=8)


def test_ids_of_older_runs_stay():
    """The new fields are not in a run's identity while they hold their defaults; set, they are."""
    assert (
        set(RunConfig().to_dict()["model"]) & {"parametrization", "base_width", "base_depth", "base_head_dim"} == set()
    )
    other = dataclasses.replace(RunConfig(), model=ModelConfig(parametrization="mup", base_width=32))
    assert other.run_id != RunConfig().run_id
    assert RunConfig.from_dict(other.to_dict()) == other


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parametrization", ["mup", "completep"])
def test_at_the_base_all_are_the_standard_model(parametrization, tied):
    model = replace(BASE, parametrization=parametrization, tied=tied)
    assert {rule(model, name) for name in ARRAYS} == {Rule()}
    assert multipliers(model) == Multipliers()
    ours, standard = (init(m, jax.random.key(0)) for m in (model, replace(BASE, tied=tied)))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(standard), strict=True))


def test_the_table_at_twice_the_width_and_four_times_the_depth():
    model = replace(BASE, parametrization="completep", d_model=128, n_layers=8, n_heads=4)
    assert rule(model, "up") == Rule(lr=1 / 2, eps=1 / 8)
    assert rule(model, "embed") == Rule(eps=1 / 2)
    assert rule(model, "head") == Rule(eps=1 / 2)
    assert rule(model, "scale") == Rule(eps=1 / 8)
    assert rule(model, "norm_out") == Rule(eps=1 / 2), "the norm above all blocks has no residual multiplier"
    assert multipliers(model) == Multipliers(residual=1 / 4, logits=1 / 2, attention=2**-0.5)
    mup = replace(model, parametrization="mup")
    assert rule(mup, "up") == Rule(lr=1 / 2, eps=1 / 2)
    assert multipliers(mup).residual == 1.0


def test_a_step_of_the_optimiser_follows_the_table():
    """With a large epsilon the direction is g / epsilon: learning-rate over epsilon multiplier, array by array."""
    model = replace(BASE, parametrization="completep", d_model=256, n_layers=4)
    shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    optim = OptimConfig(eps=1e6, clip=0.0)
    grads = jax.tree.map(np.ones_like, params)

    def direction(model):
        optimizer = make_direction(optim, model)
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]

    ours, plain = direction(model), direction(replace(model, parametrization="standard"))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True):
        row = rule(model, "norm_out" if path[0].key == "norm_out" else path[-1].key)
        np.testing.assert_allclose(a, b * row.lr / row.eps, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_weight_decay_takes_the_same_share_at_every_width():
    """Without a gradient a hidden matrix shrinks by the run's own share, though its learning rate is another."""
    config = run("mup", d_model=256, n_heads=16)
    assert rule(config.model, "up").lr < 1.0
    program = program_for(config, Execution(), make_mesh())
    state = program.init(jax.random.key(0))
    before = np.asarray(state["params"]["block_0"]["up"])
    tokens = jax.device_put(topics(64, (CHUNK_STEPS, 8, 33)), batch_sharding(make_mesh(), axis=1))
    zeros = np.zeros(CHUNK_STEPS, np.float32)
    state, _ = program.steps(state, {}, {"batch_X": {"tokens_BU": tokens}}, zeros, zeros + np.float32(0.01), 1)
    np.testing.assert_allclose(state["params"]["block_0"]["up"], before * 0.99, rtol=1e-6)


def test_a_wrong_name_and_a_size_axis():
    with pytest.raises(InputError, match="parametrization = 'mu-p'"):
        ModelConfig(parametrization="mu-p")
    with pytest.raises(InputError, match="base_width = 0"):
        ModelConfig(base_width=0)
    sized = configure(run("mup"), {"n": 3e5})
    assert (sized.model.parametrization, sized.model.base_width) == ("mup", 64)


@pytest.mark.slow
def test_the_standard_parametrisation_fails_the_coordinate_check_on_its_output():
    """At muP's own learning rate and widths too, where ten steps already saturate it; most of all below those."""
    narrow = slopes(changes_over(widths(run("standard"), (64, 128, 256), seeds=(0, 1))))
    same = slopes(changes_over(widths(run("standard"), (192, 384, 768), seeds=(0, 1))))
    print(
        f"standard: slope of the logits {narrow['logits']:+.3f} and {same['logits']:+.3f}, most {same.abs().max():.3f}"
    )
    assert narrow["logits"] > 0.3, f"logits move by width^{narrow['logits']:.2f}: the check sees nothing"
    assert same["logits"] > FLAT
    assert same.abs().max() > 0.5


@pytest.mark.slow
def test_mup_passes_the_coordinate_check_over_width():
    """At small widths the random initial weights still matter, as 1 / sqrt(width); hence not from 64."""
    found = slopes(changes_over(widths(run("mup"), (192, 384, 768), seeds=range(6))))
    worst = found.abs().idxmax()
    print(f"muP: slope of {worst} {found[worst]:+.3f}, of the logits {found['logits']:+.3f}")
    assert abs(found[worst]) < FLAT, f"{worst} moves by width^{found[worst]:.3f}: learning rates will not carry over"


@pytest.mark.slow
def test_completep_passes_the_coordinate_check_over_depth_and_mup_does_not():
    base = run("completep", 0.0005, base_depth=4)
    found = slopes(changes_over(depths(base, (8, 16, 32), seeds=range(3))), "n_layers")
    mup = slopes(changes_over(depths(run("mup", 0.0005), (4, 8, 16))), "n_layers")
    worst = found.abs().idxmax()
    print(f"CompleteP: slope of {worst} {found[worst]:+.3f}; muP: of the last residual {mup['last.residual']:+.3f}")
    assert abs(found[worst]) < FLAT, f"{worst} moves by depth^{found[worst]:.3f}"
    assert mup["last.residual"] > 0.2


def trained(parametrization: str, width: int, lr: float) -> float:
    """Loss of the last 16 of 128 steps, the last quarter of them cooling down."""
    config = run(parametrization, lr, d_model=width, n_heads=width // 16, base_width=32)
    mesh = make_mesh()
    program = program_for(config, Execution(layers="scanned"), mesh)
    state = program.init(jax.random.key(0))
    for part in range(4):
        tokens = jax.device_put(topics(64, (CHUNK_STEPS, 8, 33), seed=part), batch_sharding(mesh, axis=1))
        rates = np.full(CHUNK_STEPS, lr, np.float32)
        if part == 3:
            rates *= np.linspace(1, 0, CHUNK_STEPS, dtype=np.float32)
        state, metrics = program.steps(state, {}, {"batch_X": {"tokens_BU": tokens}}, rates, rates * 0.1, CHUNK_STEPS)
    return float(np.mean(metrics["loss"][-16:]))


@pytest.mark.slow
def test_a_learning_rate_tuned_at_the_base_serves_eight_times_wider():
    """The loss at the best rate of width 32, over that at the best of width 256: nothing lost, or some percent."""
    rates = [0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04]
    small = [trained("mup", 32, lr) for lr in rates]  # at the base both are one model
    lost = {}
    for name in ("mup", "standard"):
        wide = [trained(name, 256, lr) for lr in rates]
        lost[name] = wide[int(np.argmin(small))] / min(wide) - 1
    print({name: f"{100 * share:.2f} %" for name, share in lost.items()})
    assert lost["mup"] < 0.01
    assert lost["standard"] > 0.02, "the standard one transfers too: the test shows nothing"
