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
    state = local.launch(real_sweep(corpus, folder), folder)
    assert state.finished == 4
    return table(folder)
