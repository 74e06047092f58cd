"""Sweep definitions: a plain set of RunConfigs, made by a pure function, printable as a table. No JAX here.

A definition file has a function `sweep()` that returns a `Sweep`:

    from scaling.run import RunConfig
    from sweeps.define import Sweep, grid

    def sweep():
        return Sweep(runs=grid({"n": [2e4, 4e4, 8e4], "tokens": [1e6, 2e6], "optim.lr": [0.01, 0.02]}))
"""

import dataclasses
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import ModelConfig, replace
from models.errors import InputError
from models.sizing import for_size
from scaling.data.hints import did_you_mean
from scaling.run import RunConfig


@dataclass(frozen=True)
class Sweep:
    """Runs to train, and what is held out when a law is fitted to them. Raises InputError where there are none."""

    runs: tuple[RunConfig, ...]
    holdout: str | None = None  #: a pandas expression over the columns of the table of runs
    law: str = "auto"

    def __post_init__(self) -> None:
        runs = tuple(self.runs)
        for run in runs:
            if not isinstance(run, RunConfig):
                raise InputError(f"sweep: runs holds {run!r}, expected RunConfigs, such as grid(...) gives")
        runs = tuple(dict.fromkeys(runs))
        if not runs:
            raise InputError("sweep: defines no runs; give each axis at least one value")
        for name, value in {"holdout": self.holdout or "", "law": self.law}.items():
            if not isinstance(value, str):
                raise InputError(f"sweep: {name} = {value!r}, expected a string")
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
    for name, values in axes.items():
        check_axis(name, values)
    runs = []
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        config = configure(base, given)
        if rule is not None:
            config = configure(rule(config), {k: v for k, v in given.items() if k not in ("n", "model")})
        if keep is None or keep(config):
            runs.append(config)
    return tuple(runs)


def check_axis(name: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"axis {name!r} = {values!r}: expected a list of values")
    paths = field_paths()
    if name not in paths and name not in ("n", "model"):
        raise InputError(f"axis {name!r}: no such field of a run{did_you_mean(name, [*paths, 'n', 'model'])}")


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


def configure(base: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """`base` with all of `given` (field path, "n" or "model" -> value) set at once, so only the whole has to fit.

    With "n" the shape follows from the size; model fields that `base` or `given` set beside it are kept.
    Raises InputError where a value is of the wrong kind or the whole cannot be trained.
    """
    given = {path: typed(path, value) for path, value in given.items()}
    model = given.get("model", base.model)
    fields = {path.removeprefix("model."): value for path, value in given.items() if path.startswith("model.")}
    if "n" in given:
        model = sized(base.model, given["n"], fields)
    elif fields:
        model = replace(model, **fields)
    parts: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        head, _, tail = path.partition(".")
        if head not in ("n", "model"):
            parts.setdefault(head, {})[tail] = value
    changes = {h: v[""] if "" in v else dataclasses.replace(getattr(base, h), **v) for h, v in parts.items()}
    return dataclasses.replace(base, model=model, **changes)


def sized(model: ModelConfig, n: float, fields: dict[str, Any]) -> ModelConfig:
    """The best-shaped model of n_compute = n with the given fields, and those of `model` that say nothing of size."""
    for name in ("d_model", "d_ff", "n_heads"):
        if name in fields:
            raise InputError(f"model.{name} = {fields[name]}: n sets the model's width; give n or model.{name}")
    kept = ("vocab_size", "activation", "qk_norm", "tied", "logit_softcap", "z_loss", "rope_theta")
    kept += ("parametrization", "base_width", "base_depth", "base_head_dim")
    pinned = {name: getattr(model, name) for name in kept}
    if model.n_kv_heads != model.n_heads:
        pinned["n_kv_heads"] = model.n_kv_heads
    return for_size(n, **(pinned | fields))


def typed(path: str, value: Any) -> Any:
    """`value` as the plain Python type of its field: NumPy scalars unwrapped, whole floats as ints where due."""
    value = value.item() if hasattr(value, "item") else value
    if path == "model":
        if not isinstance(value, ModelConfig):
            raise InputError(f"axis 'model': expected ModelConfigs, got {value!r}")
        return value
    kind = float if path == "n" else field_paths()[path]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{path} = {value!r}: expected a value of type {kind.__name__}")
    return value


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
            hint, names = did_you_mean(name, library()), ", ".join(library())
            raise InputError(f"sweep {name!r}: no such sweep{hint} (there are {names}, or give a FILE.py)")
        module, short, execute = importlib.import_module(f"sweeps.library.{name}"), name, lambda: None
    try:
        execute()
        if not callable(getattr(module, "sweep", None)):
            raise InputError(f"sweep file {name!r}: defines no function sweep() that returns a Sweep")
        sweep = module.sweep()
    except InputError as error:
        raise InputError(f"{name}: {error}" if name not in str(error) else str(error)) from None
    except (Exception, SystemExit) as error:
        raise InputError(f"sweep file {name!r}: failed with {type(error).__name__}: {error}") from None
    if not isinstance(sweep, Sweep):
        raise InputError(f"sweep file {name!r}: sweep() returned {type(sweep).__name__}, expected a Sweep")
    return short, sweep


def library() -> list[str]:
    """The names of the sweeps in sweeps/library."""
    return sorted(p.stem for p in (Path(__file__).parent / "library").glob("*.py") if p.stem != "__init__")
