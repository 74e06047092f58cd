"""Settings for all tests: eight virtual CPU devices, and caches apart from the user's."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
_caches = tempfile.TemporaryDirectory(prefix="scaling-tests-")
os.environ["SCALING_CACHE"] = str(Path(_caches.name) / "cache")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import pytest  # noqa: E402


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
