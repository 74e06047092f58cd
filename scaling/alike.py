"""Which runs are alike, and in what: each function maps a configuration onto what it has in common with such runs.

Equal images mean alike. What a field is set to, where it may differ, is of no meaning. tests/scaling/test_alike.py says
for every field of a RunConfig in which of these it may differ. No JAX here.
"""

import dataclasses
import functools

from scaling.config import DataConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.fields import replaced


@functools.lru_cache(maxsize=65_536)
def same_program(config: RunConfig) -> RunConfig:
    """Runs that share their compiled programs, on the same devices and executed alike: equal in all but what only the
    host reads, which is rates, schedule, weight decay, D, seeds, parent, and the part of the corpus trained and
    validated on.
    """
    data = dataclasses.replace(config.data, seed=0, repeat=True, unique_tokens=0, valid_tokens=0)
    return dataclasses.replace(same_swarm(config), data=data, parent="")


def same_swarm(config: RunConfig) -> RunConfig:
    """Runs that one program can train side by side: they differ in rates, schedule, D, seeds, data order and parent.

    Adapters share the frozen model, and what is compared with its parent is validated with that one, so those of one.
    """
    data = dataclasses.replace(config.data, seed=0, repeat=True)
    optim, schedule = compiled_optim(config), ScheduleConfig()
    parent = config.parent if config.lora.rank or config.compared else ""
    return dataclasses.replace(config, tokens=1, seed=0, optim=optim, schedule=schedule, data=data, parent=parent)


def compiled_optim(config: RunConfig) -> OptimConfig:
    """The optimiser without what only the host's schedule reads, so that runs that differ in it share a program."""
    return dataclasses.replace(config.optim, lr=1.0, weight_decay=0.0, decay="coupled")


def same_trunk(config: RunConfig) -> RunConfig:
    """Runs that may begin alike: all but the horizon and what the schedule does at its end."""
    schedule = ScheduleConfig(warmup_tokens=config.schedule.warmup_tokens)
    data = dataclasses.replace(config.data, repeat=True)
    return dataclasses.replace(config, tokens=1, schedule=schedule, data=data)


def same_rates(config: RunConfig) -> tuple:
    """Runs whose learning rate and weight decay are equal at every step: of one schedule and as many steps."""
    optim = config.optim
    return config.schedule, config.steps, config.tokens_per_step, optim.lr, optim.weight_decay, optim.decay


def same_but_horizon_and_rate(config: RunConfig) -> RunConfig:
    """Runs that one learning rate is chosen for, whatever their horizon."""
    return replaced(config, {"tokens": 1, "optim.lr": 1.0})


@functools.lru_cache(maxsize=65_536)
def same_speed(config: RunConfig) -> RunConfig:
    """Runs whose steps take equally long: one model and batch, of one type, optimiser and objective."""
    return RunConfig(
        model=config.model,
        data=DataConfig(seq_len=config.data.seq_len),
        optim=OptimConfig(name=config.optim.name, options=config.optim.options),
        batch_size=config.batch_size,
        dtype=config.dtype,
        objective=config.objective,
        lora=config.lora,
    )


def same_regime(config: RunConfig) -> str:
    """Runs of which a speed measured at one size speaks for others near in size and batch."""
    objective = "" if config.objective.name == "next_token" else f", {config.objective.name}"
    adapters = ", lora" if config.lora.rank else ""
    return f"T {config.data.seq_len}, {config.dtype}, {config.optim.name}{objective}{adapters}"
