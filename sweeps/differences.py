"""Two runs, or two sweeps, side by side: in which fields, results and versions they differ. No JAX here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.text import text_table
from models.errors import InputError
from scaling.config import RunConfig
from scaling.fields import leaves, value_at
from scaling.folder import read_config, read_json
from scaling.result import read_result
from sweeps.cost import table_of_ends
from sweeps.table import config_columns, result_columns, table

SHOWN = 6  # most values of a field, or runs, that are listed
HEADLINE = ("run", "status", "n_compute", "tokens", "flops", "loss")


def table_text(frame: pd.DataFrame) -> str:
    """The table as people read it: the columns of HEADLINE, and of the others those in which the runs differ; of very
    many runs the first and the last.
    """
    others = [c for c in frame.columns if c not in HEADLINE and len(set(map(shown, frame[c]))) > 1]
    columns = [*HEADLINE, *others]
    rows = list(frame[columns].itertuples(index=False))
    return table_of_ends(columns, rows, lambda values: list(map(shown, values)))


def difference(a: Path, b: Path) -> dict[str, Any]:
    """{"kind": "runs" or "sweeps", "rows": [{"field", "a", "b"}], ...}, of two run folders or two folders of runs.

    Of sweeps, a field's values are lists, `only_a` and `only_b` the ids of runs that the other has not begun, and
    `results` rows with `run` for what differs between results of the same run. Raises InputError for one of each.
    """
    kinds = [(folder / "config.json").exists() for folder in (a, b)]
    if kinds[0] != kinds[1]:
        run, sweep = (a, b) if kinds[0] else (b, a)
        raise InputError(f"{run} is a run and {sweep} is not; give two runs, or two sweeps")
    if kinds[0]:
        return {"kind": "runs", "rows": differing(facts_of(a), facts_of(b))}
    frames = [table(folder).set_index("run", drop=False) for folder in (a, b)]
    both = [run for run in frames[0].index if run in frames[1].index]
    columns = list(config_columns().values())
    sides = zip(frames, (a, b), strict=True)
    values = [{c: sorted(set(f[c].dropna()), key=str) for c in columns} | sweep_facts(folder) for f, folder in sides]
    results = []
    for run in both:
        other_columns = [{c: v for c, v in frame.loc[run].items() if c not in columns} for frame in frames]
        results += [{"run": run} | row for row in differing(*other_columns)]
    return {
        "kind": "sweeps",
        "rows": differing(*values),
        "only_a": [run for run in frames[0].index if run not in frames[1].index],
        "only_b": [run for run in frames[1].index if run not in frames[0].index],
        "both": both,
        "results": results,
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    def same(name: str) -> bool:
        return shown(a.get(name), exact=True) == shown(b.get(name), exact=True)

    names = dict.fromkeys([*a, *b])
    return [{"field": name, "a": a.get(name), "b": b.get(name)} for name in names if not same(name)]


def facts_of(folder: Path) -> dict[str, Any]:
    """A run's configuration by field path, its result by column, and with what it was made."""
    config, result = read_config(folder), read_result(folder)
    facts = {path: value_at(config, path) for path in leaves(RunConfig)}
    if result is None:
        return facts | {"status": "not finished"}
    return facts | {k: v for k, v in result_columns(result).items() if k not in facts} | result.where


def sweep_facts(folder: Path) -> dict[str, Any]:
    """What sweep.json says beside the runs: hold-out, law, and the definition's digest."""
    sweep = read_json(folder / "sweep.json") if (folder / "sweep.json").exists() else {}
    definition = sweep.get("definition")
    return {name: sweep.get(name) for name in ("holdout", "law")} | {
        "definition": definition.get("digest") if isinstance(definition, dict) else None
    }


def difference_text(result: Mapping[str, Any], a: str, b: str) -> str:
    lines = []
    if result["kind"] == "sweeps":
        both, only_a, only_b = (len(result[name]) for name in ("both", "only_a", "only_b"))
        lines.append(f"{both} runs in both, {only_a} only in A, {only_b} only in B")
        for name, side in (("only_a", "A"), ("only_b", "B")):
            if result[name]:
                lines.append(f"only in {side}: {listed(result[name])}")
    rows = [[row["field"], listed(row["a"]), listed(row["b"])] for row in result["rows"]]
    lines.append(text_table([["field", f"A: {a}", f"B: {b}"], *rows]) if rows else "no field differs")
    rows = [[row["run"], row["field"], shown(row["a"]), shown(row["b"])] for row in result.get("results", ())]
    if rows:
        lines += ["the same runs with other results:", text_table([["run", "column", "A", "B"], *rows])]
    elif result.get("both"):
        lines.append("the runs in both have the same results")
    return "\n".join(lines)


def listed(values: Any) -> str:
    if not isinstance(values, list):
        return shown(values)
    return ", ".join(map(shown, values[:SHOWN])) + (f", ... ({len(values)})" if len(values) > SHOWN else "")


def shown(value: Any, exact: bool = False) -> str:
    """A value as a cell: missing ones blank, numbers short unless `exact`."""
    if isinstance(value, list):
        return str([shown(v, exact) for v in value])
    if exact and isinstance(value, float) and value.is_integer():  # of a column in which another run has no value
        value = int(value)
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and not exact:
        return f"{value:.5g}"
    return str(value)
