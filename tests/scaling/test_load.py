"""A trained model from its folder: the one that was trained, or one line that says why there is none."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, RunConfig
from scaling.data.store import open_store
from scaling.engine.loop import train
from scaling.load import load
from scaling.shapes import bucket

# Where a file is damaged, orbax leaves the reads of the others unawaited.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def copy(trained_run, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(trained_run, tmp_path / "run")


def test_the_loaded_model_has_the_loss_that_the_run_recorded(trained_run):
    """The training program validated it, another program asks it: if this fails, other parameters were loaded."""
    model = load(trained_run)
    data = model.config.data
    assert model.result.loss < 2.5, "the model of this fixture has learned nothing; tests that use it show little"
    store = open_store(data.source, data.tokenizer, valid_fraction=data.valid_fraction)
    loss = -np.mean(model.token_logprobs(store.valid_windows(data.seq_len)), dtype=np.float64)
    assert loss == pytest.approx(model.result.loss, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 64), (300, 31)])
def test_asking_in_parts_is_one_full_pass(trained_run, shape):
    """However rows and time are padded and cut, each token's numbers are those of the plain forward pass."""
    model = load(trained_run)
    tokens = np.random.default_rng(0).integers(0, 256, shape)
    full = jax.jit(transformer.apply, static_argnums=0)(model.config.model, model.params, tokens)
    np.testing.assert_allclose(model.logits(tokens), full, rtol=1e-4, atol=1e-4)
    log_p = jax.nn.log_softmax(full)[:, :-1]
    of_tokens = np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(model.token_logprobs(tokens), of_tokens, rtol=1e-4, atol=1e-4)
    x_BTD = model.hidden(tokens)
    np.testing.assert_allclose(x_BTD @ model.params["head"], full, rtol=1e-4, atol=1e-4)


def test_buckets_hold_what_they_are_asked_for_and_repeat():
    sizes = [bucket(n) for n in range(1, 1000)]
    assert all(n <= size <= 1.5 * n for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 20


def test_a_hook_that_a_run_names_is_not_imported(copy):
    """The optimiser made the parameters, and plays no part in asking them."""
    there = json.loads((copy / "config.json").read_text())
    there["optim"]["name"] = "no_such_module:make"
    (copy / "config.json").write_text(json.dumps(there))
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"run": RunConfig.from_dict(there).run_id}))
    assert load(copy).config.optim.name == "no_such_module:make"


def remove(name):
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def rewritten(name, **changes):
    def change(run):
        there = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(there | changes))

    return change


def of_another_width(run):
    """The configuration and its result of a wider model, the arrays those of this one."""
    there = RunConfig.from_dict(json.loads((run / "config.json").read_text()))
    wider = dataclasses.replace(there, model=dataclasses.replace(there.model, d_model=64))
    (run / "config.json").write_text(json.dumps(wider.to_dict()))
    rewritten("result.json", run=wider.run_id)(run)


def flipped(run):
    """A bit of the parameters' file flipped: orbax reads no checksum."""
    for path in sorted((run / "checkpoints").glob("*/default/**/d/*")):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))


def linked(run):
    shutil.move(run / "checkpoints", run.parent / "elsewhere")
    (run / "checkpoints").symlink_to(run.parent / "elsewhere")


DAMAGES = {
    "unfinished": (remove("result.json"), "not finished"),
    "diverged": (rewritten("result.json", status="diverged", loss=None, diverged_at_step=3), "diverged at step 3"),
    "no checkpoints": (remove("checkpoints"), "no checkpoint of its last step"),
    "no run": (remove("config.json"), "not a run"),
    "another's result": (rewritten("result.json", run="0123456789ab"), "is of run 0123456789ab"),
    "another width": (of_another_width, "is damaged"),
    "flipped bit": (flipped, "is damaged"),
    "link out": (linked, "a link out of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_finished_run_is_refused_in_one_line(copy, name):
    damage, message = DAMAGES[name]
    damage(copy)
    before = sorted(copy.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    assert sorted(copy.rglob("*")) == before, "a run that is only asked was changed"


def test_missing_folders_and_sweeps_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="a sweep, not a run"):
        load(tmp_path)


def test_tokens_outside_the_vocabulary_are_refused(trained_run):
    """XLA would clamp the index and give some other token's numbers."""
    model = load(trained_run)
    for tokens in ([[256]], [[-1]], [[0.5]], [1, 2]):
        with pytest.raises(InputError, match="tokens: "):
            model.logits(np.array(tokens))


def test_a_trained_tokenizer_is_read_from_its_store_without_the_text(corpus, tmp_path):
    """The text may be gone: the store of a finished run is enough. With neither, one line says so."""
    text = shutil.copytree(corpus.removeprefix("text:").removesuffix("/*.txt"), tmp_path / "text")
    data = DataConfig(source=f"text:{text}/*.txt", valid_fraction=0.1, seq_len=16, tokenizer="bpe:300")
    model = ModelConfig(d_model=16, n_layers=1, vocab_size=300)
    train(RunConfig(model=model, data=data, tokens=320, batch_size=4), tmp_path / "run")
    shutil.rmtree(text)
    tokenizer = load(tmp_path / "run").tokenizer
    assert tokenizer.decode(tokenizer.encode("the union of states")) == "the union of states"
    assert len(tokenizer.encode("the union of states")) < 12
    rewritten("result.json", corpus="0" * 20)(tmp_path / "run")
    with pytest.raises(InputError, match="matches no file"):
        _ = load(tmp_path / "run").tokenizer
