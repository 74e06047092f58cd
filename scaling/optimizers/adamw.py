"""Adam with decoupled weight decay (1711.05101): b1, b2, eps."""

import optax

from scaling.config import OptimConfig

EPSILON = True


def direction(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
