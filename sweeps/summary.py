"""From a sweep's folder and its fitted study to what a person reads: the tables, summary.json and report.html."""

import io
import json
import time
from pathlib import Path
from typing import Any

from analysis.report.findings import Study
from analysis.report.page import text_report, write_report
from analysis.report.plots import figure_compute, figure_predicted, figure_tokens
from scaling.folder import read_json, write_atomically
from scaling.result import read_result
from scaling.trust import check_links
from sweeps.cost import duration
from sweeps.health import coordinates_text, health, health_line, health_text
from sweeps.launch.local import seconds_of
from sweeps.table import run_folders


def describe(folder: Path) -> dict[str, Any]:
    """What is known of the sweep in `folder` beside its table: name, hold-out, law, seconds and FLOPs spent, set-up."""
    folders = run_folders(folder)
    sweep = read_json(folder / "sweep.json") if (folder / "sweep.json").exists() else {}
    launches = seconds_of(folder / "launches.json")  # those of other engines keep no time
    facts: dict[str, Any] = {
        "name": sweep.get("name", folder.name),
        "holdout": sweep.get("holdout"),
        "law": sweep.get("law"),
        "seconds": round(sum(launches), 1) if launches else None,
        "flops": 0.0,  # spent
        "flops_wanted": 0.0,  # had every run been trained from its beginning
        "runs": len(folders),
        "finished": 0,
    }
    for run in folders:
        if (result := read_result(run)) is not None:
            facts["flops_wanted"] += result.flops
            facts["flops"] += result.flops_spent
            facts["finished"] += result.finished
            facts["where"] = result.where
    return facts


def report(study: Study, folder: Path, facts: dict[str, Any], started: float) -> str:
    """Writes report.html, summary.json and figures/ into `folder`, and returns the text to print.

    `seconds` of the summary: all launches of the sweep, preparing the corpus included, and this analysis, which began
    at `started` (time.monotonic).
    """
    check_links(folder)
    name, tuning = facts["name"], health(folder)
    checks = [health_line(tuning), coordinates_text(folder)]
    facts = facts | {"tuning": "; ".join(filter(None, checks))}
    path = write_report(study, folder / "report.html", f"Scaling study: {name}", checklist(study, facts))
    seconds = None if facts["seconds"] is None else round(facts["seconds"] + time.monotonic() - started, 1)
    (folder / "figures").mkdir(exist_ok=True)
    for figure in (figure_compute, figure_tokens, figure_predicted):
        made = folder / "figures" / f"{figure.__name__.removeprefix('figure_')}.png"
        picture = io.BytesIO()
        figure(study).savefig(picture, dpi=150)
        write_atomically(made, picture.getvalue())
    flops = {"flops": facts["flops"], "flops_spent": facts["flops"], "flops_wanted": facts["flops_wanted"]}
    summary = {"name": name, "seconds": seconds, **flops, **study.to_json()}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    missing = facts["runs"] - facts["finished"]
    lines = [f"{missing} of {facts['runs']} runs are not finished and left out"] if missing else []
    lines += [text_report(study), health_text(tuning), *checks[1:]]
    of = f" of {facts['flops_wanted']:.4g}, the rest shared," if facts["flops_wanted"] > facts["flops"] else ""
    took = "" if seconds is None else f" and analysed in {seconds:.0f} s"
    lines.append(f"{facts['flops']:.4g} FLOPs{of} trained{took}")
    lines.append(f"report: {path}")
    return "\n\n".join(filter(None, lines))


def checklist(study: Study, facts: dict[str, Any]) -> dict[str, str]:
    """What the runs themselves say of their set-up, under the names of the report's checklist (2502.18969)."""
    frame = study.runs.frame

    def values(column: str) -> str:
        found = sorted(set(frame[column].dropna())) if column in frame else []
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in found[:8]) + (", ..." * (len(found) > 8))

    where = facts.get("where") or {}
    stated = {
        "models": f"width {values('d_model')}, depth {values('n_layers')}, heads {values('n_heads')}",
        "data": f"{values('source')}, {values('seq_len')} tokens a window; validation on documents never trained on",
        "tokenizer": f"{values('tokenizer')}, vocabulary {values('vocab_size')}",
        "hyperparameters": f"AdamW, learning rate {values('lr')}, batch {values('batch_size')} windows, "
        f"weight decay {values('weight_decay')}, seeds {values('seed')}",
        "schedule": values("schedule"),
        "code": f"scaling-laws, jax {where.get('jax')}, {where.get('device')}, {values('dtype')}",
        "flops": "matrix product by matrix product, causal attention, backward = 2x forward",
        "checkpoints": "the loss after the last step of each run",
    }
    if "tuning" in facts:
        stated["tuning"] = facts["tuning"]
    clock = "" if facts["seconds"] is None else f", {duration(facts['seconds'])} of wall clock"
    stated["cost"] = f"{facts['flops']:.4g} FLOPs{clock}"
    return stated
