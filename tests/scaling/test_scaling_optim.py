"""Optimisers and weight decay, against closed forms and against optax's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from scaling.config import OPTIMIZERS, OptimConfig, RunConfig, ScheduleConfig
from scaling.engine.optim import decays, make_direction
from scaling.engine.schedules import learning_rates, weight_decays
from scaling.optimizers.muon import MATRICES

MODEL = ModelConfig(vocab_size=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


def zero_params(model: ModelConfig = MODEL):
    """Zeros in the shapes of the model's parameters."""
    shapes = jax.eval_shape(lambda key: transformer.init(model, key), jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def random_like(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def descend(direction, params, state, grads, lr, decay):
    """The engine's step: p - lr u - decay p, the last for arrays that decay."""
    update, state = direction.update(grads, state, params)
    return jax.tree.map(lambda p, u, d: p - lr * u - decay * p * d, params, update, decays(params)), state


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_adamw_is_that_of_optax_step_by_step():
    """With coupled decay; if this fails, learning rate or weight decay means something else than in other code."""
    optim = OptimConfig(lr=0.03, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.2, clip=1.0)
    config = RunConfig(optim=optim, tokens=8 * 1024, schedule=ScheduleConfig(warmup_tokens=3 * 1024))
    lr, decay = learning_rates(config), weight_decays(config)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda step: jnp.asarray(lr)[step], 0.8, 0.9, 1e-6, weight_decay=0.2, mask=decays),
    )
    ours = make_direction(optim)
    a = b = {"w": jnp.ones((3, 4)), "scale": jnp.ones(4)}
    state_a, state_b = ours.init(a), theirs.init(b)
    for i in range(8):
        grads = random_like(a, i)
        a, state_a = descend(ours, a, state_a, grads, lr[i], decay[i])
        update, state_b = theirs.update(grads, state_b, b)
        b = optax.apply_updates(b, update)
        assert_trees_close(a, b)


def test_weight_decay_in_closed_form():
    """Coupled decay follows the learning rate, independent decay only the shape of its schedule."""

    def factors(lr: float, decay: str) -> np.ndarray:
        optim = OptimConfig(lr=lr, weight_decay=0.01, decay=decay)
        schedule = ScheduleConfig(warmup_tokens=10 * 1024, decay_fraction=0.2)
        return weight_decays(RunConfig(optim=optim, schedule=schedule, tokens=100 * 1024))

    at = np.arange(100) + 0.5
    shape = np.minimum(1, at / 10) * (1 - np.sqrt(np.clip((at - 80) / 20, 0, 1)))
    for lr in (0.5, 0.002):
        assert factors(lr, "coupled").dtype == factors(lr, "independent").dtype == np.float32
        np.testing.assert_allclose(factors(lr, "coupled"), lr * 0.01 * shape, rtol=1e-5)
        np.testing.assert_allclose(factors(lr, "independent"), 0.01 * shape, rtol=1e-5)


def test_lion_steps_by_the_sign_of_the_interpolated_momentum():
    direction = make_direction(OptimConfig(name="lion", b1=0.9, b2=0.99, clip=0.0))
    params = {"w": jnp.zeros((1, 3))}
    first, second = {"w": jnp.array([[3.0, -0.01, 2.0]])}, {"w": jnp.array([[-0.1, -1.0, 0.0]])}
    update, state = direction.update(first, direction.init(params), params)
    np.testing.assert_array_equal(update["w"], [[1, -1, 1]])
    # momentum 0.01 g1 = [0.03, -0.0001, 0.02]; then 0.9 momentum + 0.1 g2 = [0.017, -0.10009, 0.018]
    update, _ = direction.update(second, state, params)
    np.testing.assert_array_equal(update["w"], [[1, -1, 1]])
    # with b2 = 0.9 momentum is [0.3, ...], with b1 = 0.1 the new gradient wins: b1 and b2 are not exchanged
    swift = make_direction(OptimConfig(name="lion", b1=0.1, b2=0.9, clip=0.0))
    update, _ = swift.update(second, swift.update(first, swift.init(params), params)[1], params)
    np.testing.assert_array_equal(update["w"], [[-1, -1, 1]])


def test_muon_orthogonalises_every_hidden_matrix_by_itself():
    """All singular values near 0.2 sqrt(max(fan_in, fan_out)): of each matrix, where an array holds several.

    Those in one array get gradients of very different size: orthogonalised together, the small ones would stay small.
    """
    c = MODEL
    D, F, G, J, K = c.d_model, c.d_ff, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim
    params = zero_params()
    grads = random_like(params, 1)
    rng = np.random.default_rng(0)
    block = grads["block_0"]
    for j in range(J + 2):
        block["qkv"][:, :, j] = 10.0**j * well_conditioned(rng, D, G * K).reshape(D, G, K)
    for i in range(2):
        block["up"][:, i] = 1e3**i * well_conditioned(rng, D, F)
    block["attention_out"] = well_conditioned(rng, G * J * K, D).reshape(G, J, K, D)
    block["down"] = well_conditioned(rng, F, D)
    direction = make_direction(OptimConfig(name="muon", clip=0.0))
    u = jax.jit(direction.update)(grads, direction.init(params), params)[0]["block_0"]
    matrices = {f"qkv {j}": u["qkv"][:, :, j].reshape(D, G * K) for j in range(J + 2)}
    matrices |= {f"up {i}": u["up"][:, i] for i in range(2)}
    matrices |= {"attention_out": u["attention_out"].reshape(G * J * K, D), "down": u["down"]}
    for name, matrix in matrices.items():
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        assert values.min() > 0.65, name
        assert values.max() < 1.25, name


def well_conditioned(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Singular values from 1 to 2: Newton-Schulz does not lift those near 0 all the way."""
    left, values, right = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    return (left * np.linspace(2, 1, len(values)) @ right).astype(np.float32)


def test_muon_gives_embedding_head_and_norms_the_update_of_adam():
    params = zero_params()
    optim = OptimConfig(name="muon", b1=0.8, b2=0.9, eps=1e-3, clip=0.0)
    muon, adam = make_direction(optim), optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    state_m, state_a = muon.init(params), adam.init(params)
    for i in range(2):
        grads = random_like(params, i)
        ours, state_m = jax.jit(muon.update)(grads, state_m, params)
        theirs, state_a = jax.jit(adam.update)(grads, state_a, params)
    for tree in (ours, theirs):
        for block in ("block_0", "block_1"):
            for name in MATRICES:
                del tree[block][name]
    assert {"embed", "head", "norm_out"} < ours.keys()
    assert_trees_close(ours, theirs)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_muon_knows_every_matrix_of_the_transformer(activation):
    """A matrix under a new name would silently be trained by Adam: give it a line in MATRICES."""
    params = zero_params(ModelConfig(vocab_size=16, d_model=32, n_layers=1, activation=activation))
    hidden = {name for name, leaf in params["block_0"].items() if not isinstance(leaf, dict)}
    assert hidden == set(MATRICES)
    for name, numbers in MATRICES.items():
        axes = np.concatenate([np.atleast_1d(a) for a in numbers])
        assert max(axes) < params["block_0"][name].ndim


def test_muon_remembers_by_its_momentum():
    """After g, a gradient of -0.1 g: without momentum the direction turns round, at 0.95 it does not."""
    params = {"down": jnp.zeros((2, 3))}
    g = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])

    def second(momentum: float) -> float:
        direction = make_direction(OptimConfig(name="muon", momentum=momentum, clip=0.0))
        update = jax.jit(direction.update)
        state = update({"down": g}, direction.init(params), params)[1]
        return float(update({"down": -0.1 * g}, state, params)[0]["down"][0, 0])

    assert second(0.0) < -0.2
    assert second(0.95) > 0.2


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix():
    params = {"w": jnp.zeros((256, 256)), "small": jnp.zeros((8, 16)), "scale": jnp.zeros(8)}

    def numbers(name: str) -> int:
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(make_direction(OptimConfig(name=name)).init, params)))

    assert numbers("adamw") > 2 * 256 * 256
    assert numbers("adafactor") < 256 + 256 + 8 + 16 + 8 + 10


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 8), (8, 1)])
def test_adafactor_factors_the_same_axes_at_every_shape(heads, kv_heads):
    """The matrices that an array holds beside each other are factored each by itself, also where there are more heads
    than a head is wide: in other units they get the same update. If this fails, the optimiser
    changes along a ladder, and with it the law that is fitted to it.
    """
    model = ModelConfig(vocab_size=16, d_model=32, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, d_ff=64)
    params = zero_params(model)
    direction = make_direction(OptimConfig(name="adafactor", clip=0.0))
    first = jax.jit(lambda grads: direction.update(grads, direction.init(params), params)[0]["block_0"])
    grads = random_like(params, 1)
    expected = first(grads)
    for name, axis in [("qkv", 1), ("qkv", 2), ("attention_out", 0), ("attention_out", 1), ("up", 1)]:
        gradient = grads["block_0"][name]
        shape = [-1 if i == axis else 1 for i in range(gradient.ndim)]
        units = np.geomspace(0.1, 10, gradient.shape[axis], dtype=np.float32).reshape(shape)
        other = first(grads | {"block_0": grads["block_0"] | {name: gradient * units}})
        np.testing.assert_allclose(other[name], expected[name], rtol=1e-3, err_msg=f"{name}, axis {axis}")


def test_adafactor_in_closed_form():
    """First step: g over the root of its row and column means, divided by its RMS where that is above 1. A constant
    gradient then keeps the second moment, so the second step is the first."""
    direction = make_direction(OptimConfig(name="adafactor", b2=0.95, clip=0.0))
    g = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]])
    row, column = (g**2).mean(1, keepdims=True), (g**2).mean(0, keepdims=True)
    expected = g / np.sqrt(row * column / row.mean())
    expected /= max(1.0, np.sqrt((expected**2).mean()))
    params = {"w": jnp.zeros((2, 3))}
    first, state = direction.update({"w": jnp.asarray(g)}, direction.init(params), params)
    np.testing.assert_allclose(first["w"], expected, rtol=1e-5)
    second, _ = direction.update({"w": jnp.asarray(g)}, state, params)
    np.testing.assert_allclose(second["w"], expected, rtol=1e-5)


def test_adafactor_remembers_no_longer_than_b2():
    """After 100 steps of gradient 1, one of 2: v = b2 + 4 (1 - b2), as 1 - 101^-0.8 = 0.975 is above b2 = 0.9."""
    direction = make_direction(OptimConfig(name="adafactor", b2=0.9, clip=0.0))
    params = {"scale": jnp.zeros(2)}
    state = direction.init(params)
    update = jax.jit(direction.update)
    for _ in range(100):
        _, state = update({"scale": jnp.ones(2)}, state, params)
    _, state = update({"scale": jnp.full(2, 2.0)}, state, params)
    v = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
    assert len(v) == 1
    np.testing.assert_allclose(v[0], 0.9 + 4 * 0.1, rtol=1e-5)


def test_a_hook_is_the_transform_it_names():
    params = {"w": jnp.ones((2, 3))}
    hook = make_direction(OptimConfig(name="optax:scale_by_adam", options='{"b1": 0.8, "b2": 0.5}', clip=0.0))
    adam = optax.scale_by_adam(b1=0.8, b2=0.5)
    state_h, state_a = hook.init(params), adam.init(params)
    for i in range(3):
        grads = random_like(params, i)
        ours, state_h = hook.update(grads, state_h, params)
        theirs, state_a = adam.update(grads, state_a, params)
        assert_trees_close(ours, theirs, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_module:f", "", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("optax:scale_by_adm", "", "has no attribute 'scale_by_adm'"),
        ("optax:scale_by_adam", '{"b7": 1}', """called with {"b7":1}: TypeError"""),
        ("optax:__version__", "", "called with no options: TypeError"),
        ("builtins:dict", "", "returned dict, not an optax.GradientTransformation"),
    ],
)
def test_bad_hooks_are_told_in_one_line(name, options, message):
    config = OptimConfig(name=name, options=options)
    RunConfig(optim=config)  # whether it can be imported is for the machine that trains to say
    with pytest.raises(InputError) as caught:
        make_direction(config)
    assert f"optim.name = {name!r}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gradients_are_clipped_before_a_hook_too():
    direction = make_direction(OptimConfig(name="optax:identity", clip=1.0))
    params = {"w": jnp.array([[30.0, 40.0]])}
    np.testing.assert_allclose(
        direction.update(params, direction.init(params), params)[0]["w"], [[0.6, 0.8]], rtol=1e-6
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_learns_a_tiny_transformer(name):
    """Twenty steps on one batch of a repeating pattern; head and output projections start at zero, with gradient 0."""
    model = dataclasses.replace(MODEL, n_layers=1)
    direction = make_direction(OptimConfig(name=name))
    lr = 0.003 if name == "lion" else 0.02
    tokens_BU = (jnp.arange(17) * 3 + jnp.arange(4)[:, None]) % 16
    # Random where the transformer starts at random; drawn by numpy, as compiling the draws takes longer than the test.
    params = random_like(zero_params(model), 0)
    block = params["block_0"]
    params["head"] *= 0
    for name in ("attention_out", "down"):
        block[name] *= 0
    for name in ("qkv", "up"):
        block[name] *= model.d_model**-0.5
    params = jax.tree.map(lambda x: np.ones_like(x) if x.ndim == 1 else x, params)

    def loss_fn(params):
        return jnp.mean(transformer.next_token_loss(model, params, tokens_BU)[0])

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return descend(direction, params, state, grads, lr, 0.0), loss

    start = (params, direction.init(params))
    (params, _), losses = jax.jit(lambda start: jax.lax.scan(step, start, length=20))(start)
    assert losses[0] == pytest.approx(np.log(16), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
