"""Checkpoints: what is read is bit for bit what was saved, on any mesh, or it is noticed and the one before is used."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling.engine import digest as digest_module
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.digest import device_digests, digests, host_digest
from scaling.engine.sharding import make_mesh

# Where a file is damaged, orbax leaves the reads of the others unawaited.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def state_of(step: int) -> dict:
    """A tree like a run's: weights, one of them half-width, and a count; another at every step."""
    keys = jax.random.split(jax.random.key(step), 3)
    return {
        "params": {"w": jax.random.normal(keys[0], (16, 24)), "b": jax.random.normal(keys[1], (8,), jnp.bfloat16)},
        "moments": (jax.random.normal(keys[2], (3, 5, 7)),),
        "step": jnp.int32(step),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 3 and 7."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    for step in (3, 7):
        checkpointer.save(step, state_of(step))
    checkpointer.close()
    return tmp_path / "checkpoints"


def files(folder) -> list:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def read(folder) -> tuple[int, list[str]]:
    """The step restored, of which the state is checked, and what was reported."""
    notes = []
    step, state = Checkpointer(folder, keep=2).restore(abstract(state_of(0)), notes.append)
    assert same_bits(state, state_of(step)), f"a state of step {step} was taken that is not the one saved"
    return step, notes


def damaged_copy(folder, to, path, content: bytes):
    """The checkpoints once more, with one file of the newest changed."""
    shutil.copytree(folder, to / "checkpoints")
    (to / "checkpoints" / path.relative_to(folder)).write_bytes(content)
    return to / "checkpoints"


def test_every_flipped_bit_is_noticed_or_without_effect(saved, tmp_path):
    """A bit in each of 120 places, spread over all bytes of the newest checkpoint's files."""
    rng = np.random.default_rng(0)
    paths = files(saved / "7")
    sizes = np.array([path.stat().st_size for path in paths])
    places = np.linspace(0, sizes.sum() - 1, 120).astype(int)
    noticed = 0
    for i, place in enumerate(places):
        which = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        content = bytearray(paths[which].read_bytes())
        content[place - int(sizes[:which].sum())] ^= 1 << int(rng.integers(8))
        step, notes = read(damaged_copy(saved, tmp_path / str(i), paths[which], bytes(content)))
        assert (step == 3) == any("checkpoint of step 7 is damaged" in note for note in notes)
        noticed += step == 3
    assert noticed > 30, "hardly any of the flips had an effect: this tests nothing"


def test_a_change_that_decompresses_is_noticed(saved, tmp_path, monkeypatch):
    """Here orbax writes another array without an error anywhere; only the digest can tell."""
    changed = state_of(7)
    word = np.asarray(changed["params"]["w"]).copy()
    word.view(np.uint32)[5, 5] ^= 1
    changed["params"]["w"] = jnp.asarray(word)
    with monkeypatch.context() as patch:
        patch.setattr("scaling.engine.checkpoint.digests", lambda state: digests(state_of(7)))
        shutil.rmtree(saved / "7")
        checkpointer = Checkpointer(saved, keep=2)
        checkpointer.save(7, changed)
        checkpointer.close()
    step, notes = read(saved)
    assert step == 3
    said = "checkpoint of step 7 is damaged (content of ['params']['w'] is not what was saved); falling back"
    assert notes == [f"{said} to the one before"]
    assert (saved.parent / "damaged-7").is_dir()
    assert Checkpointer(saved).steps() == [3]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_noticed_or_without_effect(saved, tmp_path, share):
    steps = []
    for i, path in enumerate(files(saved / "7")):
        content = path.read_bytes()
        steps.append(read(damaged_copy(saved, tmp_path / str(i), path, content[: int(len(content) * share)]))[0])
    assert steps.count(3) >= 3, "hardly any file is needed: this tests nothing"


def test_a_missing_file_is_noticed_or_without_effect(saved, tmp_path):
    steps = []
    for i, path in enumerate(files(saved / "7")):
        copy = damaged_copy(saved, tmp_path / str(i), path, b"")
        (copy / path.relative_to(saved)).unlink()
        steps.append(read(copy)[0])
    assert steps.count(3) >= 3


def test_a_checkpoint_without_a_digest_is_still_read(tmp_path):
    """As they were written before there were digests."""
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(4, args=ocp.args.StandardSave(state_of(4)))
    assert read(tmp_path / "checkpoints") == (4, [])


def test_saved_on_eight_devices_read_on_one_and_back(tmp_path):
    """The digest does not know the mesh."""
    many = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    whole = state_of(5)
    spread = {**whole, "params": jax.device_put(whole["params"], many)}
    assert len(spread["params"]["w"].addressable_shards) == 8
    assert digests(spread) == digests(whole)
    assert [int(x) for x in jax.tree.leaves(device_digests(spread))] == list(digests(whole).values())
    for saved, wanted in ((spread, whole), (whole, spread)):
        folder = tmp_path / str(saved is spread)
        checkpointer = Checkpointer(folder, keep=1)
        checkpointer.save(5, saved)
        checkpointer.close()
        step, state = Checkpointer(folder).restore(abstract(wanted), pytest.fail)
        assert step == 5
        assert same_bits(state, whole)
        assert state["params"]["w"].sharding.is_equivalent_to(wanted["params"]["w"].sharding, 2)


def test_branches_keep_all_and_are_read_by_step(tmp_path):
    branches = Checkpointer(tmp_path / "branches")
    assert branches.steps() == []
    assert not branches.folder.exists(), "looking made the folder"
    for step in (2, 30, 40):
        branches.save(step, state_of(step))
    branches.close()
    reader = Checkpointer(tmp_path / "branches")
    assert reader.steps() == [2, 30, 40]
    for step in (30, 2, 40):
        assert same_bits(reader.restore_step(step, abstract(state_of(0)), pytest.fail), state_of(step))
    notes = []
    for path in files(tmp_path / "branches" / "30"):
        path.write_bytes(b"")
    assert reader.restore_step(30, abstract(state_of(0)), notes.append) is None
    assert len(notes) == 1
    assert reader.steps() == [2, 40]
    again = Checkpointer(tmp_path / "branches")  # a run that was resumed from before passes these steps once more
    for step in (2, 30, 40):
        again.save(step, state_of(step))
    again.close()
    assert reader.steps() == [2, 30, 40]
    assert same_bits(reader.restore_step(30, abstract(state_of(0)), pytest.fail), state_of(30))


@pytest.mark.parametrize("seen", [[], [3], [3, 7, 9]])
def test_hosts_follow_the_listing_of_the_first(saved, monkeypatch, seen):
    """A file server may show the second host other checkpoints: one that went its own way would wait for ever in work
    that all must do.
    """
    checkpointer = Checkpointer(saved, keep=2)
    asked = []

    def agree(*values):
        asked.append(values)
        first = [[2], [3, 7]][len(asked) - 1] if len(asked) < 3 else [0] * len(values)
        return np.array([first, values])

    monkeypatch.setattr("scaling.engine.checkpoint.agree", agree)
    monkeypatch.setattr("scaling.engine.checkpoint.jax.process_index", lambda: 1)
    monkeypatch.setattr(checkpointer, "steps", lambda: seen)
    step, state = checkpointer.restore(abstract(state_of(0)), pytest.fail)
    assert step == 7
    assert same_bits(state, state_of(7))
    assert [len(values) for values in asked[:2]] == [1, 2], "hosts must give as many values as the first"


def test_a_state_is_kept_where_the_first_host_does_not_see_it(saved, monkeypatch):
    """Were the second host to trust its own listing, it would leave the first alone in saving."""
    branches = Checkpointer(saved)
    monkeypatch.setattr(branches, "_open", lambda: (_ for _ in ()).throw(RuntimeError("saving")))
    monkeypatch.setattr("scaling.engine.checkpoint.agree", lambda *values: np.array([[0] * len(values), values]))
    with pytest.raises(RuntimeError, match="saving"):
        branches.save(7, state_of(7))


def test_a_save_under_way_is_no_step(saved):
    (saved / "9.orbax-checkpoint-tmp").mkdir()
    (saved / "notes.txt").write_text("")
    assert Checkpointer(saved).steps() == [3, 7]


@pytest.mark.parametrize(
    "dtype", ["float32", "int32", "uint32", "bfloat16", "float16", "int8", "uint8", "bool", "float64", "int64"]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 7), (0, 3), (300, 257)])
def test_host_and_device_digests_agree(dtype, shape):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(0, 50, shape)).astype(dtype)
        assert x.dtype == dtype
        assert host_digest(x) == int(device_digests(x))


def test_the_digest_is_the_stated_sum(monkeypatch):
    """In whole numbers of any size; and the same however the host cuts the array into parts."""
    x = np.random.default_rng(1).integers(0, 2**32, 1000, dtype=np.uint32)
    expected = sum(int(word) * (2 * i + 1) for i, word in enumerate(x)) % 2**32
    for part in (1, 7, 999, 1000, 2**16):
        monkeypatch.setattr(digest_module, "PART", part)
        assert host_digest(x) == expected


def test_every_single_bit_changes_the_digest():
    x = np.random.default_rng(2).normal(size=40).astype(np.float32)
    words = x.view(np.uint32)
    found = set()
    for i in range(40):
        for bit in range(32):
            words[i] ^= np.uint32(1 << bit)
            found.add(host_digest(x))
            words[i] ^= np.uint32(1 << bit)
    assert host_digest(x) not in found
