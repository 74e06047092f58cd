"""Settings for all tests: eight virtual CPU devices, and caches apart from the user's.

Corpora and measured speeds are new to every session. Compiled programs are kept from session to session, in
$SCALING_TEST_CACHE, else in the user's cache. That hides no mistake: XLA finds a program by the digest of all of its
text, its options and the compiler's version, so code that has changed finds another program or the one it would make.
"""

import atexit
import contextlib
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

KEPT_DAYS = 14

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
_caches = tempfile.TemporaryDirectory(prefix="scaling-tests-")
atexit.register(_caches.cleanup)
os.environ["SCALING_CACHE"] = str(Path(_caches.name) / "cache")
_kept = Path(os.environ.get("SCALING_TEST_CACHE") or Path("~/.cache/scaling-laws-tests").expanduser())
_programs = _kept / f"compiled-{version('jax')}"
# The variables reach the processes that tests start: workers, hosts, nodes.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest  # noqa: E402


def pytest_sessionstart() -> None:
    """Drops programs that are old. They are made again; JAX does not touch an entry that it reads."""
    for entry in _programs.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another session does the same
            if entry.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                entry.unlink()


def pytest_collection_modifyitems(config, items) -> None:
    """Where processes share the tests, files with slow ones begin first: else one would wait for the last of them."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """A source of small text files with some structure to learn: `text:GLOB`, about 60,000 bytes."""
    import random

    folder = tmp_path_factory.mktemp("corpus")
    text = "the union of states shall pay its debts and keep the peace with all nations of the world"
    words = text.split()
    for i in range(12):
        rng = random.Random(i)
        story = ". ".join(" ".join(rng.choices(words, k=rng.randint(4, 9))) for _ in range(130))
        (folder / f"{i:02}.txt").write_text(story)
    return f"text:{folder}/*.txt"


@pytest.fixture(scope="session")
def trained_run(corpus, tmp_path_factory) -> Path:
    """The folder of a finished run on `corpus`, of a model that has learned some of its words. To be read only."""
    from models.config import ModelConfig
    from scaling.config import DataConfig, OptimConfig, RunConfig
    from scaling.engine.loop import train

    config = RunConfig(
        model=ModelConfig(d_model=32, n_layers=2, n_heads=2),
        data=DataConfig(source=corpus, valid_fraction=0.1, seq_len=64, repeat=True),
        optim=OptimConfig(lr=0.02),
        tokens=50_000,
        batch_size=8,
    )
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(config, folder)
    return folder
