"""From the findings of a sweep, or of any table of runs, to what a person reads: tables, summary.json, report.html."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.files import inside, write_bytes, write_text
from analysis.report.findings import Findings
from analysis.report.page import text_report, write_report
from analysis.report.plots import figures_of, to_png
from analysis.tuning.health import health_line, health_text
from scaling.result import read_result
from sweeps.cost import duration
from sweeps.folder import read_description, seconds_of_launches
from sweeps.health import coordinates_text, health
from sweeps.table import run_folders


def describe(folder: Path) -> dict[str, Any]:
    """What is known of the sweep in `folder` beside its table: name, hold-out, law, seconds and FLOPs spent, set-up."""
    folders = run_folders(folder)
    sweep = dataclasses.asdict(read_description(folder)) if (folder / "sweep.json").exists() else {}
    launches = seconds_of_launches(folder)  # those of other engines keep no time
    facts: dict[str, Any] = {
        "name": sweep.get("name") or folder.name,
        "holdout": sweep.get("holdout"),
        "law": sweep.get("law"),
        "seconds": round(sum(launches), 1) if launches else None,
        "flops": 0.0,  # spent
        "flops_wanted": 0.0,  # had every run been trained from its beginning
        "runs": len(folders),
        "finished": 0,
        "where": {},  # the distinct values of each, in the order of the runs
    }
    for run in folders:
        if (result := read_result(run)) is not None:
            facts["flops_wanted"] += result.flops
            facts["flops"] += result.flops_spent
            facts["finished"] += result.finished
            for name, value in result.where.items():
                facts["where"].setdefault(name, {})[value] = None
    return facts


def report(
    findings: Findings, sources: Sequence[Path], out: Path, sweeps: Sequence[dict[str, Any]], started: float
) -> str:
    """Writes report.html, summary.json and figures/ into `out`, and returns the text to print.

    sources: the folders and files that the runs came from; sweeps: what `describe` says of the folders. `seconds` of
    the summary: all launches of the sweeps, preparing the corpus included, and this analysis, which began at `started`
    (time.monotonic).
    """
    name = ", ".join(str(sweep["name"]) for sweep in sweeps) or ", ".join(source.name for source in sources)
    tuning = {source: health(source) for source in sources if source.is_dir()}
    checks = [check for source in tuning for check in (health_line(tuning[source]), coordinates_text(source)) if check]
    facts = {key: sum(sweep[key] for sweep in sweeps) for key in ("flops", "flops_wanted", "runs", "finished")}
    launches = [sweep["seconds"] for sweep in sweeps if sweep["seconds"] is not None]
    where: dict[str, dict] = {}
    for sweep in sweeps:
        for key, values in sweep["where"].items():
            where.setdefault(key, {}).update(values)
    facts |= {"seconds": sum(launches) if launches else None, "where": where}
    stated = checklist(findings, facts) | ({"tuning": "; ".join(checks)} if checks else {})
    figures = figures_of(findings.runs, findings.fit)
    path = write_report(findings, inside(out, "report.html"), f"Scaling study: {name}", stated, checks, figures)
    seconds = None if facts["seconds"] is None else round(facts["seconds"] + time.monotonic() - started, 1)
    for figure, drawn in figures.items():
        write_bytes(inside(out, "figures", f"{figure}.png"), to_png(drawn))
    flops = {"flops": facts["flops"], "flops_spent": facts["flops"], "flops_wanted": facts["flops_wanted"]}
    summary = {"name": name, "seconds": seconds, **(flops if sweeps else {}), **findings.to_json()}
    write_text(inside(out, "summary.json"), json.dumps(summary, indent=1, allow_nan=False) + "\n")
    missing = facts["runs"] - facts["finished"]
    lines = [f"{missing} of {facts['runs']} runs are not finished and left out"] if missing else []
    lines += [text_report(findings), *map(health_text, tuning.values()), *map(coordinates_text, tuning)]
    if sweeps:
        of = f" of {facts['flops_wanted']:.4g}, the rest shared," if facts["flops_wanted"] > facts["flops"] else ""
        took = "" if seconds is None else f" and analysed in {seconds:.0f} s"
        lines.append(f"{facts['flops']:.4g} FLOPs{of} trained{took}")
    lines.append(f"report: {path}")
    return "\n\n".join(filter(None, lines))


def checklist(findings: Findings, facts: dict[str, Any]) -> dict[str, str]:
    """What the runs themselves say of their set-up, under the names of the report's checklist (2502.18969)."""
    frame = findings.runs.frame

    def values(column: str) -> str:
        distinct = sorted(set(frame[column].dropna()), key=lambda v: (isinstance(v, str), v)) if column in frame else []
        shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in distinct[:8])
        return shown + ", ..." * (len(distinct) > 8)

    def stated(parts: dict[str, str]) -> str:
        """The parts that the table has a column for; {} stands for its values."""
        return ", ".join(text.format(values(column)) for column, text in parts.items() if values(column))

    commit, jax, device = (
        ", ".join(map(str, facts["where"].get(key, ["unknown"]))) for key in ("commit", "jax", "device")
    )
    answers = {
        "models": stated({"d_model": "width {}", "n_layers": "depth {}", "n_heads": "heads {}"}),
        "data": stated({"source": "{}; validation on documents never trained on", "seq_len": "{} tokens a window"}),
        "tokenizer": stated({"tokenizer": "{}", "vocab_size": "vocabulary {}"}),
        "hyperparameters": stated(
            {
                "optim": "{}",
                "optimizer": "{}",
                "lr": "learning rate {}",
                "batch_size": "batch {} windows",
                "weight_decay": "weight decay {}",
                "seed": "seeds {}",
            }
        ),
        "schedule": values("schedule"),
    }
    if facts["runs"]:
        clock = "" if facts["seconds"] is None else f", {duration(facts['seconds'])} of wall clock"
        answers |= {
            "code": f"scaling-laws at commit {commit}, jax {jax}, {device}, {values('dtype')}",
            "flops": "matrix product by matrix product, causal attention, backward = 2x forward",
            "checkpoints": "the loss after the last step of each run",
            "cost": f"{facts['flops']:.4g} FLOPs{clock}",
        }
    return {item: answer for item, answer in answers.items() if answer}
