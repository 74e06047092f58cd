"""One run: exact, resumable, the same on any mesh, and honest about its failures."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.config import ModelConfig
from models.errors import InputError
from models.transformer import next_token_loss
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.data.batches import valid_starts
from scaling.data.store import open_store
from scaling.engine import loop as train_module
from scaling.engine import program as program_module
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.feed import feed, validation_batches
from scaling.engine.loop import Busy, Preempted, train
from scaling.engine.program import VALIDATION_TOKENS, program_for
from scaling.engine.sharding import make_mesh
from scaling.execution import Execution
from scaling.folder import read_json

MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2)


@pytest.fixture(scope="module")
def config(corpus):
    """40 steps of 8 x 32 tokens."""
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1)
    return RunConfig(model=MODEL, data=data, tokens=40 * 8 * 32, optim=OptimConfig(lr=0.02))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(config, folder), folder


@pytest.fixture
def short_calls(monkeypatch):
    """Calls of a single step, so that a run of 40 steps can be stopped anywhere."""
    monkeypatch.setattr(train_module, "CHUNK_SECONDS", 0.0)


def numbers(result):
    return dataclasses.replace(result, timing={}, where={})


def curve(folder):
    return pq.read_table(folder / "curve.parquet").to_pandas()


def stop_after(calls):
    """should_stop that says yes at the given number of calls."""
    left = iter(range(calls - 1, -1, -1))
    return lambda: next(left, 0) == 0


def test_a_run_leaves_its_record(config, undisturbed):
    result, folder = undisturbed
    assert result.to_dict() == read_json(folder / "result.json")
    assert result.status == "finished"
    assert {"commit", "python", "jax", "optax", "device"} <= set(result.where), "with what it was made"
    assert result.tokens == config.trained_tokens == 40 * 8 * 32
    assert result.n_compute == config.counts.n_compute
    frame = curve(folder)
    assert list(frame["step"]) == list(range(1, 41))
    assert frame["tokens"].iloc[-1] == result.tokens
    assert frame["loss"].iloc[0] == pytest.approx(np.log(256), rel=1e-4)
    assert result.loss < 4.0, "the model has learnt nothing"
    assert result.bits_per_byte == pytest.approx(result.loss / np.log(2), rel=0.01)
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob(".*.tmp"))


def test_the_result_is_the_mean_over_the_whole_validation_split(config, undisturbed):
    """Computed here in one piece, without batches and padding, from the checkpoint that the run left."""
    result, folder = undisturbed
    store = open_store(config.data.source, "bytes", valid_fraction=0.1)
    windows = store.valid_windows(32)
    assert result.valid_tokens == len(windows) * 32
    assert len(windows) % (VALIDATION_TOKENS // 32), "the last batch is padded, or this tests nothing"
    program = program_for(config, Execution(), make_mesh())
    step, state = Checkpointer(folder / "checkpoints", keep=2).restore(program.abstract_state, pytest.fail)
    assert step == 40
    loss_BT, _ = jax.jit(next_token_loss, static_argnums=0)(MODEL, state["params"], windows)
    assert result.loss == pytest.approx(np.asarray(loss_BT, np.float64).mean(), rel=1e-6)


def test_again_is_the_same_bits(config, undisturbed, tmp_path):
    again = train(config, tmp_path / "run")
    assert numbers(again) == numbers(undisturbed[0])
    assert curve(tmp_path / "run").equals(curve(undisturbed[1]))


def test_a_finished_run_is_not_trained_again(config, undisturbed, monkeypatch):
    monkeypatch.setattr(train_module, "advance", lambda *_: pytest.fail("trained again"))
    assert train(config, undisturbed[1]) == undisturbed[0]


@pytest.mark.parametrize("calls", [1, 7, 39])
def test_resumed_is_the_same_bits(config, undisturbed, tmp_path, short_calls, calls):
    with pytest.raises(Preempted):
        train(config, tmp_path / "run", should_stop=stop_after(calls))
    assert not (tmp_path / "run" / "result.json").exists()
    notes = []
    resumed = train(config, tmp_path / "run", report=notes.append)
    assert notes == [f"continuing from step {resumed.timing['resumed_at_step']} of 40"]
    assert resumed.timing["resumed_at_step"] > 0
    assert numbers(resumed) == numbers(undisturbed[0])
    assert curve(tmp_path / "run").equals(curve(undisturbed[1]))


def test_validating_on_a_schedule_changes_nothing(config, undisturbed, tmp_path):
    execution = Execution(eval_every=10 * 8 * 32)
    result = train(config, tmp_path / "run", execution)
    once = undisturbed[0].flops_validation
    assert result.flops_validation == 4 * once
    assert numbers(result) == dataclasses.replace(numbers(undisturbed[0]), flops_validation=4 * once)
    validated = curve(tmp_path / "run")["valid_loss"].dropna()
    assert list(validated.index + 1) == [10, 20, 30, 40]
    assert validated.iloc[-1] == result.loss


def test_a_damaged_checkpoint_is_stepped_over(config, undisturbed, tmp_path, short_calls):
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        train(config, folder, Execution(checkpoint_seconds=0.0), should_stop=stop_after(9))
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert len(steps) == 2, "two checkpoints are kept"
    for path in (folder / "checkpoints" / str(steps[-1])).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    notes = []
    result = train(config, folder, report=notes.append)
    assert f"checkpoint of step {steps[-1]} is damaged" in notes[0]
    assert (folder / f"damaged-{steps[-1]}").is_dir(), "it is set aside, not deleted"
    assert notes[1] == f"continuing from step {steps[0]} of 40"
    assert numbers(result) == numbers(undisturbed[0])


def test_without_a_whole_checkpoint_it_begins_anew(config, undisturbed, tmp_path, short_calls):
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        train(config, folder, should_stop=stop_after(5))
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    notes = []
    result = train(config, folder, report=notes.append)
    assert any("starting from the beginning" in note for note in notes)
    assert numbers(result) == numbers(undisturbed[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"PAR1"),
        lambda path: pq.write_table(pq.read_table(path).drop(["loss"]), path),
    ],
    ids=["missing", "cut short", "without a column"],
)
def test_a_damaged_curve_is_noticed(config, undisturbed, tmp_path, short_calls, damage):
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        train(config, folder, should_stop=stop_after(5))
    damage(folder / "curve.parquet")
    with pytest.raises(Preempted):  # it begins anew, and what it then saves is what counts
        train(config, folder, should_stop=stop_after(3))
    result = train(config, folder)
    assert result.timing["resumed_at_step"] == 3
    assert numbers(result) == numbers(undisturbed[0])
    assert curve(folder).equals(curve(undisturbed[1]))


@pytest.mark.parametrize("first_sees", [True, False])
def test_the_first_host_decides_whether_the_curve_is_there(
    config, undisturbed, tmp_path, short_calls, monkeypatch, first_sees
):
    """A file server may show it to another host a little later, or sooner: all then begin where the first one does,
    with as many rows.
    """
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        train(config, folder, should_stop=stop_after(5))
    answers = iter([[[first_sees], [not first_sees]]])
    monkeypatch.setattr("scaling.engine.states.agree", lambda *values: np.array(next(answers, [values])))
    result = train(config, folder)
    assert result.timing["resumed_at_step"] == (5 if first_sees else 0)
    assert numbers(result) == numbers(undisturbed[0])
    assert curve(folder).equals(curve(undisturbed[1]))


def loop_of_links(path):
    if path.is_dir():
        shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("name", "damage", "kept"),
    [
        ("corpus.json", lambda path: path.write_text("{"), False),
        ("corpus.json", lambda path: path.write_text("[1]"), False),
        ("branch.json", lambda path: path.write_bytes(b"\xff"), True),
        ("branch.json", lambda path: path.write_text('{"from": 3}'), True),
        ("checkpoints", loop_of_links, False),
    ],
)
def test_what_can_be_made_again_stops_no_run(config, undisturbed, tmp_path, short_calls, name, damage, kept):
    """One damaged file of an unfinished run: it is set aside, said, and the run ends as it would have. States of an
    unknown corpus are not continued: the run's loss could be of two.
    """
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        train(config, folder, should_stop=stop_after(5))
    damage(folder / name)
    notes = []
    result = train(config, folder, report=notes.append)
    assert any(name in note and "set aside" in note for note in notes)
    assert len(list(folder.glob(f"damaged-{name}-*"))) == 1
    assert result.timing["resumed_at_step"] == (5 if kept else 0)
    assert numbers(result) == numbers(undisturbed[0])


def test_validation_on_a_part_is_the_same_part_for_every_run(config, tmp_path):
    """Chosen by the corpus and its size alone: runs of a sweep are compared on the same tokens."""
    part = dataclasses.replace(config, data=dataclasses.replace(config.data, valid_tokens=20 * 32 + 5))
    store = open_store(config.data.source, "bytes", valid_fraction=0.1)
    starts = valid_starts(part, store)
    assert len(set(starts.tolist())) == 20
    assert set(starts) < set(valid_starts(config, store))
    others = {
        "seed": {"seed": 1},
        "rate": {"optim": OptimConfig(lr=0.1)},
        "order": {"data": dataclasses.replace(part.data, seed=2)},
    }
    for changes in others.values():
        assert (valid_starts(dataclasses.replace(part, **changes), store) == starts).all()
    more = dataclasses.replace(part, data=dataclasses.replace(part.data, valid_tokens=40 * 32))
    assert set(valid_starts(more, store)) != set(starts)
    result = train(part, tmp_path / "run", Execution(eval_every=20 * 8 * 32))
    assert result.valid_tokens == 20 * 32
    program = program_for(part, Execution(), make_mesh())
    _, state = Checkpointer(tmp_path / "run" / "checkpoints", keep=2).restore(program.abstract_state, pytest.fail)
    windows = store.valid[starts[:, None] + np.arange(33)].astype(np.int32)
    loss_BT, _ = jax.jit(next_token_loss, static_argnums=0)(MODEL, state["params"], windows)
    assert result.loss == pytest.approx(np.asarray(loss_BT, np.float64).mean(), rel=1e-6)
    forward = config.flops / config.trained_tokens / 3
    assert result.flops_validation == pytest.approx(2 * 20 * 32 * forward)
    assert result.flops == config.flops


def test_validation_makes_its_logits_in_parts(config, monkeypatch):
    """Where they would be large; the same losses, and no array of all logits in the program."""
    mesh, whole = make_mesh(), f"tensor<{VALIDATION_TOKENS // 32}x32x256xf32>"
    params = program_for(config, Execution(), mesh).init(jax.random.key(0))["params"]
    store = open_store(config.data.source, "bytes", valid_fraction=0.1)
    batch, weight_B = next(validation_batches(feed(config, store), mesh))
    texts, sums = [], []
    for budget in (program_module.LOGIT_BYTES, 2**21):
        monkeypatch.setattr(program_module, "LOGIT_BYTES", budget)
        program = program_for(config, Execution(), mesh)
        texts.append(program.validate.lower(params, {}, batch, weight_B).as_text())
        sums.append(float(program.validate(params, {}, batch, weight_B)))
    assert whole in texts[0]
    assert whole not in texts[1]
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)


def test_nan_ends_the_run_for_good(config, tmp_path):
    """A learning rate of 1e30 overflows within a few steps."""
    wild = dataclasses.replace(config, optim=OptimConfig(lr=1e30, clip=0.0, weight_decay=0.0))
    result = train(wild, tmp_path / "run")
    assert result.status == "diverged"
    assert 1 < result.diverged_at_step < 40
    assert result.loss is None
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result.to_dict()
    assert train(wild, tmp_path / "run") == result, "a diverged run is not tried again"


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=8",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("data=8", "data=2,fsdp=4", "fsdp=4,tensor=2", "data=2,sequence=4")
        ),
    ],
)
def test_the_mesh_does_not_matter(config, undisturbed, tmp_path, mesh):
    """Sums are taken in another order, so to 1e-5 and not to the bit."""
    result = train(config, tmp_path / "run", Execution(mesh=mesh))
    assert result.where["devices"] == 8
    assert result.loss == pytest.approx(undisturbed[0].loss, rel=1e-5)
    np.testing.assert_allclose(curve(tmp_path / "run")["loss"], curve(undisturbed[1])["loss"], rtol=1e-5)


def test_fsdp_shards_parameters_and_optimiser_state():
    program = program_for(RunConfig(model=MODEL), Execution(), make_mesh("fsdp=8"))
    state = program.init(jax.random.key(0))
    sharded = [x for x in jax.tree.leaves(state) if x.addressable_shards[0].data.size * 8 == x.size]
    whole = sum(x.size for x in jax.tree.leaves(state))
    assert sum(x.size for x in sharded) > 0.95 * whole, "parameters or moments lie whole on every device"


@pytest.mark.slow
def test_stopped_on_one_mesh_resumed_on_another_and_in_a_scan(config, undisturbed, tmp_path, short_calls):
    with pytest.raises(Preempted):
        train(config, tmp_path / "run", Execution(mesh="fsdp=8"), should_stop=stop_after(6))
    result = train(config, tmp_path / "run", Execution(layers="scanned"))
    assert result.timing["resumed_at_step"] > 0
    assert result.loss == pytest.approx(undisturbed[0].loss, rel=1e-5)


def test_bfloat16_keeps_float32_parameters(config, undisturbed, tmp_path):
    half = dataclasses.replace(config, dtype="bfloat16")
    result = train(half, tmp_path / "run")
    assert result.loss == pytest.approx(undisturbed[0].loss, rel=0.03)
    assert result.loss != undisturbed[0].loss
    program = program_for(half, Execution(), make_mesh())
    assert {x.dtype.name for x in jax.tree.leaves(program.abstract_state)} == {"float32", "int32"}


def test_two_processes_never_train_one_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    with train_module.lease(tmp_path / "run"), pytest.raises(Busy):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "execution", "message"),
    [
        ({"tokens": 10**9}, {}, "training tokens; train on fewer, or allow repeats with --repeat"),
        ({"model": dataclasses.replace(MODEL, vocab_size=300)}, {}, "has a vocabulary of 256; set model.vocab_size"),
        ({}, {"mesh": "fsdp=16"}, "fsdp=16 makes 16 devices, 8 are here"),
        ({}, {"mesh": "fsdp=3"}, "fsdp=3 makes 3 devices, 8 are here"),
        ({}, {"mesh": "fsdp=0"}, "mesh = 'fsdp=0': expected sizes of data, fsdp, tensor, sequence"),
        ({}, {"mesh": "tensor=8"}, "mesh tensor = 8: does not divide model.n_kv_heads = 2"),
        ({}, {"mesh": "data=8", "accumulate": 2}, "batch_size = 8: not divisible by the 8 devices"),
        ({}, {"accumulate": 3}, "batch_size = 8: not divisible by the 1 devices"),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(config, tmp_path, changes, execution, message):
    with pytest.raises(InputError) as caught:
        train(dataclasses.replace(config, **changes), tmp_path / "run", Execution(**execution))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_repeating_the_corpus_is_allowed_when_asked(config, tmp_path):
    data = dataclasses.replace(config.data, repeat=True)
    store = open_store(data.source, "bytes", valid_fraction=0.1)
    epoch = store.n_train_windows(32) * 32
    result = train(dataclasses.replace(config, data=data, tokens=epoch + 4096), tmp_path / "run")
    assert result.unique_tokens == epoch < result.tokens


def test_a_run_begun_on_another_corpus_is_refused(config, tmp_path, short_calls):
    with pytest.raises(Preempted):
        train(config, tmp_path / "run", should_stop=stop_after(3))
    (tmp_path / "run" / "corpus.json").write_text('{"corpus":"another"}')
    with pytest.raises(InputError, match="was begun on corpus another"):
        train(config, tmp_path / "run")


def test_runs_of_one_shape_share_their_programs():
    """Otherwise every run of a sweep would be traced and compiled anew: on the mesh of a run, not of a constant."""
    one = RunConfig(model=MODEL, tokens=10_000, optim=OptimConfig(lr=0.01))
    other = dataclasses.replace(one, seed=3, tokens=20_000, optim=OptimConfig(lr=0.02, weight_decay=0.0))
    for line in ("", "fsdp=8"):
        programs = [program_for(c, Execution(mesh=line), make_mesh(line)) for c in (one, other)]
        assert programs[0] is programs[1]
    wider = dataclasses.replace(one, model=dataclasses.replace(MODEL, d_ff=8))
    assert program_for(wider, Execution(), make_mesh()) is not program_for(one, Execution(), make_mesh())
