"""Sweep definitions: a plain set of RunConfigs, made by a pure function, printable as a table. No JAX here.

A definition file has a function `sweep()` that returns a `Sweep`:

    from scaling.run import RunConfig
    from sweeps.define import Sweep, grid

    def sweep():
        return Sweep(runs=grid({"n": [2e4, 4e4, 8e4], "tokens": [1e6, 2e6], "optim.lr": [0.01, 0.02]}))
"""

import dataclasses
import difflib
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.errors import InputError
from models.sizing import for_size
from scaling.run import RunConfig


@dataclass(frozen=True)
class Sweep:
    """Runs to train, and what is held out when a law is fitted to them. Raises InputError where there are none."""

    runs: tuple[RunConfig, ...]
    holdout: str | None = None  #: a pandas expression over the columns of the table of runs
    law: str = "auto"

    def __post_init__(self) -> None:
        runs = tuple(dict.fromkeys(self.runs))
        if not runs:
            raise InputError("sweep: defines no runs; give each axis at least one value")
        object.__setattr__(self, "runs", runs)


def grid(
    axes: Mapping[str, Sequence[Any]],
    base: RunConfig | None = None,
    rule: Callable[[RunConfig], RunConfig] | None = None,
    keep: Callable[[RunConfig], bool] | None = None,
) -> tuple[RunConfig, ...]:
    """Every combination of the axes' values, over `base`.

    axes: field path -> values, such as {"n": [2e4, 4e4], "tokens": [1e6, 2e6], "optim.lr": [0.01, 0.02]}.
    "n" is n_compute, turned into a model by models.sizing.for_size; "model" takes whole ModelConfigs.
    rule: sets what follows from N and D (learning rate, batch), applied where the axes leave it open.
    keep: which combinations stay. Raises InputError on an unknown field, naming the nearest, or an unusable value.
    """
    base = base or RunConfig()
    if "n" in axes and "model" in axes:
        raise InputError("axes: 'n' and 'model' both set the model; give one of them")
    names = sorted(axes, key=lambda name: name not in ("n", "model"))  # the model first, its fields on top of it
    for name in names:
        check_axis(name, axes[name])
    runs = []
    for values in itertools.product(*(axes[name] for name in names)):
        config = base
        for name, value in zip(names, values, strict=True):
            config = with_field(config, name, value)
        if rule is not None:
            config = rule(config)
            for name, value in zip(names, values, strict=True):
                if name not in ("n", "model"):
                    config = with_field(config, name, value)
        if keep is None or keep(config):
            runs.append(config)
    return tuple(runs)


def check_axis(name: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"axis {name!r} = {values!r}: expected a list of values")
    paths = field_paths()
    if name not in paths and name not in ("n", "model"):
        close = difflib.get_close_matches(name, [*paths, "n", "model"], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"axis {name!r}: no such field of a run{hint}")


def field_paths() -> dict[str, type]:
    """Every settable field of a RunConfig by its dotted path, with its plain type."""
    paths: dict[str, type] = {}
    for field in dataclasses.fields(RunConfig):
        default = getattr(RunConfig(), field.name)
        if dataclasses.is_dataclass(default):
            for inner in dataclasses.fields(default):
                paths[f"{field.name}.{inner.name}"] = type(getattr(default, inner.name))
        else:
            paths[field.name] = type(default)
    return paths


def with_field(config: RunConfig, path: str, value: Any) -> RunConfig:
    """A copy of `config` with one field set; whole floats are taken for whole-numbered fields."""
    if path == "n":
        pinned = {
            "vocab_size": config.model.vocab_size,
            "activation": config.model.activation,
            "tied": config.model.tied,
        }
        return dataclasses.replace(config, model=for_size(value, **pinned))
    if path == "model":
        if not isinstance(value, ModelConfig):
            raise InputError(f"axis 'model': expected ModelConfigs, got {value!r}")
        return dataclasses.replace(config, model=value)
    kind = field_paths()[path]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    head, _, tail = path.partition(".")
    if not tail:
        return dataclasses.replace(config, **{head: value})
    part = getattr(config, head)
    if head == "model":  # widths that follow from others follow anew
        derived = {k: None for k in ("d_ff", "n_kv_heads") if k != tail}
        return dataclasses.replace(config, model=dataclasses.replace(part, **derived, **{tail: value}))
    return dataclasses.replace(config, **{head: dataclasses.replace(part, **{tail: value})})


def load_sweep(name: str) -> tuple[str, Sweep]:
    """(short name, Sweep) of a named sweep in sweeps/library or of a definition file NAME.py.

    Raises InputError for an unknown name (with the nearest), a file without `sweep()`, or one that fails.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"sweep file {name!r}: not found")
        spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        short, execute = path.stem, lambda: spec.loader.exec_module(module)
    else:
        if name not in library():
            close = difflib.get_close_matches(name, library(), n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else "to run a file, give its name with .py;"
            raise InputError(f"sweep {name!r}: no such sweep; {hint} (there are: {', '.join(library())})")
        module, short, execute = importlib.import_module(f"sweeps.library.{name}"), name, lambda: None
    try:
        execute()
        if not callable(getattr(module, "sweep", None)):
            raise InputError(f"sweep file {name!r}: defines no function sweep() that returns a Sweep")
        sweep = module.sweep()
    except InputError as error:
        raise InputError(f"{name}: {error}" if name not in str(error) else str(error)) from None
    except Exception as error:
        raise InputError(f"sweep file {name!r}: failed with {type(error).__name__}: {error}") from None
    if not isinstance(sweep, Sweep):
        raise InputError(f"sweep file {name!r}: sweep() returned {type(sweep).__name__}, expected a Sweep")
    return short, sweep


def library() -> list[str]:
    """The names of the sweeps in sweeps/library."""
    return sorted(p.stem for p in (Path(__file__).parent / "library").glob("*.py") if p.stem != "__init__")
