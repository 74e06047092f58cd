"""Reward models and DPO against closed forms: what Bradley & Terry's choices make of a policy that is known."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from models import transformer
from models.config import LoraConfig, ModelConfig
from models.errors import InputError
from models.implementation import Implementation
from models.sizing import flops_per_token
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.data.task import START, Task, TaskStore
from scaling.engine.loop import Preempted, train
from scaling.engine.program import Apply
from scaling.engine.swarm import Member, train_swarm
from scaling.execution import Execution
from scaling.load import load
from scaling.objectives import find
from scaling.objectives.dpo import Dpo
from scaling.objectives.reward import Reward

MODEL = ModelConfig(vocab_size=6, d_model=8, n_layers=1, n_heads=2)
REWARD = np.array([0.0, 0.5, -0.3, 1.2, -1.0])  # of the answers 1 .. 5
PAIRS = [(x, y) for x in range(5) for y in range(x)]
OF_PAIR = 400  # rows


class Choice(Task):
    """Pairs of answers of one symbol, each pair as often as any other, chosen by REWARD as Bradley & Terry say: in so
    exact shares that the best loss is known.
    """

    symbols = ("start", *"abcde")
    n_train = n_valid = len(PAIRS) * OF_PAIR
    version = "choice-1"

    def rows(self, split, indices_n, T):
        x, y = np.array(PAIRS)[np.asarray(indices_n) // OF_PAIR].T
        right = np.asarray(indices_n) % OF_PAIR < np.round(OF_PAIR / (1 + np.exp(REWARD[y] - REWARD[x])))
        rows = {}
        for side, answer in {"chosen": np.where(right, x, y), "rejected": np.where(right, y, x)}.items():
            rows[f"{side}_BU"] = np.full((len(answer), T + 1), START, np.int32)
            rows[f"{side}_BU"][:, 1] = 1 + answer
            rows[f"{side}_answer_BT"] = np.broadcast_to(np.arange(T) == 0, (len(answer), T))
        return rows


class Symbols(Task):
    """Rows of one symbol, that the parent is trained on."""

    symbols = Choice.symbols
    version = "symbols-1"

    def rows(self, split, indices_n, T):
        tokens_BU = np.full((len(indices_n), T + 1), START, np.int32)
        tokens_BU[:, 1] = 1 + np.minimum(4, np.asarray(indices_n) % 8)  # the last as often as four others
        return {"tokens_BU": tokens_BU, "answer_BT": np.broadcast_to(np.arange(T) == 0, (len(indices_n), T))}


STORES = {"choice": TaskStore("choice", Choice()), "symbols": TaskStore("symbols", Symbols())}


@pytest.fixture(autouse=True)
def stores(monkeypatch):
    of = lambda source, *_, **__: STORES[source]  # noqa: E731
    for module in ("scaling.engine.loop", "scaling.chain", "scaling.load"):
        monkeypatch.setattr(f"{module}.open_store", of, raising=False)


def config(objective, options="", source="choice", T=2, **changes):
    run = RunConfig(
        model=MODEL,
        data=DataConfig(source=source, tokenizer="symbols", seq_len=T, repeat=True),
        optim=OptimConfig(lr=0.03, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_tokens=0),
        tokens=200 * 200 * T,
        batch_size=200,
        objective=ObjectiveConfig(objective, options),
    )
    return dataclasses.replace(run, **changes)


PARENT = config("answers_only", source="symbols", tokens=100 * 200 * 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaling.engine.loop.open_store", lambda source, *_, **__: STORES[source])
        train(PARENT, folder / PARENT.run_id)
    return folder


def dpo(options='{"beta": 1.0}', **changes):
    return config("dpo", options, parent=PARENT.run_id, **changes)


def best_loss():
    """The entropy of the choices, nats a pair, in the shares that the rows have."""
    p = np.array([np.round(OF_PAIR / (1 + np.exp(REWARD[y] - REWARD[x]))) / OF_PAIR for x, y in PAIRS])
    return -np.mean(p * np.log(p) + (1 - p) * np.log(1 - p))


@pytest.mark.parametrize("T", [1, 2])
def test_a_reward_model_finds_the_rewards_that_the_choices_were_made_by(T, tmp_path):
    """Up to a constant, and its loss is then the entropy of the choices. At T = 1 the last token is the row's, and no
    input of next token.
    """
    run = config("reward", T=T)
    result = train(run, tmp_path / "run")
    assert result.loss == pytest.approx(best_loss(), abs=2e-3)
    assert result.valid_tokens == Choice.n_valid, "a loss a pair"
    tokens_BU = np.stack([np.full(5, START), np.arange(1, 6)], axis=1)
    found = load(tmp_path / "run").rewards(tokens_BU, np.full(5, 2))
    np.testing.assert_allclose(found - found.mean(), REWARD - REWARD.mean(), atol=0.08)
    curve = pq.read_table(tmp_path / "run" / "curve.parquet")
    assert curve["loss"][0].as_py() == pytest.approx(np.log(2)), "the head starts at zero"
    assert curve["accuracy"][0].as_py() == 0.5
    assert result.n_trained == run.counts.n_total + MODEL.d_model


def test_dpo_finds_the_optimum_under_a_penalty_on_kl(home):
    """The policy that maximises reward - beta KL is reference x exp(reward / beta) (2305.18290, equation 4): of choices
    made by that reward, DPO finds it, whatever pairs were asked.
    """
    for beta in (1.0, 2.0):
        run = dpo(f'{{"beta": {beta}}}')
        result = train(run, home / run.run_id)
        assert result.loss == pytest.approx(best_loss(), abs=2e-3)
        start = np.array([[START]])
        policy, reference = (jax.nn.log_softmax(load(home / of).logits(start)[0, 0]) for of in (run.run_id, run.parent))
        found = beta * np.asarray(policy - reference)[1:]
        np.testing.assert_allclose(found - found.mean(), REWARD - REWARD.mean(), atol=0.08)


def test_the_first_step_of_dpo_is_known(home):
    """The policy is its reference: no margin, a loss of ln 2, no KL, half of the pairs right."""
    first = pq.read_table(run_folder(home, dpo()) / "curve.parquet").slice(0, 1).to_pylist()[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-6)


def run_folder(home, run):
    train(run, home / run.run_id)
    return home / run.run_id


APPLY = Apply(MODEL, jnp.dtype("float32"), Implementation())


token_losses = jax.jit(lambda params, tokens_BU: transformer.next_token_loss(MODEL, params, tokens_BU)[0])
hidden = jax.jit(
    lambda params, x_BU: transformer.Transformer(MODEL).apply({"params": params}, x_BU, method="hidden")[0]
)


def shaken(seed):
    """Parameters with a reward head, none of them zero."""
    params = jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = {**params, "reward": np.zeros(MODEL.d_model, np.float32)}
    return jax.tree.map(lambda x: np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


def batch_of(objective, n=6, T=3):
    """Pairs of several lengths, with prompts."""
    rng = np.random.default_rng(0)
    rows = {}
    for side in ("chosen", "rejected"):
        rows[f"{side}_BU"] = rng.integers(0, 6, (n, T + 1)).astype(np.int32)
        begin, end = rng.integers(0, T, (n, 1)), T
        end = begin + 1 + rng.integers(0, T - begin)
        rows[f"{side}_answer_BT"] = (np.arange(T) >= begin) & (np.arange(T) < end)
    return rows, objective.batch(rows)


def test_the_reward_is_read_at_the_last_token_of_the_answer():
    """What follows it changes nothing; the token itself does."""
    rows, batch = batch_of(Reward())
    params = shaken(0)
    last_B = np.array([1 + np.flatnonzero(row).max() for row in rows["chosen_answer_BT"]])
    np.testing.assert_array_equal(batch["chosen_last_B"], last_B)
    changed = {"after": 1, "itself": 0}
    margins = jax.jit(lambda params, batch: Reward().margins(APPLY, params, batch))
    before = margins(params, batch)
    for name, first in changed.items():
        after_BU = np.arange(4) >= last_B[:, None] + first
        tokens_BU = np.where(after_BU, (batch["chosen_BU"] + 1) % 6, batch["chosen_BU"])
        margin_B = margins(params, {**batch, "chosen_BU": tokens_BU})
        assert np.allclose(margin_B, before, atol=1e-6) == (name == "after")


def test_gradients_of_a_reward_model():
    """d loss / d head = -mean sigmoid(-margin) (x_chosen - x_rejected), and the rest against finite differences."""
    _, batch = batch_of(Reward())
    params = shaken(1)
    loss = jax.jit(lambda p: Reward().loss(APPLY, p, {}, batch, None)[0])
    grads = jax.jit(jax.grad(loss))(params)
    margin_B = np.asarray(jax.jit(lambda p: Reward().margins(APPLY, p, batch))(params))
    assert loss(params) == pytest.approx(np.mean(np.log1p(np.exp(-margin_B))), rel=1e-5)
    x = {}
    for side in ("chosen", "rejected"):
        x[side] = np.asarray(hidden(params, batch[f"{side}_BU"]))[np.arange(6), batch[f"{side}_last_B"]]
    expected = -np.mean((1 / (1 + np.exp(margin_B)))[:, None] * (x["chosen"] - x["rejected"]), axis=0)
    np.testing.assert_allclose(grads["reward"], expected, atol=1e-5)
    assert_directional(loss, params, grads)


def assert_directional(loss, params, grads):
    rng = np.random.default_rng(3)
    way = jax.tree.map(lambda x: 1e-2 * rng.normal(size=x.shape).astype(np.float32) / np.sqrt(x.size), params)
    ahead, behind = (loss(jax.tree.map(op, params, way)) for op in (np.add, np.subtract))
    expected = sum(np.vdot(g, w) for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(way), strict=True))
    assert (ahead - behind) / 2 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_the_gradients_of_dpo(smoothing):
    """By hand from log-probabilities; where the policy is the reference, the gradient is known in closed form:
    -beta (1 - 2 s) / 2 times that of the mean of log pi (chosen) - log pi (rejected).
    """
    objective = Dpo(beta=0.7, label_smoothing=smoothing)
    rows, batch = batch_of(objective)
    params, reference = shaken(1), shaken(2)

    def by_hand(params):
        sides = []
        for side in ("chosen", "rejected"):
            loss_BT = token_losses(params, rows[f"{side}_BU"])
            sides.append(-np.sum(np.asarray(loss_BT) * rows[f"{side}_answer_BT"], axis=1))
        return sides

    ask = jax.jit(lambda params: objective.of_reference(APPLY, params, batch))
    given = ask(reference)
    for name, expected in zip(objective.reference, by_hand(reference), strict=True):
        np.testing.assert_allclose(given[name], expected, rtol=1e-5)
    chosen, rejected = (of - ref for of, ref in zip(by_hand(params), by_hand(reference), strict=True))
    margin = 0.7 * (chosen - rejected)
    expected = (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))
    of = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(APPLY, p, {}, b, None), has_aux=True))
    (loss, metrics), grads = of(params, {**batch, **given})
    assert_directional(lambda p: of(p, {**batch, **given})[0][0], params, grads)
    assert loss == pytest.approx(expected.mean(), rel=1e-5)
    assert set(metrics) == set(objective.metrics)
    assert metrics["kl"] == pytest.approx(-np.mean([chosen, rejected]), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(np.mean(margin > 0))
    losses_B = jax.jit(lambda p: objective.losses(APPLY, p, {}, {**batch, **given}))(params)
    np.testing.assert_allclose(losses_B, expected, rtol=1e-4)

    def difference(params):
        of = objective.answers(APPLY, params, batch)
        return jnp.mean(of[0] - of[1])

    same = {**batch, **ask(params)}
    grads = of(params, same)[1]
    for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(jax.jit(jax.grad(difference))(params)), strict=True):
        np.testing.assert_allclose(g, -0.7 * (1 - 2 * smoothing) / 2 * d, atol=1e-6)


def test_the_parent_is_asked_once(home, tmp_path, monkeypatch):
    """Stopped and continued, a run has the same bits and does not ask again; where what it kept is damaged it does, and
    where the parent is a different one the run is different.
    """
    monkeypatch.setattr("scaling.engine.loop.CHUNK_SECONDS", 0.0)
    shutil.copytree(home / PARENT.run_id, tmp_path / PARENT.run_id)
    run = dpo(tokens=20 * 200 * 2)
    whole = train(run, home / run.run_id)
    lines = []
    for damaged in (False, True):
        calls = iter(range(100))
        folder = tmp_path / f"run-{damaged}"
        with pytest.raises(Preempted):
            train(run, folder, should_stop=lambda calls=calls: next(calls) == 6, report=lines.append)
        kept = dict(np.load(folder / "reference.npz"))
        if damaged:
            content = (folder / "reference.npz").read_bytes()
            (folder / "reference.npz").write_bytes(content[:1000] + b"?" + content[1001:])
        result = train(run, folder, report=lines.append)
        assert result.loss == whole.loss
        again = np.load(folder / "reference.npz")
        assert all((again[name] == kept[name]).all() for name in kept)
        curves = [pq.read_table(f / "curve.parquet") for f in (folder, home / run.run_id)]
        assert curves[0].equals(curves[1])
    asked = [line for line in lines if "asking the parent" in line]
    rows = Choice.n_train + Choice.n_valid
    assert asked == [f"asking the parent about {rows:,} rows"] * 3


def test_flops_of_pairs(home):
    """Both sequences are trained on; the reference's forward pass over each pair stands apart; a reward model makes no
    logits.
    """
    run = dpo(tokens=5 * 200 * 2)  # 1000 of the 4000 pairs
    result = train(run, home / run.run_id)
    a_token = flops_per_token(MODEL, 2)
    assert result.flops == 2 * a_token * run.trained_tokens
    assert result.flops_reference == pytest.approx(2 * a_token / 3 * 2 * (1000 + Choice.n_valid))
    assert result.flops_validation == pytest.approx(2 * a_token / 3 * 2 * Choice.n_valid)
    assert result.flops_parents == PARENT.flops
    assert run.training_bytes > config("next_token", tokens=5 * 200 * 2).training_bytes
    reward = config("reward", tokens=5 * 200 * 2)
    assert reward.flops == 2 * (a_token - 6 * 8 * 6) * reward.trained_tokens


@pytest.mark.parametrize("name", ["reward", "dpo"])
@pytest.mark.parametrize("execution", [Execution(accumulate=4), Execution(mesh="fsdp=2,tensor=2")], ids=str)
def test_parts_and_meshes_do_not_matter(home, name, execution):
    run = dpo(tokens=20 * 400) if name == "dpo" else config("reward", tokens=20 * 400)
    alone = train(run, home / run.run_id)
    few = jax.devices()[: 4 if execution.mesh else 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: few)
        result = train(run, home / f"{name}-{execution.mesh or 'parts'}", execution)
    assert result.loss == pytest.approx(alone.loss, rel=1e-5)


def test_pairs_train_as_swarms_and_by_adapters(home):
    """Adam makes a difference of rounding between the two programs larger, over the steps, by its division; the two
    learning rates are far enough apart that one member's loss is not the other's.
    """
    runs = [dpo(tokens=20 * 400, optim=OptimConfig(lr=lr), lora=LoraConfig(rank=1)) for lr in (0.001, 0.003)]
    swarm = train_swarm([Member(run, home / f"swarm-{i}") for i, run in enumerate(runs)])
    for run, result in zip(runs, swarm, strict=True):
        assert result.loss == pytest.approx(train(run, home / run.run_id).loss, rel=1e-4)
    assert swarm[0].loss / swarm[1].loss > 1.05


def test_a_reward_model_hands_its_head_down(home):
    """A child that trains rewards goes on with its parent's; one that does not drops it."""
    first = config("reward", parent=PARENT.run_id, tokens=20 * 400)
    train(first, home / first.run_id)
    with pytest.raises(InputError, match=f"reward trains no head for next tokens; ask its parent, {PARENT.run_id}"):
        load(home / first.run_id).generate([np.array([START])], max_tokens=1)
    still = OptimConfig(lr=1e-30, weight_decay=0.0)
    for lora in (LoraConfig(), LoraConfig(rank=2)):
        child = dataclasses.replace(first, parent=first.run_id, optim=still, lora=lora)
        train(child, home / child.run_id)
        np.testing.assert_allclose(
            load(home / child.run_id).params["reward"], load(home / first.run_id).params["reward"]
        )
    plain = config("answers_only", source="symbols", parent=first.run_id, tokens=400)
    train(plain, home / plain.run_id)
    assert "reward" not in load(home / plain.run_id).params
    with pytest.raises(InputError, match="objective answers_only trains no reward"):
        load(home / plain.run_id).rewards(np.ones((1, 2), int), [2])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (config("dpo"), "objective.name = 'dpo': compares with the run it starts from; give that as parent"),
        (config("reward", source="symbols"), "data.source: this task has no pairs, which the objective wants"),
        (config("next_token"), "this task gives pairs, which only an objective on pairs"),
        (config("reward", '{"beta": 1}'), "objective.options: reward has no 'beta', expected no options"),
    ],
)
def test_what_does_not_go_together_is_refused(run, message, tmp_path):
    with pytest.raises(InputError) as caught:
        train(run, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", ['{"beta": 0}', '{"beta": -1}', '{"label_smoothing": 0.5}'])
def test_options_of_dpo(options):
    with pytest.raises(InputError, match=r"objective\.options: (beta|label_smoothing) = "):
        find("dpo", options)
