"""A disk that fills up, for real: one clear error, what was there is unharmed, and with room again it goes on."""

import dataclasses
import errno
import shutil
import subprocess
from contextlib import suppress

import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, RunConfig
from scaling.data.store import open_store
from scaling.engine import loop as train_module
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.loop import train
from scaling.execution import Execution


@pytest.fixture
def disk(tmp_path):
    """A function that makes, or resizes, a file system of so many KiB, and gives its folder."""
    folder = tmp_path / "disk"

    def of(size: int):
        mounted = folder.exists()
        folder.mkdir(exist_ok=True)
        options = f"{'remount,' if mounted else ''}size={size}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            folder.rmdir()
            pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount command here")
    yield of
    if folder.exists():
        subprocess.run(["umount", "--lazy", folder], check=True)  # a caught error's traceback keeps files open


@pytest.fixture
def config(corpus):
    """Eight steps."""
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    return RunConfig(model=ModelConfig(d_model=16, n_layers=2, n_heads=2), data=data, tokens=8 * 8 * 32)


@pytest.fixture
def undisturbed(config, tmp_path):
    return numbers(train(config, tmp_path / "undisturbed"))


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)


def numbers(result):
    return dataclasses.replace(result, timing={}, where={})


def fills_up(config, folder) -> OSError:
    with pytest.raises(OSError) as caught:
        train(config, folder, Execution(checkpoint_seconds=0.0))
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(folder)), "the line does not say what could not be written"
    assert not (folder / "result.json").exists()
    return caught.value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("looks_ahead", [True, False], ids=["room is asked for", "room is not known"])
def test_a_disk_that_fills_up_during_checkpoints(config, undisturbed, disk, monkeypatch, looks_ahead):
    """Sizes for none, some, and not quite all of a run. A quota is not told ahead: orbax is the one to find out."""
    if not looks_ahead:
        monkeypatch.setattr(Checkpointer, "_check_space", lambda self, state: None)
    begun = set()
    for size in (40, 200, 300, 400, 500):
        folder = disk(size) / "run"
        fills_up(config, folder)
        steps = Checkpointer(folder / "checkpoints").steps()
        begun |= set(steps)
        notes = []
        disk(10_000)
        assert numbers(train(config, folder, report=notes.append)) == undisturbed
        assert notes == ([f"continuing from step {steps[-1]} of 8"] if steps else []), "a checkpoint was harmed"
        shutil.rmtree(folder)
    assert begun, "no run came as far as a checkpoint: this tests nothing"


@pytest.mark.slow
def test_a_disk_that_fills_up_before_the_result(config, undisturbed, disk, monkeypatch):
    folder = disk(10_000) / "run"
    validate = train_module.validation

    def fill_then_validate(lanes, team, state):
        lanes[0].states.close()
        with suppress(OSError), open(folder.parent / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(512)):
                pass
        return validate(lanes, team, state)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "validation", fill_then_validate)
        fills_up(config, folder)
    (folder.parent / "filler").unlink()
    notes = []
    assert numbers(train(config, folder, report=notes.append)) == undisturbed
    assert notes == ["continuing from step 8 of 8"]


def test_a_disk_that_fills_up_during_the_token_store(corpus, disk):
    folder = disk(48)
    with pytest.raises(InputError, match=r"No space left on device.*free some space or set SCALING_CACHE"):
        open_store(corpus, "bytes", cache_dir=folder)
    assert not [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size], "half a store was left"
    store = open_store(corpus, "bytes", cache_dir=disk(10_000))
    assert len(store.train) > 50_000
