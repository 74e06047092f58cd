"""How a transformer is computed, as apart from what it computes: none of this changes a result beyond rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.errors import InputError

ATTENTION = ("plain", "blocked", "cudnn", "splash")
LAYERS = ("unrolled", "scanned")
REMAT = ("none", "dots", "full")


def anywhere(x: Any, *axes: str | None) -> Any:
    """The constraint of a model that lies whole on one device: none."""
    return x


def on_one_device(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """The mapping of a function that is to see its own device's part: all of it."""
    return function


@dataclass(frozen=True)
class Implementation:
    """Raises InputError for an unknown choice. `constrain` and `per_device` of a mesh: scaling/engine/sharding.py."""

    attention: str = "plain"  #: plain; blocked (skips what the causal mask hides); cudnn (GPU); splash (TPU)
    layers: str = "unrolled"  #: unrolled, or scanned: one compiled layer, over weights stacked within the step
    remat: str = "none"  #: kept for the backward pass: none recomputed; dots (only products kept); full (layer inputs)
    loss_chunks: int = 1  #: parts that the logits are made in; above 1 they never exist whole
    transpose_gradients: bool = False  #: weight gradients from transposed copies: XLA's CPU backend wants them
    constrain: Callable = anywhere  #: (x, logical axis or None per axis) -> x, placed
    per_device: Callable = on_one_device  #: (function, logical axes in, and out) -> the function on each device's part

    def __post_init__(self) -> None:
        for name, allowed in {"attention": ATTENTION, "layers": LAYERS, "remat": REMAT}.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if isinstance(self.loss_chunks, bool) or not isinstance(self.loss_chunks, int) or self.loss_chunks < 1:
            raise InputError(f"loss_chunks = {self.loss_chunks!r}: expected a whole number of at least 1")
