"""N and FLOPs from a config against the arrays that init makes, the products that are traced, and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from models.sizing import aspect_ratio, counts, flops_per_token, for_size, training_bytes

CONFIGS = {
    "plain": ModelConfig(d_model=32, n_layers=3, n_heads=2),
    "tied": ModelConfig(d_model=32, n_layers=2, n_heads=4, tied=True, vocab_size=300),
    "grouped": ModelConfig(d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, qk_norm=False),
    "gelu": ModelConfig(d_model=16, n_layers=1, n_heads=1, activation="gelu", d_ff=40),
    "relu2": ModelConfig(d_model=64, n_layers=4, n_heads=2, activation="relu2"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_the_arrays_that_init_makes(name):
    config = CONFIGS[name]
    params = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    n = counts(config)
    assert n.n_total == sum(sizes.values())
    outside = sum(size for path, size in sizes.items() if "embed']" in path or "head']" in path)
    assert n.n_nonembedding == n.n_total - outside
    assert n.n_compute == n.n_nonembedding + config.d_model * config.vocab_size


def product_flops(jaxpr) -> float:
    """2mkn summed over every dot_general of a jaxpr and the jaxprs inside it."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += 2.0 * depth * np.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(inner, "eqns"):
                    total += product_flops(inner)
                elif hasattr(inner, "jaxpr"):
                    total += product_flops(inner.jaxpr)
    return total


def gradient_of(config, batch, length):
    def loss(params, tokens):
        return jnp.mean(transformer.next_token_loss(config, params, tokens)[0])

    params = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    return jax.value_and_grad(loss), params, jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_the_matrix_products_of_a_step(name):
    """Product by product, exactly; the plain attention computes the whole square, hence causal=False."""
    config, batch, length = CONFIGS[name], 2, 24
    step, params, tokens = gradient_of(config, batch, length)
    traced = product_flops(jax.make_jaxpr(step)(params, tokens).jaxpr)
    assert traced == flops_per_token(config, length, causal=False) * batch * length


def test_flops_agree_with_xla():
    """XLA counts element-wise work too, which vanishes with width: within 6 % at width 256, and above our count."""
    config, batch, length = ModelConfig(d_model=256, n_layers=2, n_heads=2, vocab_size=512), 2, 64
    step, params, tokens = gradient_of(config, batch, length)
    counted = jax.jit(step).lower(params, tokens).compile().cost_analysis()
    counted = (counted[0] if isinstance(counted, list) else counted)["flops"]
    ours = flops_per_token(config, length, causal=False) * batch * length
    assert 1.0 <= counted / ours < 1.06


def test_causal_attention_counts_half_the_square():
    config = CONFIGS["plain"]
    T, square = 128, flops_per_token(CONFIGS["plain"], 128, causal=False)
    attention = 3 * config.n_layers * 4 * T * config.d_model
    assert square - flops_per_token(config, T) == pytest.approx(attention * (1 - (T + 1) / (2 * T)), rel=1e-12)


def test_6nd_is_the_limit_without_attention():
    """At one token of context, FLOPs per token are 6 n_compute up to norm scales and the attention's product."""
    config = ModelConfig(d_model=512, n_layers=4, n_heads=8)
    assert flops_per_token(config, 1) == pytest.approx(6 * counts(config).n_compute, rel=5e-3)


@pytest.mark.parametrize("n", np.geomspace(1e4, 1e11, 36))
def test_for_size_meets_any_n(n):
    config = for_size(float(n))
    assert abs(counts(config).n_compute / n - 1) <= 0.05
    assert 0.33 < (config.d_model / config.n_layers) / aspect_ratio(n) < 3
    assert for_size(float(n)) == config


def test_for_size_keeps_what_is_pinned():
    config = for_size(2e5, n_layers=3, head_dim=16, activation="relu2", tied=True)
    assert (config.n_layers, config.head_dim, config.activation, config.tied) == (3, 16, "relu2", True)


def test_for_size_says_why_not():
    with pytest.raises(InputError, match=r"1e\+04 with vocabulary 50257: no model within 5%; the closest has"):
        for_size(1e4, vocab_size=50257)
    for n in (0, -5, 9e3, 2e11, float("nan")):
        with pytest.raises(InputError, match="expected n_compute from 1e4 to 1e11"):
            for_size(n)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"d_model": 64, "n_heads": 5},
            "model.n_heads = 5 does not divide model.d_model = 64; the nearest that does is 4",
        ),
        ({"d_model": 0}, "model.d_model = 0: expected a whole number"),
        ({"n_layers": -1}, "model.n_layers = -1"),
        ({"n_heads": 4, "n_kv_heads": 3}, "model.n_kv_heads = 3 does not divide"),
        ({"d_model": 12, "n_heads": 4}, "even head width"),
        ({"activation": "swish"}, "model.activation = 'swish'"),
        ({"vocab_size": 1.5}, "model.vocab_size = 1.5"),
        ({"z_loss": float("nan")}, "model.z_loss"),
    ],
)
def test_bad_shapes_name_the_field(fields, message):
    with pytest.raises(InputError) as caught:
        ModelConfig(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolved_defaults_compare_equal():
    assert ModelConfig(d_model=64, n_heads=4) == ModelConfig(d_model=64, n_heads=4, n_kv_heads=4, d_ff=168)


def test_memory_grows_with_batch_and_holds_the_state():
    config = CONFIGS["plain"]
    assert training_bytes(config, 8, 128) > training_bytes(config, 4, 128) > 16 * counts(config).n_total
