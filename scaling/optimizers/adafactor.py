"""Gradients over the root of a second moment kept as its row and column means (1804.04235): b2 alone.

No first moment, and an absolute learning rate. The moment decays by 1 - t^-0.8 but by no more than b2 (2106.04560), and
the update is clipped to an RMS of 1.
"""

import jax
import jax.numpy as jnp
import optax

from scaling.config import OptimConfig

# The two axes that are rows and columns; any others number matrices. optax's own factoring takes the two largest axes,
# from 128 on: which they are changes with width and number of heads, and with them the optimiser, along a ladder.
AXES = {"qkv": (0, 3), "up": (0, 2)}  # DGNK: each head's matrix; DNF: gate and input apart
LAST = (-2, -1)  # of every other array: FD, VD, DV, and GJKD head by head


def direction(config: OptimConfig) -> optax.GradientTransformation:
    return optax.chain(scale_by_factored_rms(config.b2), optax.clip_by_block_rms(1.0))


def scale_by_factored_rms(b2: float) -> optax.GradientTransformation:
    """As optax's, its state included, over fixed axes of each array; an array without two axes is not factored."""

    def init(params: optax.Params) -> optax.FactoredState:
        def empty(path: tuple, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            axes, none = factored_axes(path, x.shape), jnp.zeros(1, x.dtype)
            if axes is None:
                return none, none, jnp.zeros_like(x)
            return jnp.zeros_like(x.sum(axes[1])), jnp.zeros_like(x.sum(axes[0])), none

        moments = jax.tree.map_with_path(empty, params)
        return optax.FactoredState(jnp.zeros([], jnp.int32), *unzip(params, moments, 3))

    def update(
        updates: optax.Updates, old: optax.FactoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.FactoredState]:
        decay = jnp.minimum(1.0 - (old.count + 1.0) ** -0.8, b2)

        def new(path: tuple, g: jax.Array, row: jax.Array, column: jax.Array, whole: jax.Array) -> tuple:
            axes, squared = factored_axes(path, g.shape), jnp.square(g) + 1e-30
            if axes is None:
                whole = decay * whole + (1.0 - decay) * squared
                return g * whole**-0.5, row, column, whole
            low, high = axes
            row = decay * row + (1.0 - decay) * jnp.mean(squared, axis=high)
            column = decay * column + (1.0 - decay) * jnp.mean(squared, axis=low)
            mean = jnp.mean(row, axis=low - 1 if low > high else low, keepdims=True)
            scale = jnp.expand_dims((row / mean) ** -0.5, high), jnp.expand_dims(column**-0.5, low)
            return g * scale[0] * scale[1], row, column, whole

        both = jax.tree.map_with_path(new, updates, old.v_row, old.v_col, old.v)
        direction, *moments = unzip(updates, both, 4)
        return direction, optax.FactoredState(optax.safe_increment(old.count), *moments)

    return optax.GradientTransformation(init, update)


def unzip(like: optax.Params, tuples: optax.Params, n: int) -> list[optax.Params]:
    """n trees like the first, of a tree that has a tuple of n in place of each leaf."""
    return [jax.tree.map(lambda _, leaf, i=i: leaf[i], like, tuples) for i in range(n)]


def factored_axes(path: tuple, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two axes of an array that are factored, the longer one last, or None."""
    if len(shape) < 2:
        return None
    pair = [axis % len(shape) for axis in AXES.get(path[-1].key, LAST)]
    low, high = sorted(pair, key=lambda axis: (shape[axis], axis))
    return (low, high) if shape[low] > 1 else None
