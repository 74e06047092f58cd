"""The seam of the objectives: another loss, a random one, one with frozen arrays go through the engine as it is."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig
from scaling.data.store import open_store
from scaling.engine.coordinates import change
from scaling.engine.feed import feed
from scaling.engine.loop import Preempted, train
from scaling.engine.memory import plan
from scaling.engine.program import CHUNK_STEPS, compile_run, recipe
from scaling.engine.recorder import CurveFile
from scaling.engine.sharding import make_mesh
from scaling.execution import Execution
from scaling.objectives import Objective, answers_only, find, names
from scaling.objectives.answers_only import AnswersOnly, answers
from scaling.objectives.next_token import NextToken

B, T = 8, 64
CONFIG = RunConfig(
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2), data=DataConfig(seq_len=T), optim=OptimConfig(lr=0.01)
)
TOKENS_XBU = np.random.default_rng(0).integers(0, 256, (CHUNK_STEPS, B, T + 1)).astype(np.int32)
LR_X = np.full(CHUNK_STEPS, 0.01, np.float32)


def program(objective, **execution):
    mesh = make_mesh()
    return compile_run(dataclasses.replace(recipe(CONFIG, Execution(**execution), mesh), objective=objective), mesh)


def trained(objective, more=None, frozen=None, calls=(6,), extra=None, **execution):
    """(metrics [steps], state) after the steps of `calls`; more: columns of the batches besides the tokens."""
    compiled = program(objective, **execution)
    state, metrics, first = compiled.init(jax.random.key(0)), [], 0
    for n in calls:
        batch_X = jax.tree.map(
            lambda x, first=first: np.roll(x, -first, axis=0), {"tokens_BU": TOKENS_XBU, **(more or {})}
        )
        key = {"seed": np.uint32(5), "first": np.int32(first)} if objective.random else {}
        state, new = compiled.steps(state, frozen or {}, {"batch_X": batch_X, **key}, LR_X, 0.1 * LR_X, n)
        metrics.append({name: np.asarray(values)[:n] for name, values in new.items()})
        first += n
    return {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}, jax.device_get(state)


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("execution", [{}, {"accumulate": 2}, {"loss_chunks": 4}], ids=str)
def test_a_mask_of_ones_is_next_token_to_the_bit(execution):
    """Through the weighted sums, the normalisation over the batch, and the parts: if a bit differs, the masked loss is
    another loss, or is added up otherwise. (Both are compiled apart: with z-loss and a batch that is no power of two,
    or with parts of both kinds at once, the compiler was seen to round one of them differently, by 1e-7.)
    """
    ones = {"weight_BT": np.ones((CHUNK_STEPS, B, T), np.float32)}
    metrics, state = trained(NextToken(), **execution)
    masked, masked_state = trained(AnswersOnly(), ones, **execution)
    assert (masked.pop("answer_share") == 1).all()
    same_bits(metrics, masked)
    same_bits(state, masked_state)


def uneven_mask():
    """Few weights in some rows, many in others, so that a mean of means would be another number."""
    share = np.linspace(0.02, 0.9, B)[:, None]
    return (np.random.default_rng(1).random((CHUNK_STEPS, B, T)) < share).astype(np.float32)


def test_the_masked_loss_is_the_mean_over_the_weighted_tokens():
    mask_XBT = uneven_mask()
    metrics, _ = trained(AnswersOnly(), {"weight_BT": mask_XBT}, calls=(1,))
    params = program(AnswersOnly()).init(jax.random.key(0))["params"]
    loss_BT, _ = transformer.next_token_loss(CONFIG.model, params, TOKENS_XBU[0])
    expected = np.sum(np.asarray(loss_BT) * mask_XBT[0]) / mask_XBT[0].sum()
    assert metrics["loss"][0] == pytest.approx(expected, rel=1e-6)
    assert metrics["answer_share"][0] == pytest.approx(mask_XBT[0].mean(), rel=1e-6)


@pytest.mark.parametrize("execution", [{"accumulate": 4}, {"loss_chunks": 4}], ids=str)
def test_uneven_masks_do_not_depend_on_the_parts(execution):
    more = {"weight_BT": uneven_mask()}
    whole, parts = trained(AnswersOnly(), more)[0], trained(AnswersOnly(), more, **execution)[0]
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


def test_a_batch_without_an_answer_trains_nothing_and_is_finite():
    metrics, _ = trained(AnswersOnly(), {"weight_BT": np.zeros((CHUNK_STEPS, B, T), np.float32)}, calls=(2,))
    assert (metrics["loss"] == 0).all()
    assert (metrics["grad_norm"] == 0).all()


@dataclass(frozen=True)
class Noisy(Objective):
    """Next token on a batch of which tokens are replaced at random."""

    random = True

    def loss(self, apply, params, frozen, batch, key):
        other = jax.random.bernoulli(key, 0.3, batch["tokens_BU"].shape)
        objective, loss = apply.mean_loss(params, jnp.where(other, 0, batch["tokens_BU"]))
        return objective, {"loss": loss}


def test_a_steps_key_does_not_depend_on_how_a_run_is_cut_into_calls():
    metrics, state = trained(Noisy(), calls=(6,))
    again, state_again = trained(Noisy(), calls=(1, 3, 2))
    same_bits(metrics, again)
    same_bits(state, state_again)
    one_key = np.unique(trained(Noisy(), {}, calls=(1,))[0]["loss"])
    assert metrics["loss"][0] == one_key
    assert len(set(metrics["loss"].tolist())) == 6


def test_next_token_has_no_key_in_its_program():
    compiled = program(NextToken())
    data = {"batch_X": {"tokens_BU": TOKENS_XBU}}
    text = compiled.steps.lower(compiled.abstract_state, {}, data, LR_X, LR_X, 1).as_text()
    assert "threefry" not in text
    compiled = program(Noisy())
    data |= {"seed": np.uint32(0), "first": np.int32(0)}
    assert "threefry" in compiled.steps.lower(compiled.abstract_state, {}, data, LR_X, LR_X, 1).as_text()


@dataclass(frozen=True)
class Anchored(Objective):
    """Next token, held near the parameters in `frozen`."""

    metrics = ("loss", "distance")

    def loss(self, apply, params, frozen, batch, key):
        objective, loss = apply.mean_loss(params, batch["tokens_BU"])
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(frozen), strict=True)
        distance = sum(jnp.sum(jnp.square(p - f)) for p, f in pairs)
        return objective + 100.0 * distance, {"loss": loss, "distance": distance}


def test_frozen_arrays_are_read_and_not_trained():
    start = jax.device_get(program(Anchored()).init(jax.random.key(0))["params"])
    copy = jax.tree.map(np.copy, start)
    held, _ = trained(Anchored(), frozen=start, calls=(1, 5))
    same_bits(start, copy)
    assert held["distance"][0] == 0
    away = jax.tree.map(lambda x: x + 1.0, start)
    pulled, _ = trained(Anchored(), frozen=away, calls=(1, 5))
    assert pulled["distance"][-1] < pulled["distance"][0]
    assert (held["loss"] != pulled["loss"]).any()


@pytest.mark.parametrize("block", [3, 2**22])
def test_answers_follow_the_marker_to_the_end_of_the_line(monkeypatch, block):
    """The block is how much is looked at together: a line may lie over two."""
    monkeypatch.setattr(answers_only, "BLOCK", block)
    text = "a=bc\nd\n=e=f\n"
    weight = answers(np.frombuffer(text.encode(), np.uint8), ord("="), ord("\n"))
    answered = "".join(text[i + 1] for i in np.flatnonzero(weight[:-1]))
    assert answered == "bc\ne=f\n"


def test_objectives_are_found_by_their_file():
    assert {"next_token", "answers_only"} <= set(names())
    for name in names():
        assert isinstance(find(name), Objective), f"scaling/objectives/{name}.py defines no class of that name"
    assert find("answers_only", '{"marker": ">"}') == AnswersOnly(">")
    for name, options, message in (
        ("next_tokn", "", "did you mean 'next_token'?"),
        ("answers_only", '{"marke": "="}', "answers_only has no 'marke', expected marker, did you mean 'marker'?"),
        ("answers_only", '{"marker": "=="}', "marker = '==': expected one ASCII character"),
        ("next_token", '{"marker": "="}', "next_token has no 'marker', expected no options"),
    ):
        with pytest.raises(InputError) as caught:
            find(name, options)
        assert message in str(caught.value)


def test_finding_an_objective_imports_no_jax():
    """`status`, `table` and the planner count FLOPs by it, on machines and in moments that have no time for JAX."""
    code = "import sys; import scaling.objectives as o; list(map(o.find, o.names())); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_and_coordinates_need_no_corpus_of_an_objective(monkeypatch):
    """Both make batches of their own: one that lacks what the objective reads is no batch of the run's."""
    plain = dataclasses.replace(CONFIG, batch_size=2)
    masked = dataclasses.replace(plain, objective=ObjectiveConfig("answers_only"))
    report = plan(masked, Execution(), compiled=True)
    weights = CHUNK_STEPS * 2 * T * 4
    assert report["argument_bytes"] - plan(plain, Execution(), compiled=True)["argument_bytes"] == weights
    assert change(masked, 1) == change(plain, 1)
    monkeypatch.setattr("scaling.engine.program.find", lambda name, options: Noisy())
    assert plan(plain, Execution(), compiled=True)["total_bytes"] > 0


def test_an_objective_counts_its_own_flops(monkeypatch):
    """A frozen reference is a forward pass more: the planner, the result and the table must count it alike."""
    whole, last = CONFIG.flops, CONFIG.flops_from(CONFIG.steps - 1)
    monkeypatch.setattr(NextToken, "flops_factor", 4 / 3)
    again = dataclasses.replace(CONFIG)  # without what CONFIG keeps of its own
    assert again.flops == pytest.approx(4 / 3 * whole)
    assert again.flops_from(CONFIG.steps - 1) == pytest.approx(4 / 3 * last)


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Lines such as `17+5=22`: what comes before the marker is noise, what comes after it is not."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("sums")
    for i in range(4):
        a, b = rng.integers(0, 10, (2, 2500))
        (folder / f"{i}.txt").write_text("".join(f"{x}+{y}={x + y}\n" for x, y in zip(a, b, strict=True)))
    data = DataConfig(source=f"text:{folder}/*.txt", seq_len=32, valid_fraction=0.1)
    model = ModelConfig(d_model=16, n_layers=1, n_heads=2)
    return RunConfig(
        model=model,
        data=data,
        tokens=40 * 8 * 32,
        optim=OptimConfig(lr=0.02),
        objective=ObjectiveConfig("answers_only"),
    )


def test_a_run_that_trains_on_answers_only(sums, tmp_path, monkeypatch):
    """End to end: stopped and resumed, its curve has the objective's metrics, its loss is of the answers alone."""
    monkeypatch.setattr("scaling.engine.loop.CHUNK_SECONDS", 0.0)
    calls = iter(range(100))
    with pytest.raises(Preempted):
        train(sums, tmp_path / "run", should_stop=lambda: next(calls) == 6)
    result = train(sums, tmp_path / "run")
    whole = train(sums, tmp_path / "whole")
    assert result.loss == whole.loss
    curves = [pq.read_table(tmp_path / name / "curve.parquet") for name in ("run", "whole")]
    assert curves[0].equals(curves[1])
    columns = ["step", "tokens", "lr", "loss", "answer_share", "grad_norm", "valid_loss"]
    assert curves[0].column_names == columns
    store = open_store(sums.data.source, "bytes", valid_fraction=0.1)
    other = train(dataclasses.replace(sums, objective=ObjectiveConfig()), tmp_path / "other")
    assert result.valid_tokens == feed(sums, store).counted
    assert 0.25 < result.valid_tokens / other.valid_tokens < 0.45, "of 6 or 7 bytes a line, 2 or 3 answer"
    assert result.flops_validation == other.flops_validation, "the forward pass is over all of them"
    assert result.run != other.run


def test_what_is_validated_on_is_counted_once(sums, monkeypatch):
    """The members of a swarm share it: to cut every window again for each costs more than their training."""
    store = open_store(sums.data.source, "bytes", valid_fraction=0.1)
    losses = feed(sums, store).counted
    monkeypatch.setattr("scaling.engine.feed.cut", lambda *arguments: pytest.fail("cut again"))
    other = dataclasses.replace(sums, data=dataclasses.replace(sums.data, seed=1), optim=OptimConfig(lr=0.01))
    assert feed(other, store).counted == losses


def test_a_corpus_without_the_marker_is_refused(sums, tmp_path):
    config = dataclasses.replace(sums, objective=ObjectiveConfig("answers_only", '{"marker": "#"}'))
    with pytest.raises(InputError, match="marker '#' stands in no line"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", ['{"marker": 5}', '{"marker": ["="]}', '{"marker": null}'])
def test_options_are_of_their_type(options):
    with pytest.raises(InputError, match=r"objective\.options marker"):
        find("answers_only", options)


def test_a_step_without_an_answer_does_not_count_in_the_training_loss(tmp_path):
    """Its loss is 0 as nothing was asked: a plain mean would show a model that is better than it is."""
    curve = CurveFile(tmp_path / "curve.parquet", ("loss", "answer_share"), 1, np.ones(20, np.float32), "answer_share")
    assert curve.recent_loss() is None
    curve.extend({"loss": np.array([3.0, 0.0] * 10, np.float32), "answer_share": np.array([0.5, 0.0] * 10, np.float32)})
    assert curve.recent_loss() is None  # the last step asked nothing
    curve = CurveFile(tmp_path / "curve.parquet", ("loss", "answer_share"), 1, np.ones(40, np.float32), "answer_share")
    curve.extend({"loss": np.array([3.0, 0.0] * 20, np.float32), "answer_share": np.array([0.5, 0.0] * 20, np.float32)})
    assert curve.recent_loss() == 3.0
