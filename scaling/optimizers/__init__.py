"""One file an optimiser; its name is `optim.name`. A file defines

    direction(config: OptimConfig) -> optax.GradientTransformation

from gradients to the direction of descent before learning rate and weight decay, as optax's `scale_by_*` do, and may
set EPSILON = True where the gradient meets an epsilon of Adam's, and SPECTRAL = True where its steps have one spectral
norm and not entries of one size: a parametrisation then scales both (models/parametrization.py). Clipping, decay and
parametrisation are the same for all and stand in scaling/engine/optim.py.
"""
