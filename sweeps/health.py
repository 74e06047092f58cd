"""The health of a sweep's folder: `analysis.tuning.health` with its loss curves, and the coordinate check.

The coordinate check trains ten steps of each size, so it needs the configurations and JAX.
"""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.tuning import health as checks
from analysis.tuning.table import tuning_table
from scaling.folder import read_config, read_json, write_atomically
from scaling.trust import check_hook
from sweeps.table import run_folders, table

COORDINATES = "coordinates.json"
FLAT = 0.05  # a slope below which an activation counts as free of size


def health(folder: Path | str) -> pd.DataFrame:
    """`analysis.tuning.health.health` of a folder of runs, with their loss curves."""
    folders = {path.name: path for path in run_folders(Path(folder))}
    return checks.health(tuning_table(table(folder)), lambda run: read_curve(folders[run]))


def read_curve(folder: Path) -> np.ndarray | None:
    """The training loss of every step, nats per token; None where the file is missing or damaged."""
    try:
        return pd.read_parquet(folder / "curve.parquet", columns=["loss"])["loss"].to_numpy(float)
    except (OSError, ValueError):
        return None


def coordinates(folder: Path | str, allowed: Collection[str] = ()) -> dict:
    """The coordinate check of a sweep's own models, one a size with its own settings: {"axis", "slopes"} of each
    parametrisation, kept in coordinates.json for the report. Trains ten steps of each.

    Raises InputError for fewer than three widths and fewer than three depths, and for a run whose optimiser is a hook
    module:function that is not `allowed`: a folder may be somebody else's.
    """
    from scaling.engine.coordinates import changes_over, slopes  # JAX, which the other checks do without

    folder = Path(folder)
    sizes: dict[str, dict] = {}
    for path in run_folders(folder):
        if (path / "config.json").exists():
            config = read_config(path)
            check_hook(config, allowed)
            sizes.setdefault(config.model.parametrization, {}).setdefault(config.model, config)
    kept = {}
    for parametrization, configs in sizes.items():
        axis = "d_model" if len({model.d_model for model in configs}) >= 3 else "n_layers"
        measured = slopes(changes_over(list(configs.values())), axis)
        rounded = {name: round(float(slope), 4) for name, slope in measured.items()}
        kept[parametrization] = {"axis": axis, "slopes": rounded}
    write_atomically(folder / COORDINATES, json.dumps(kept, indent=1) + "\n")
    return kept


def coordinates_text(folder: Path) -> str:
    """What `coordinates` found, a line a parametrisation; "" where it was not asked for."""
    lines = []
    for parametrization, kept in read_json(folder / COORDINATES).items() if (folder / COORDINATES).exists() else ():
        if not whole(kept):
            return (
                "coordinate check: coordinates.json is of another version; scaling health DIR --coordinates writes it"
            )
        worst = max(kept["slopes"], key=lambda name: abs(kept["slopes"][name]))
        slope = kept["slopes"][worst]
        carries = "learning rates carry over" if abs(slope) < FLAT else "no learning rate carries over between sizes"
        moves = f"{worst} moves most with {kept['axis']}, as its power {slope:+.3f}"
        lines.append(f"coordinate check, {parametrization}: {moves}: {carries}")
    return "\n".join(lines)


def whole(kept: object) -> bool:
    """Whether it is what `coordinates` writes for a parametrisation."""
    if not isinstance(kept, dict) or not isinstance(kept.get("axis"), str):
        return False
    slopes = kept.get("slopes")
    return (
        isinstance(slopes, dict)
        and bool(slopes)
        and all(type(s) in (int, float) and not abs(s) > 1e300 for s in slopes.values())
    )
