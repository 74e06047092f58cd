"""Places besides the run's folder that a run's metrics go to: TensorBoard files, Weights & Biases.

The folder stays the truth. A sink is off unless asked for, and one that fails is named once and dropped: no run ends
because a dashboard did.
"""

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.errors import InputError
from scaling.config import RunConfig


class Sink(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, status: str, metrics: dict[str, float]) -> None: ...


class TensorBoard:
    """Event files in `folder`/tensorboard; what a stopped run had written past its checkpoint is hidden."""

    def __init__(self, config: RunConfig, folder: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        # The library names a file by the second and the host: two starts within one second would share a file, and the
        # second would empty it.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        purge = start_step + 1 if start_step else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, filename_suffix=suffix)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, status: str, metrics: dict[str, float]) -> None:
        self.writer.add_text("status", status)
        self.writer.close()


class WandB:
    """A run named by the run's id, in `folder`/wandb; offline without a key (`wandb sync` sends it later)."""

    def __init__(self, config: RunConfig, folder: Path, start_step: int) -> None:
        import wandb

        online = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "scaling"),
            name=config.run_id,
            id=config.run_id,
            resume="allow",
            config=config.to_dict(),
            dir=str(folder),
            mode=None if online else "offline",
            reinit="create_new",  # a swarm's members are tracked side by side
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def finish(self, status: str, metrics: dict[str, float]) -> None:
        self.run.summary.update({"status": status, **metrics})
        self.run.finish(exit_code=0 if status == "finished" else 1)


#: name: (the package it needs, the sink)
SINKS: dict[str, tuple[str, Callable[[RunConfig, Path, int], Sink]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
}


class Sinks:
    """The sinks of one run, by `names` with commas between; each method reaches all that are open and still work."""

    def __init__(self, names: str, config: RunConfig, folder: Path, report: Callable[[str], None]) -> None:
        self.names, self.config, self.folder, self.report = split(names), config, folder, report
        self.sinks: dict[str, Sink] = {}

    def open(self, start_step: int) -> None:
        """For a run that goes on after `start_step`."""
        for name in self.names:
            try:
                self.sinks[name] = SINKS[name][1](self.config, self.folder, start_step)
            except Exception as error:
                self.report(f"{name}: {first_line(error)}; the run goes on without it")

    def log_steps(self, first_step: int, arrays: dict[str, np.ndarray]) -> None:
        """Metrics of consecutive steps from `first_step` on; arrays of one length."""
        if self.sinks:
            for i, values in enumerate(zip(*(a.tolist() for a in arrays.values()), strict=True)):
                self.log(first_step + i, dict(zip(arrays, values, strict=True)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.each(lambda sink: sink.log(step, metrics))

    def finish(self, status: str, metrics: dict[str, float]) -> None:
        """The end of this process's part in the run: finished, diverged, preempted, lost (to another process), failed.

        All are closed with it; a second end is none.
        """
        self.each(lambda sink: sink.finish(status, metrics))
        self.sinks = {}

    def each(self, act: Callable[[Sink], Any]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                act(sink)
            except Exception as error:  # a sink is somebody else's code and somebody else's server
                del self.sinks[name]
                self.report(f"{name}: {first_line(error)}; the run goes on without it")


def check_sinks(names: str) -> None:
    """Raises InputError for a name that is no sink, or whose package is not installed."""
    for name in split(names):
        if name not in SINKS:
            raise InputError(f"track: {name!r} is not one of {', '.join(SINKS)}")
        try:
            importlib.import_module(SINKS[name][0])
        except ImportError:
            package = SINKS[name][0]
            raise InputError(f"track: {name} needs {package}; pip install 'scaling-laws[tracking]'") from None


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
