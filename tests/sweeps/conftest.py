"""What several tests of the engines compare with."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def local_table(corpus, tmp_path_factory) -> pd.DataFrame:
    """The table of `engine_sweeps.real_sweep`, trained by the local engine."""
    from engine_sweeps import real_sweep

    from sweeps.launch import local
    from sweeps.table import table

    folder = tmp_path_factory.mktemp("local") / "sweep"
    state = local.launch(real_sweep(corpus, folder, chained=True), folder)
    assert state.finished == 5
    return table(folder)


@pytest.fixture(scope="session")
def definition(corpus, tmp_path_factory) -> Path:
    """The file of a sweep of four short runs: two sizes, two horizons each."""
    from processes import DEFINITION

    path = tmp_path_factory.mktemp("definition") / "tiny.py"
    path.write_text(DEFINITION.format(source=corpus))
    return path


@pytest.fixture(scope="session")
def undisturbed(definition, tmp_path_factory) -> pd.DataFrame:
    """The table of that sweep, trained by a launcher that is left alone."""
    from processes import finish

    from sweeps.table import table

    out = tmp_path_factory.mktemp("sweep") / "undisturbed"
    assert "4 finished, 0 diverged, 0 failed" in finish(definition, out)
    return table(out)
