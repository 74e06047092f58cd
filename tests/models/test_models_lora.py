"""Low-rank adapters against what they stand for: full tuning, restricted to a change of rank R."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lora, transformer
from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from models.sizing import adapter_counts, flops_per_token, matrices

MODEL = ModelConfig(vocab_size=24, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12)
SHAPES = {
    "grouped": MODEL,
    "gelu": ModelConfig(vocab_size=24, d_model=8, n_layers=1, n_heads=2, activation="gelu"),
    "tied": ModelConfig(vocab_size=24, d_model=8, n_layers=1, n_heads=2, tied=True),
}
TOKENS_BU = np.random.default_rng(0).integers(0, 24, (4, 7)).astype(np.int32)


def shaken(tree, scale, seed):
    """A tree of arrays with noise on each."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + scale * rng.normal(size=x.shape).astype(np.float32), tree)


def trained_base(model):
    """Parameters none of which is zero, as after some training: the matrices that start at zero hide gradients."""
    return shaken(jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0)), 0.1, 0)


def fresh(model, config):
    return jax.jit(lora.init, static_argnums=(0, 1))(model, config, jax.random.key(1))


def moved(model, config):
    """Adapters of which B is no longer zero."""
    return shaken(fresh(model, config), 0.1, 1)


@functools.partial(jax.jit, static_argnums=0)
def loss(model, params):
    return transformer.mean_loss(model, params, TOKENS_BU)[0]


@functools.partial(jax.jit, static_argnums=0)
def adapted_loss(config, base, adapters):
    return transformer.mean_loss(MODEL, lora.merged(config, base, adapters), TOKENS_BU)[0]


adapter_gradients = jax.jit(jax.grad(adapted_loss, argnums=2), static_argnums=0)
full_gradients = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)


@pytest.mark.parametrize("name", SHAPES)
def test_fresh_adapters_change_nothing_and_are_counted(name):
    model, config = SHAPES[name], LoraConfig(rank=3)
    base, adapters = trained_base(model), fresh(model, config)
    for x, y in zip(jax.tree.leaves(lora.merged(config, base, adapters)), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(x, y)
    assert adapter_counts(model, config).n_trained == sum(x.size for x in jax.tree.leaves(adapters))
    for path, (M, N) in matrices(model).items():
        array = base
        for part in path:
            array = array[part]
        assert array.size == M * N


def test_parameters_of_the_studys_shape():
    """1,200 for each rank, as the pilot of the capacity study counted them."""
    model = ModelConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=2)
    assert [adapter_counts(model, LoraConfig(rank=r)).n_trained for r in (1, 4, 16)] == [1200, 4800, 19200]


def test_gradients_are_those_of_full_tuning_restricted():
    """With W = W0 + s A B the chain rule gives dA = s G B' and dB = s A' G, G being the gradient of full tuning at W.
    Were one of them off, adapters would learn something else than a low-rank change of the model.
    """
    config = LoraConfig(rank=2, alpha=6.0)
    base, adapters = trained_base(MODEL), moved(MODEL, config)
    grads = adapter_gradients(config, base, adapters)
    full = full_gradients(MODEL, lora.merged(config, base, adapters))
    scale = 6.0 / 2
    for path, (M, N) in lora.adapted(MODEL, config).items():
        pair, g, G = adapters, grads, full
        for part in path:
            pair, g, G = pair[part], g[part], G[part]
        G_MN = G.reshape(M, N)
        np.testing.assert_allclose(g["a"], scale * G_MN @ pair["b"].T, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(g["b"], scale * pair["a"].T @ G_MN, rtol=2e-4, atol=1e-6)


def test_gradients_against_finite_differences():
    config = LoraConfig(rank=2)
    base, adapters = trained_base(MODEL), moved(MODEL, config)
    grads = adapter_gradients(config, base, adapters)
    for seed in range(3):
        way = shaken(jax.tree.map(np.zeros_like, adapters), 1e-3, seed)
        ahead = adapted_loss(config, base, jax.tree.map(np.add, adapters, way))
        behind = adapted_loss(config, base, jax.tree.map(np.subtract, adapters, way))
        expected = sum(np.vdot(g, w) for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(way), strict=True))
        assert (ahead - behind) / 2 == pytest.approx(expected, rel=0.02)


def test_at_full_rank_a_step_is_a_step_of_full_tuning():
    """A = 1 and B = 0: a step of size eta on B moves W by -eta (alpha / rank)^2 times the full gradient, to the bit of
    the products' rounding.
    """
    D, V = MODEL.d_model, MODEL.vocab_size
    config = LoraConfig(rank=D, alpha=float(D), targets=("head",))
    base = trained_base(MODEL)
    adapters = {"head": {"a": jnp.eye(D), "b": jnp.zeros((D, V))}}
    grads = adapter_gradients(config, base, adapters)
    stepped = {"head": {"a": adapters["head"]["a"], "b": -0.1 * grads["head"]["b"]}}
    full = full_gradients(MODEL, base)["head"]
    change = lora.merged(config, base, stepped)["head"] - base["head"]
    np.testing.assert_allclose(change, -0.1 * full, atol=1e-7)


def test_only_what_is_named_changes():
    config = LoraConfig(rank=1, targets=("up", "qkv"))
    base = trained_base(MODEL)
    whole = lora.merged(config, base, moved(MODEL, config))
    changed = jax.tree.map_with_path(lambda path, x, y: path[-1].key if (x != y).any() else "", whole, base)
    assert set(jax.tree.leaves(changed)) == {"qkv", "up", ""}
    assert config.targets == ("qkv", "up"), "in one order, so that equal sets are equal runs"


def test_flops_leave_out_the_gradients_that_nobody_needs():
    """A product costs two forward and four backward; without an adapter the two for the weight's gradient fall away."""
    config = LoraConfig(rank=2, targets=("qkv", "attention_out", "up", "down", "head"))
    assert adapter_counts(MODEL, config).flops_saved_per_token == 0
    head = LoraConfig(rank=2, targets=("head",))
    others = sum(M * N for path, (M, N) in matrices(MODEL).items() if path[0] not in ("embed", "head"))
    assert adapter_counts(MODEL, head).flops_saved_per_token == 2 * others
    assert adapter_counts(MODEL, head).flops_per_step == 3 * 2 * 2 * 8 * 24
    assert adapter_counts(MODEL, head).flops_saved_per_token < flops_per_token(MODEL, 16) / 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "lora.rank = -1"),
        ({"rank": 2.5}, "lora.rank = 2.5"),
        ({"rank": 2, "alpha": 0}, "lora.alpha = 0"),
        ({"rank": 2, "targets": ("qvk",)}, "lora.targets: 'qvk' is no matrix, expected some of embed, qkv"),
        ({"rank": 2, "targets": ()}, "lora.targets: names no matrix"),
    ],
)
def test_what_cannot_be_adapted_is_refused(fields, message):
    with pytest.raises(InputError) as caught:
        LoraConfig(**fields)
    assert message in str(caught.value)


def test_without_a_rank_the_other_fields_say_nothing():
    assert LoraConfig(alpha=3.0, targets=("up",)) == LoraConfig()
