"""Every example of docs/extending.md is put where it says, in a copy of the code, and used there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs/extending.md"

TRAIN = """
from pathlib import Path

import pyarrow.parquet as pq

from models.config import ModelConfig
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.engine.loop import train

config = RunConfig(
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2),
    data=DataConfig(source="sums:40", seq_len=32),
    optim=OptimConfig(name="signum", lr=0.003),
    objective=ObjectiveConfig("smoothed", '{"share": 0.2}'),
    schedule=ScheduleConfig(warmup_tokens=2_560),
    tokens=30_000,
)
print(train(config, Path("run")).loss)
curve = pq.read_table("run/curve.parquet")
print(min(a.as_py() - b.as_py() for a, b in zip(curve["smoothed"][20:], curve["loss"][20:])))
"""


ASK = """
from pathlib import Path

import numpy as np

from models.config import ModelConfig
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.data.store import open_store
from scaling.engine.loop import train

config = RunConfig(
    model=ModelConfig(vocab_size=5, d_model=16, n_layers=1, n_heads=2),
    data=DataConfig(source="parity:n=3", tokenizer="symbols", seq_len=32),
    optim=OptimConfig(lr=0.01),
    objective=ObjectiveConfig("answers_only"),
    schedule=ScheduleConfig(warmup_tokens=2_560),
    tokens=100_000,
)
task = open_store("parity:n=3", "symbols").task
question = task.example("valid", 0)
print(sum(task.verify(question.prompt, np.array([answer])) for answer in range(5)))
print(train(config, Path("run")).loss)
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the code with what the page adds."""
    copy = tmp_path_factory.mktemp("extended")
    for room in ("models", "scaling", "analysis", "sweeps"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n# (\S+?\.py)(, at its end)?\n(.*?)```", DOCS.read_text(), flags=re.S)
    assert len(blocks) == DOCS.read_text().count("## Add "), "an example does not say where it goes"
    for name, at_end, code in blocks:
        path = copy / name
        assert path.exists() == bool(at_end), f"{name}: an added file is new, an entry is added to one that is there"
        with open(path, "a") as file:
            file.write("\n\n" + code if at_end else code)
    return copy


def python(extended: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(extended), "SCALING_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optimiser_source_and_objective_train(extended, tmp_path):
    """Failure would mean: a newcomer who adds a file as the page says gets no run. Guessing costs log 256 = 5.5 nats;
    the smoothed loss lies above the loss, as a model that has learnt anything finds most tokens unlikely.
    """
    loss, above = map(float, python(extended, tmp_path, "-c", TRAIN).split())
    assert loss < 4.0
    assert above > 0


def test_a_task_trains_and_is_verified(extended, tmp_path):
    """Parity of 3 bits is learned; guessing costs log 2 = 0.69 nats. One of the five symbols is right."""
    right, loss = map(float, python(extended, tmp_path, "-c", ASK).split())
    assert right == 1
    assert loss < 0.2
    shown = python(extended, tmp_path, "-m", "sweeps.cli", "sources", "parity:n=3")
    assert "guess_accuracy" in shown


def test_a_law_is_fitted(extended, tmp_path):
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    runs = pd.DataFrame({"n_compute": n, "tokens": d, "loss": 1.5 + 300 * n**-0.15 * d**-0.1})
    runs.to_csv(tmp_path / "runs.csv", index=False)
    fit = "from analysis.fitting.fit import fit; from analysis.runs import read_runs"
    use = f"{fit}; params = fit(read_runs('runs.csv'), 'multiplicative').params; print(params['alpha'], params['beta'])"
    np.testing.assert_allclose(
        [float(x) for x in python(extended, tmp_path, "-c", use).split()], [0.15, 0.1], rtol=0.02
    )


@pytest.mark.slow
def test_a_study_asks_by_an_evaluation_and_gives_its_verdict(extended, tmp_path):
    listed = python(extended, tmp_path, "-m", "sweeps.cli", "study")
    assert "half a minute" in listed
    assert "not conducted here" in next(line for line in listed.splitlines() if line.startswith("longer"))
    result = json.loads(python(extended, tmp_path, "-m", "sweeps.cli", "study", "longer", "--json"))
    (claim,) = result["claims"]
    assert (claim["verdict"], claim["low"] > 0) == ("upheld", True), claim
    assert "1 upheld" in python(extended, tmp_path, "-m", "sweeps.cli", "study")
