"""Where the workers of a sweep run: a small TOML file, `scaling sweep NAME --on slurm --placement FILE.toml`.

    workers = 8              # at once
    gpus = 1                 # of each node
    cpus = 8
    minutes = 240            # then the worker saves and is queued again
    partition = "gpu"
    account = "laboratory"

None of it can change a result. One file may serve several engines: each takes the keys that it knows.
"""

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Placement:
    """What each worker gets, and where. Raises InputError for a value that cannot work."""

    workers: int | None = None  #: at once; None: local: one a core or accelerator, else one a run, at most 8
    nodes: int = 1  #: that one run spans, a process on each (slurm)
    gpus: int = 0  #: of each node
    cpus: int = 1  #: of each node
    memory_gib: float | None = None  #: of each node; None: the cluster's default
    mesh: str = ""  #: of a run, such as "fsdp=8" (scaling/engine/sharding.py)
    requeues: int = 10  #: times that a worker is started again after its time is up or its node is lost
    minutes: int = 60  #: time limit of a worker (slurm)
    notice: int = 90  #: seconds before the time limit at which the worker saves and leaves (slurm)
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    setup: tuple[str, ...] = ()  #: shell lines that run before a worker (slurm)
    sbatch: dict[str, Any] = field(default_factory=dict)  #: further options of sbatch, such as {"exclude": "n7"}
    ray_address: str = ""  #: of a running Ray cluster, or "auto"; "": Ray is started on this machine
    ray_resources: dict[str, float] = field(default_factory=dict)  #: custom resources of Ray, of each worker

    def __post_init__(self) -> None:
        least = {"workers": 1, "nodes": 1, "gpus": 0, "cpus": 1, "requeues": 0, "minutes": 1, "notice": 10}
        for name, smallest in least.items():
            value = getattr(self, name)
            if name == "workers" and value is None:
                continue
            if type(value) is not int or value < smallest:
                raise InputError(f"{name} = {value!r}: expected a whole number of at least {smallest}")
        memory = self.memory_gib
        if memory is not None and (not is_number(memory) or not 0 < memory < math.inf):
            raise InputError(f"memory_gib = {memory!r}: expected a number above 0")
        for name in ("mesh", "partition", "account", "qos", "constraint", "ray_address"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} = {getattr(self, name)!r}: expected text")
        if not isinstance(self.setup, tuple | list) or not all(isinstance(line, str) for line in self.setup):
            raise InputError(f"setup = {self.setup!r}: expected a list of shell lines")
        object.__setattr__(self, "setup", tuple(self.setup))
        if not isinstance(self.sbatch, dict) or not all(isinstance(v, str | int | float) for v in self.sbatch.values()):
            raise InputError(f"sbatch = {self.sbatch!r}: expected options of sbatch, such as {{ exclude = 'n7' }}")
        if not isinstance(self.ray_resources, dict) or not all(
            is_number(v) and v > 0 for v in self.ray_resources.values()
        ):
            raise InputError(f"ray_resources = {self.ray_resources!r}: expected amounts, such as {{ a100 = 1 }}")
        if self.notice > 30 * self.minutes:
            raise InputError(
                f"notice = {self.notice} seconds is more than half of minutes = {self.minutes}: "
                "workers would do little but save; give them more time"
            )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_placement(path: Path) -> Placement:
    """The placement in a TOML file. Raises InputError where it cannot be read or holds an unknown key."""
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--placement {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--placement {path}: not TOML ({error})") from None
    known = [f.name for f in dataclasses.fields(Placement)]
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
            raise InputError(f"--placement {path}: unknown key {key!r}{hint}")
    try:
        return Placement(**given)
    except InputError as error:
        raise InputError(f"--placement {path}: {error}") from None
