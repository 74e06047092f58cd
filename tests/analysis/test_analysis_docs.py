"""Every Python block of docs/analysis.md runs, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs/analysis.md"


def test_every_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    """Failure would mean: what a newcomer copies from the docs does not work."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 9
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "docs/analysis.md", "exec"), scope)
    told = capsys.readouterr().out
    assert "Held-out runs" in told
    assert "compute-optimal" in told
    assert (tmp_path / "report.html").exists()
    # The planted truth comes back: E 1.7, alpha 0.34; accuracy from loss is the planted sigmoid.
    assert abs(scope["fitted"].params["alpha"] - 0.34) < 0.03
    assert abs(scope["fixed"].params["E"] - 1.7) < 1e-9
    assert scope["tied"].params["alpha"] == scope["tied"].params["beta"]
