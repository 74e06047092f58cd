"""The README's sweep of one's own, made smaller: every command of it in turn, and that each says what the last one did.

The commands are read from the README, so that what a newcomer copies from there is what runs here.
"""

import json
import re
import shlex
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from sweeps.cli.main import main
from sweeps.define import load_sweep
from sweeps.table import table

README = Path(__file__).parents[1] / "README.md"
DEFINITION = """
from scaling.config import DataConfig, RunConfig
from sweeps.define import Sweep, grid

def sweep():
    data = DataConfig(source={source!r}, seq_len=32, valid_fraction=0.1, repeat=True)
    axes = {{"n": [1e4, 1.6e4, 2.5e4], "tokens": [1e4, 2e4, 4e4]}}
    return Sweep(grid(axes, base=RunConfig(data=data, batch_size=4)), holdout="flops > 6e9")
"""

pytestmark = pytest.mark.slow


def readme_commands() -> list[list[str]]:
    section = README.read_text().split("## A sweep of your own")[1].split("One run alone")[0]
    return [shlex.split(line, comments=True) for line in re.findall(r"^    \.venv/bin/scaling (.*)$", section, re.M)]


def scaling(folder: Path, *argv: str) -> str:
    """What a command prints, run in a folder."""
    with chdir(folder), redirect_stdout(StringIO()) as out:
        assert main(list(argv)) == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def house(corpus, tmp_path_factory):
    """(folder, what each command of the README printed)."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "mine.py").write_text(DEFINITION.format(source=corpus))
    printed = {}
    for argv in readme_commands():
        printed[" ".join(argv)] = scaling(folder, *argv)
        if "--dry-run" in argv:
            assert [p.name for p in folder.iterdir() if p.name != "__pycache__"] == ["mine.py"], "a dry run left files"
    return folder, printed


@pytest.fixture(scope="module")
def runs(house):
    return table(house[0] / "runs/mine")


@pytest.fixture(scope="module")
def definition(house):
    with chdir(house[0]):
        return load_sweep("mine.py")[1]


def ask(house, command: str, *options: str) -> dict:
    """The JSON of a command of the README."""
    return json.loads(scaling(house[0], *shlex.split(command), *options, "--json"))


def test_the_readme_shows_every_step(house):
    steps = ["sweep", "sweep", "status", "report", "fit", "predict", "allocate"]
    assert [argv[0] for argv in readme_commands()] == steps


def test_what_was_planned_is_what_was_trained(house, runs, definition):
    assert f"total: {len(definition.runs)} runs" in house[1]["sweep mine.py --dry-run"]
    assert set(runs["run"]) == {config.run_id for config in definition.runs}
    assert set(runs["status"]) == {"finished"}
    status = ask(house, "status runs/mine")
    assert status["done"] == len(runs)
    assert status["flops_wanted"] == pytest.approx(sum(config.flops for config in definition.runs))
    assert status["flops_spent"] == pytest.approx(runs["flops_spent"].sum())
    assert status["flops_spent"] < 0.95 * status["flops_wanted"], "no run shared its beginning with a longer one"


def test_the_table_holds_what_the_runs_recorded(house, runs, definition):
    configs = {config.run_id: config for config in definition.runs}
    for row in runs.itertuples():
        result = json.loads((house[0] / "runs/mine/runs" / row.run / "result.json").read_text())
        config = configs[row.run]
        assert row.loss == result["loss"]
        assert (row.tokens, row.flops) == (config.trained_tokens, config.flops)
        assert (row.n_compute, row.n_total) == (config.counts.n_compute, config.counts.n_total)


def test_the_fit_is_of_the_runs_of_the_table_that_are_not_held_out(house, runs):
    fitted = runs.query("not flops > 6e9")
    assert 0 < len(runs) - len(fitted) < 6, "the hold-out of the definition holds out nothing, or too much"
    fit = ask(house, "fit runs/mine")
    assert fit["n_runs"] == len(fitted)
    saved = json.loads((house[0] / "fit.json").read_text())
    assert saved["fitted_range"]["n"] == [fitted["n_compute"].min(), fitted["n_compute"].max()]
    assert saved["fitted_range"]["d"] == [fitted["tokens"].min(), fitted["tokens"].max()]
    middle = fitted.iloc[len(fitted) // 2]
    predicted = ask(house, f"predict fit.json --n {middle.n_compute} --d {middle.tokens}")["predicted"]
    assert predicted == pytest.approx(middle.loss, rel=0.1), "the law does not pass near its own runs"


def test_the_report_says_what_predict_says(house, runs):
    summary = json.loads((house[0] / "runs/mine/summary.json").read_text())
    assert (house[0] / "runs/mine/report.html").read_text().count("<html") == 1
    held = runs.query("flops > 6e9")
    assert sorted(run["flops"] for run in summary["holdout"]) == sorted(held["flops"])
    for run in summary["holdout"]:
        (measured,) = held.query("n_compute == @run['n'] and tokens == @run['d']")["loss"]
        assert run["measured"] == measured
        predicted = ask(house, f"predict fit.json --n {run['n']} --d {run['d']}")
        for key in ("predicted", "low", "high"):
            assert run[key] == pytest.approx(predicted[key], rel=1e-9), f"the report's {key} is not that of predict"
        assert run["error"] == pytest.approx(run["predicted"] / measured - 1)
    assert summary["mean_abs_error"] == pytest.approx(np.mean([abs(run["error"]) for run in summary["holdout"]]))
    fit = ask(house, "fit runs/mine")
    assert (summary["law"], summary["n_runs"]) == (fit["law"], fit["n_runs"])
    assert summary["params"] == pytest.approx(fit["params"])


def test_the_allocation_is_an_optimum_of_that_fit(house):
    best = ask(house, "allocate fit.json --flops 1e12")
    assert 6 * best["n"] * best["d"] == pytest.approx(1e12)
    at = {
        k: ask(house, f"predict fit.json --n {best['n'] * k} --d {best['d'] / k}")["predicted"] for k in (0.8, 1, 1.25)
    }
    assert at[1] == pytest.approx(best["loss"])
    assert min(at, key=at.get) == 1


def test_launched_again_nothing_is_trained_again(house):
    results = sorted((house[0] / "runs/mine/runs").glob("*/result.json"))
    before = [path.read_bytes() for path in results]
    scaling(house[0], "sweep", "mine.py")
    assert [path.read_bytes() for path in results] == before
