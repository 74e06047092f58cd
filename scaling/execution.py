"""Where and how a run executes: mesh, checkpoints, sinks. None of it is in a run's identity. No JAX here."""

import math
from dataclasses import dataclass

from models.errors import InputError

AXES = ("data", "fsdp", "tensor", "sequence")


@dataclass(frozen=True)
class Execution:
    """Where and how a run executes. None of it may change the result beyond 1e-5, so none of it is in the id."""

    #: sizes of data, fsdp, tensor and sequence, as "fsdp=4,tensor=2"; "": one device, or all hosts' data
    mesh: str = ""
    accumulate: int = 1  #: parts of a batch that are run one after another, their gradients summed
    attention: str = "auto"  #: plain, blocked, cudnn, splash (models/attention.py); auto: by device
    layers: str = "auto"  #: unrolled or scanned; auto: unrolled on CPU, else scanned
    remat: str = "none"  #: recomputed in the backward pass: none, dots (all but products), full (all but layer inputs)
    loss_chunks: int = 0  #: parts that the logits are made in; 0: as many as keep a part below 256 MiB a device
    checkpoint_seconds: float = 120.0  #: least time between two checkpoints
    keep_checkpoints: int = 2
    eval_every: int = 0  #: tokens between validations during the run; 0: only at the end
    swarm: str = "auto"  #: in a sweep, runs of one shape as one program: on, off, or auto (on an accelerator)
    track: str = ""  #: sinks besides the run's folder: tensorboard, wandb, or both with a comma

    def __post_init__(self) -> None:
        if not 0 <= self.checkpoint_seconds < math.inf:
            raise InputError(f"checkpoint_seconds = {self.checkpoint_seconds!r}: expected a number of at least 0")
        for name, least in {"accumulate": 1, "loss_chunks": 0, "keep_checkpoints": 1, "eval_every": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected a whole number of at least {least}")
        choices = {
            "attention": ("auto", "plain", "blocked", "cudnn", "splash"),
            "layers": ("auto", "unrolled", "scanned"),
            "remat": ("none", "dots", "full"),
            "swarm": ("auto", "on", "off"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        mesh_sizes(self.mesh)


def mesh_sizes(line: str) -> dict[str, int]:
    """{"data": 1, "fsdp": 4, ...} of a line such as "fsdp=4,tensor=2". Raises InputError for anything else."""
    sizes = dict.fromkeys(AXES, 1)
    for part in line.split(",") if line else ():
        name, _, value = part.strip().partition("=")
        if name not in AXES or not value.isascii() or not value.isdigit() or int(value) < 1:
            raise InputError(f"mesh = {line!r}: expected sizes of {', '.join(AXES)}, such as fsdp=4,tensor=2")
        if f"{name}=" in line.partition(part)[0]:
            raise InputError(f"mesh = {line!r}: {name} stands twice")
        sizes[name] = int(value)
    return sizes
