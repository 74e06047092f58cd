"""The long table of measurements: a row for each value that was measured on a finished run. No JAX here.

Columns: those of the run (sweeps/table.py), `evaluation` (the label of what was asked, "result" for the run's own
validation), `metric`, `value`, `stderr`, `n` (what the value is a mean over), and the axes of the evaluation, such as
k. An axis named like a column of the run stands under `asked_NAME`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scaling.config import RunConfig
from scaling.evaluate import path_of, read_evaluation
from scaling.failure import read_failure
from sweeps.launch.asking import Asking
from sweeps.studies._study import RESULT, EvaluationSpec
from sweeps.table import table

Asked = tuple[str, str]  # run id, label of the evaluation


@dataclass(frozen=True)
class Measured:
    """What a study has measured so far. lacking: (run id, label) -> why there is no value; label RESULT: no run."""

    table: pd.DataFrame
    lacking: Mapping[Asked, str]
    flops: float  #: spent on asking

    def why(self, run: str, labels: Collection[str] | None = None) -> str:
        """Why a run, or one of these evaluations of it (None: any), is lacking; "" where none is."""
        for (lacks, label), reason in self.lacking.items():
            if lacks == run and (label == RESULT or labels is None or label in labels):
                return reason if label == RESULT else f"evaluation {label}: {reason}"
        return ""


def measure(folder: Path, configs: Sequence[RunConfig], specs: Sequence[EvaluationSpec]) -> Measured:
    """Gathers all values of a study's folder."""
    runs = table(folder).set_index("run", drop=False)
    lacking = {}
    for config in configs:
        run = config.run_id
        status = runs.loc[run, "status"] if run in runs.index else "not begun"
        if status != "finished":
            failure = read_failure(folder / "runs" / run)
            lacking[run, RESULT] = failure.reason if failure else status
    finished = [config for config in configs if (config.run_id, RESULT) not in lacking]
    asked = [(config.run_id, spec) for config in finished for spec in specs if spec.asks(config)]
    values, failed, flops = evaluated(folder, asked)
    own = {(run, RESULT): [{"metric": "loss", "value": runs.loc[run, "loss"]}] for run in (c.run_id for c in finished)}
    return Measured(joined(runs, own | values), lacking | failed, flops)


def evaluated(
    folder: Path, asked: Sequence[tuple[str, EvaluationSpec]]
) -> tuple[dict[Asked, list[dict[str, Any]]], dict[Asked, str], float]:
    """(rows, why there are none, FLOPs of asking) of each (run id, evaluation)."""
    rows, failed, flops = {}, {}, 0.0
    asking = Asking(folder)
    reasons = asking.standing().failed
    for run, spec in asked:
        path = path_of(folder / "runs" / run, spec.config)
        if not path.exists():
            failed[run, spec.label] = reasons.get((run, spec.config.key), "not made yet")
            continue
        result = read_evaluation(path)
        rows[run, spec.label] = list(result.rows)
        flops += result.flops
    return rows, failed, flops


def joined(runs: pd.DataFrame, values: Mapping[Asked, Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
    """The long table, from the table of runs (indexed by run) and the rows of each evaluation."""
    rows = []
    for (run, label), measured in values.items():
        for row in measured:
            axes = {f"asked_{name}" if name in runs.columns else name: value for name, value in row.items()}
            rows.append({"run": run, "evaluation": label, "stderr": None, "n": None} | axes)
    columns = ["run", "evaluation", "metric", "value", "stderr", "n"]
    long = pd.DataFrame(rows, columns=[*columns, *sorted({name for row in rows for name in row}.difference(columns))])
    for name in ("value", "stderr", "n"):
        long[name] = pd.to_numeric(long[name])
    return runs.reset_index(drop=True).merge(long, on="run", validate="one_to_many")
