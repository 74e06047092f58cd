"""The sign of an interpolated momentum (2302.06675): b1, b2."""

import optax

from scaling.config import OptimConfig


def direction(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)
