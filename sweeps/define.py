"""Sweep definitions: a plain set of RunConfigs, made by pure functions, printable as a table. No JAX here.

A definition file has a function `sweep()` that returns a `Sweep`:

    from sweeps.define import Sweep, grid

    def sweep():
        return Sweep(runs=grid({"n": [2e4, 4e4, 8e4], "tokens": [1e6, 2e6], "optim.lr": [0.01, 0.02]}))

`grid`, `isoflop`, `ladder`, `horizons` and `listed` make runs; `children`, `product`, `seeds`, `where` and `union` make
runs of runs. Each returns a tuple of RunConfigs without doubles. Which runs there are is all a definition says: what
they share is found when they are launched.
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from models.config import ModelConfig, replace
from models.errors import InputError, did_you_mean
from models.sizing import flops_per_token, for_size
from scaling.chain import check_model
from scaling.config import RunConfig
from scaling.fields import from_plain, leaves, parts, replaced, value_at
from scaling.folder import write_atomically
from scaling.provenance import digest
from sweeps.cost import table_of_ends
from sweeps.definition import defined

Runs = tuple[RunConfig, ...]
Rule = Callable[[RunConfig], RunConfig]
ROUNDING = 0.05  # of a D that follows from a budget or a ratio: more, and a step is too large for the run


@dataclass(frozen=True)
class Sweep:
    """Runs to train, and what is held out when a law is fitted to them. Raises InputError where there are none."""

    runs: Runs
    holdout: str | None = None  #: a pandas expression over the columns of the table of runs
    law: str = "auto"
    definition: Path | None = None  #: the file that it was loaded from, kept beside the runs
    parents: Runs = ()  #: of these, the runs that others start from are added

    def __post_init__(self) -> None:
        runs = with_parents(union(self.runs), union(self.parents))
        if not runs:
            raise InputError("sweep: defines no runs; give each axis at least one value")
        for name, value in {"holdout": self.holdout or "", "law": self.law}.items():
            if not isinstance(value, str):
                raise InputError(f"sweep: {name} = {value!r}, expected a string")
        object.__setattr__(self, "runs", runs)

    def __str__(self) -> str:
        held = f"; held out: {self.holdout}" if self.holdout else ""
        return f"{table_text(self.runs)}\n{len(self.runs)} runs, {sum(c.flops for c in self.runs):.4g} FLOPs{held}"


def grid(
    axes: Mapping[str, Sequence[Any]],
    base: RunConfig | None = None,
    rule: Rule | None = None,
    keep: Callable[[RunConfig], bool] | None = None,
) -> Runs:
    """Every combination of the axes' values, over `base`.

    axes: field path -> values, such as {"n": [2e4, 4e4], "tokens": [1e6, 2e6], "optim.lr": [0.01, 0.02]}.
    "n" is n_compute, turned into a model by models.sizing.for_size; "model" takes whole ModelConfigs.
    rule: sets what follows from N and D (learning rate, batch), applied where the axes leave it open.
    keep: which combinations stay. Raises InputError on an unknown field, naming the nearest, or an unusable value.
    """
    return cells(axes, None, base, rule, keep)


def isoflop(
    budgets: Sequence[float],
    axes: Mapping[str, Sequence[Any]],
    base: RunConfig | None = None,
    rule: Rule | None = None,
    keep: Callable[[RunConfig], bool] | None = None,
) -> Runs:
    """Slices of equal compute: every budget C with every combination of the axes (sizes above all); D = C over FLOPs
    per token.

    C is counted FLOPs, as `RunConfig.flops` (models.sizing.flops_per_token), not 6ND: at 1e4 parameters attention is a
    third of the work, and a slice of equal 6ND would not be one of equal cost. Approach 2 of Hoffmann et al.
    (2203.15556). Raises InputError where whole steps miss a budget by more than 5 %.
    """
    check_numbers("isoflop: budgets", budgets, "FLOPs")

    def tokens(config: RunConfig) -> list[int]:
        per_token = flops_per_token(config.model, config.data.seq_len)
        return [max(1, round(C / per_token)) for C in budgets]

    return cells(axes, tokens, base, rule, keep)


def ladder(
    ratios: float | Sequence[float],
    axes: Mapping[str, Sequence[Any]],
    base: RunConfig | None = None,
    rule: Rule | None = None,
    keep: Callable[[RunConfig], bool] | None = None,
) -> Runs:
    """Fixed tokens per parameter: D = ratio x n_compute for every ratio and every combination of the axes.

    Raises InputError where whole steps miss D by more than 5 %.
    """
    ratios = [ratios] if isinstance(ratios, (int, float)) else ratios
    check_numbers("ladder: ratios", ratios, "tokens per parameter")
    return cells(axes, lambda c: [max(1, round(r * c.counts.n_compute)) for r in ratios], base, rule, keep)


def horizons(
    sizes: Mapping[float | ModelConfig, Sequence[float]],
    axes: Mapping[str, Sequence[Any]] | None = None,
    base: RunConfig | None = None,
    rule: Rule | None = None,
    keep: Callable[[RunConfig], bool] | None = None,
) -> Runs:
    """Horizons of its own for each size: {n_compute or ModelConfig: [D, ...]}, with every combination of `axes`."""
    runs: Runs = ()
    for size, tokens in sizes.items():
        name = "model" if isinstance(size, ModelConfig) else "n"
        runs += grid({name: [size], "tokens": tokens, **(axes or {})}, base, rule, keep)
    return union(runs)


def listed(rows: Iterable[Mapping[str, Any]], base: RunConfig | None = None, rule: Rule | None = None) -> Runs:
    """Exactly these runs: each row is field path -> value over `base`, as in {"n": 1e5, "tokens": 2e6, "seed": 1}."""
    return union(*(grid({name: [value] for name, value in row.items()}, base, rule) for row in rows))


def children(
    parents: Iterable[RunConfig],
    axes: Mapping[str, Sequence[Any]],
    base: RunConfig | None = None,
    rule: Rule | None = None,
    keep: Callable[[RunConfig], bool] | None = None,
) -> Runs:
    """For every parent, every combination of the axes' values over `base`: runs that start from what the parent ends
    with, in its model and tokenizer, with data, objective and schedule of their own.

    The parents are not among them: a sweep takes both (`union(parents, children(parents, ...))`), is given the parents
    (`Sweep(runs, parents=parents)`), or finds them finished in its folder. Raises InputError where an axis changes what
    is the parent's.
    """
    runs: Runs = ()
    for parent in union(parents):
        given = {"model": parent.model, "data.tokenizer": parent.data.tokenizer, "parent": parent.run_id}
        made = grid(axes, replaced(base or RunConfig(), given), rule, keep)
        for config in made:
            if config.parent != parent.run_id:
                raise InputError(f"children: parent = {config.parent!r}: follows from the parents; leave it out")
            check_model(config, parent)
        alike = Counter(dataclasses.replace(config, seed=0) for config in made)
        check_seeds_differ("children", [c for c in made if alike[dataclasses.replace(c, seed=0)] > 1])
        runs += made
    return union(runs)


def with_parents(runs: Runs, parents: Runs) -> Runs:
    """The runs, behind those of `parents` that they start from and that are not among them, and so on upwards."""
    wanted = {config.parent for config in runs} - {""}
    if not wanted:
        return runs
    there, known = {config.run_id for config in runs}, {config.run_id: config for config in parents}
    missing = [known[run] for run in known if run in wanted - there]
    return with_parents((*missing, *runs), parents) if missing else runs


def product(runs: Iterable[RunConfig], axes: Mapping[str, Sequence[Any]], rule: Rule | None = None) -> Runs:
    """Every run with every combination of the axes' values put over it: {"data.source": [...], "dtype": [...]}."""
    return union(*(grid(axes, config, rule) for config in union(runs)))


def seeds(runs: Iterable[RunConfig], count: int) -> Runs:
    """Every run with the seeds 0 .. count - 1 of its initial parameters. The order of the data stays."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"seeds: count = {count!r}: expected a whole number of at least 1")
    check_seeds_differ("seeds", union(runs))
    return product(runs, {"seed": range(count)})


def check_seeds_differ(what: str, runs: Iterable[RunConfig]) -> None:
    """Raises InputError where a run would be the same by any seed: two ids of one training are no repeat."""
    for config in runs:
        if config.parent and not config.lora.rank and not config.objective_found.random:
            raise InputError(
                f"{what}: run {config.run_id} starts from its parent {config.parent}, so its own seed changes nothing "
                "in it; vary the parent's seed, or data.seed"
            )


def where(runs: Iterable[RunConfig], keep: Callable[[RunConfig], bool]) -> Runs:
    """The runs for which `keep(run)` holds. Raises InputError where there are none."""
    runs = union(runs)
    kept = tuple(config for config in runs if keep(config))
    if runs and not kept:
        raise InputError(f"where: none of the {len(runs)} runs is kept; loosen the filter")
    return kept


def union(*parts: Iterable[RunConfig]) -> Runs:
    """The runs of all parts in their order, each once. A Sweep is taken as its runs."""
    parts = tuple(part.runs if isinstance(part, Sweep) else tuple(part) for part in parts)
    for config in itertools.chain(*parts):
        if not isinstance(config, RunConfig):
            raise InputError(f"sweep: runs holds {config!r}, expected RunConfigs, such as grid(...) gives")
    return tuple(dict.fromkeys(itertools.chain(*parts)))


def table_text(runs: Iterable[RunConfig]) -> str:
    """The runs as aligned columns: id, N, D, D/N, FLOPs, and every other field in which they differ."""
    runs = union(runs)
    paths = [path for path in leaves(RunConfig) if path != "tokens"]
    differ = [path for path in paths if len({value_at(config, path) for config in runs}) > 1]

    def row_of(config: RunConfig) -> list[str]:
        n, d = config.counts.n_compute, config.trained_tokens
        shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (value_at(config, path) for path in differ)]
        return [config.run_id, f"{n:,}", f"{d:,}", f"{d / n:.3g}", f"{config.flops:.3g}", *shown]

    return table_of_ends(["run", "N (n_compute)", "D tokens", "D/N", "FLOPs", *differ], runs, row_of)


def cells(
    axes: Mapping[str, Sequence[Any]],
    tokens: Callable[[RunConfig], Sequence[int]] | None,
    base: RunConfig | None,
    rule: Rule | None,
    keep: Callable[[RunConfig], bool] | None,
) -> Runs:
    """Every combination of the axes, with every D that `tokens` gives for it; None: D is an axis, or the base's."""
    base = base or RunConfig()
    if "n" in axes and "model" in axes:
        raise InputError("axes: 'n' and 'model' both set the model; give one of them")
    if tokens is not None and "tokens" in axes:
        raise InputError("axes: 'tokens' follows from the budget or the ratio; leave the axis out, or use grid")
    for name, values in axes.items():
        check_axis(name, values)
    runs = []
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        plain = configure(base, given)
        for D in [None] if tokens is None else tokens(plain):
            config = plain if D is None else dataclasses.replace(plain, tokens=D)
            if rule is not None:
                config = configure(rule(config), {k: v for k, v in given.items() if k not in ("n", "model")})
            if keep is not None and not keep(config):
                continue
            if D is not None and abs(config.trained_tokens / D - 1) > ROUNDING:
                raise InputError(
                    f"tokens = {D:,} at N = {config.counts.n_compute:,} is {D / config.tokens_per_step:.2g} steps of "
                    f"{config.tokens_per_step:,} tokens; raise the budget or the ratio, or lower batch_size"
                )
            runs.append(config)
    return union(runs)


def check_numbers(what: str, values: Any, unit: str) -> None:
    if not is_list(values) or not all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values):
        raise InputError(f"{what} = {values!r}: expected a list of positive numbers of {unit}")


def is_list(values: Any) -> bool:
    """Whether values can be gone through again and again: no generator, which is used up at the first time."""
    return isinstance(values, Iterable) and not isinstance(values, (str, Iterator))


def check_axis(name: str, values: Any) -> None:
    if not is_list(values):
        raise InputError(f"axis {name!r} = {values!r}: expected a list of values")
    settable = [*leaves(RunConfig), *parts(RunConfig), "n"]
    if name not in settable:
        raise InputError(f"axis {name!r}: no such field of a run{did_you_mean(name, settable)}")


def configure(base: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """`base` with all of `given` (field path, a part such as "model", or "n" -> value) set at once, so only the whole
    has to fit.

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
    others = {path: value for path, value in given.items() if path.partition(".")[0] not in ("n", "model")}
    return replaced(base, others | {"model": model})


def sized(model: ModelConfig, n: float, fields: dict[str, Any]) -> ModelConfig:
    """The best-shaped model of n_compute = n with the given fields, and those of `model` that say nothing of size."""
    for name in ("d_model", "d_ff", "n_heads"):
        if name in fields:
            raise InputError(f"model.{name} = {fields[name]}: n sets the model's width; give n or model.{name}")
    kept = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if "size" not in f.metadata}
    if model.n_kv_heads != model.n_heads:
        kept["n_kv_heads"] = model.n_kv_heads
    return of_size(n, tuple((kept | fields).items()))


@functools.lru_cache(maxsize=4096)
def of_size(n: float, fields: tuple[tuple[str, Any], ...]) -> ModelConfig:
    """`for_size`, once for each size: it tries hundreds of shapes."""
    return for_size(n, **dict(fields))


def typed(path: str, value: Any) -> Any:
    """`value` as the plain Python type of its field: NumPy scalars unwrapped, whole floats as ints where due."""
    value = value.item() if hasattr(value, "item") else value
    return from_plain(float if path == "n" else (leaves(RunConfig) | parts(RunConfig))[path], value, path)


def load_sweep(name: str, dial: float | None = None) -> tuple[str, Sweep]:
    """(short name, Sweep) of a named sweep in sweeps/library or of a definition file NAME.py.

    dial: handed to `sweep(dial)`, which multiplies the compute by about that; None: the definition's own default.
    Raises InputError for an unknown name (with the nearest), a file without `sweep()`, one that fails, or a dial that
    the definition does not take.
    """
    if dial is not None and not (isinstance(dial, (int, float)) and 0 < dial < math.inf):
        raise InputError(f"dial = {dial!r}: expected a positive number, which multiplies the sweep's compute")

    def make(module: ModuleType) -> Sweep:
        if dial is not None and "dial" not in inspect.signature(module.sweep).parameters:
            raise InputError(f"sweep {name!r}: takes no dial; leave --dial out, or write it as `def sweep(dial=1)`")
        return module.sweep() if dial is None else module.sweep(dial=dial)

    short, path, sweep = defined("sweep", "sweeps.library", name, Sweep, make)
    return short, dataclasses.replace(sweep, definition=path)


def keep_definition(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Copies the definition's file to definition.py in a sweep's folder; its name and digest, for sweep.json."""
    if sweep.definition is None:
        return {}
    content = sweep.definition.read_bytes()
    write_atomically(folder / "definition.py", content.decode(errors="replace"))
    return {"definition": {"file": sweep.definition.name, "digest": digest(content)}}
