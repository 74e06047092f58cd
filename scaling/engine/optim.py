"""What all optimisers share; the learning rate (scaling/engine/schedules.py) is an argument of the compiled step.

As the rate is not baked into the compiled step, runs that differ in learning rate, schedule or D share a program.
"""

import importlib
import json
import sys
from collections.abc import Callable

import jax
import optax

from models.config import ModelConfig
from models.errors import InputError
from models.parametrization import Rule, rule
from scaling.config import OPTIMIZERS, OptimConfig


def make_direction(config: OptimConfig, model: ModelConfig | None = None) -> optax.GradientTransformation:
    """Gradients -> direction before learning rate and weight decay: p <- p - lr_t * direction - decay_t * p.

    The global gradient norm is clipped first; then a file of scaling/optimizers/ says which settings it uses, and has
    the rest as in its paper. A hook gets its options only. Where gradients are steady, a direction has an RMS of about
    0.2 (muon), 0.2 to 0.4 (adamw) or 1 (lion, adafactor): a good learning rate for one is not one for the others.
    `model` adds what its parametrisation says of each array's learning rate and epsilon (models/parametrization.py).

    Raises InputError where it cannot be imported or gives no GradientTransformation.
    """
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    optimizer = importlib.import_module(f"scaling.optimizers.{config.name}") if config.name in OPTIMIZERS else None
    direction = optimizer.direction(config) if optimizer else load_hook(config.name, config.options)
    if model is None or model.parametrization == "standard":
        return optax.chain(clip, direction)
    spectral = getattr(optimizer, "SPECTRAL", False)
    # g / k into Adam with epsilon is g into Adam with k * epsilon: its direction has no other scale.
    eps = times(model, spectral, lambda r: 1 / r.eps) if getattr(optimizer, "EPSILON", False) else optax.identity()
    return optax.chain(clip, eps, direction, times(model, spectral, lambda r: r.lr))


def times(model: ModelConfig, spectral: bool, factor: Callable[[Rule], float]) -> optax.GradientTransformation:
    """Multiplies each array by what `factor` makes of its rule."""

    def scaled(path: tuple, x: jax.Array) -> jax.Array:
        name = "norm_out" if path[0].key == "norm_out" else path[-1].key
        return x * factor(rule(model, name, spectral))

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scaled, updates))


def decays(params: optax.Params) -> optax.Params:
    """True for the arrays that weight decay acts on: those of two or more axes (matrices, embeddings)."""
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def load_hook(name: str, options: str) -> optax.GradientTransformation:
    """What the function `name` (module:function) returns for the keyword arguments in `options`, a JSON object."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's: anything can come out of it
        raise InputError(
            f"optim.name = {name!r}: {one_line(error)}; expected module:function, importable from PYTHONPATH"
        ) from error
    try:
        made = make(**json.loads(options or "{}"))
    except Exception as error:
        raise InputError(f"optim.name = {name!r}: called with {options or 'no options'}: {one_line(error)}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(f"optim.name = {name!r}: returned {type(made).__name__}, not an optax.GradientTransformation")
    return made


def main() -> None:
    """Loads the hooks of standard input, a JSON list of (name, options); the error of the first that is wrong."""
    try:
        for name, options in json.load(sys.stdin):
            load_hook(name, options)
    except InputError as error:
        sys.exit(str(error))


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    main()
