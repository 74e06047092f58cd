"""What is asked of trained models, against closed forms, enumeration, and what training itself measured."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from models.config import ModelConfig
from models.errors import InputError
from models.transformer import init
from scaling import evaluation
from scaling.config import DataConfig, RunConfig, ScheduleConfig
from scaling.engine.loop import train
from scaling.evaluate import EvaluationConfig, evaluate, path_of, read_evaluations
from scaling.evaluation._asker import Asker, Stopped, forward_flops
from scaling.evaluation._rows import answers_of
from scaling.evaluation.answers import calibration_row, pass_at_k, share_row
from scaling.evaluation.enumerate import measured, tree_logprobs
from scaling.evaluation.samples import unbiased
from scaling.load import load


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(folder, configuration, result) of a small trained run."""
    config = RunConfig(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=1),
        data=DataConfig(source=corpus, seq_len=32, valid_fraction=0.1),
        schedule=ScheduleConfig(warmup_tokens=512),
        tokens=8192,
    )
    folder = tmp_path_factory.mktemp("runs") / config.run_id
    return folder, config, train(config, folder)


def fresh(vocab_size: int, seed: int = 0) -> Asker:
    """A model whose head is not zero, so that its distributions differ from place to place."""
    import jax

    model = ModelConfig(vocab_size=vocab_size, d_model=8, n_layers=1, n_heads=1)
    params = init(model, jax.random.key(seed))
    params["head"] = jax.random.normal(jax.random.key(seed + 1), params["head"].shape)
    return Asker(SimpleNamespace(config=RunConfig(model=model), params=params, folder="x"))


def test_the_loss_on_all_validation_rows_is_the_run_s_own(run):
    """Asked apart from training, by another program: if this fails, one of the two reads other windows or weights."""
    folder, _, result = run
    (row,) = evaluate(folder, EvaluationConfig("loss", '{"n": 100000}')).rows
    assert row["value"] == pytest.approx(result.loss, abs=1e-5)
    assert row["n"] == result.valid_tokens
    assert 0 < row["stderr"] < 0.2


def test_an_answer_that_is_kept_is_read_and_a_damaged_one_made_again(run):
    folder, config, _ = run
    wanted = EvaluationConfig("loss", '{"n": 8}')
    first = evaluate(folder, wanted)
    assert evaluate(folder, wanted, model="not asked") == first
    path_of(folder, wanted).write_text("{")
    assert evaluate(folder, wanted).rows == first.rows
    assert len(list(path_of(folder, wanted).parent.glob("damaged-*"))) == 1
    assert {r.name for r in read_evaluations(folder, config.run_id)} == {"loss"}


def test_equal_questions_have_one_key_and_others_another():
    key = EvaluationConfig("loss", '{"n": 8, "subset": "all"}').key
    assert key == EvaluationConfig("loss", '{"subset":"all","n":8.0}').key
    assert key == EvaluationConfig("loss", '{"n": 8}').key, "a default that is spelt out asks nothing else"
    assert EvaluationConfig("loss", '{"n": 2048}').key == EvaluationConfig("loss").key
    others = [
        EvaluationConfig("loss", '{"n": 9}'),
        EvaluationConfig("loss", '{"n": 8}', seed=1),
        EvaluationConfig("kl"),
    ]
    assert key not in {other.key for other in others}


def test_flops_of_asking_are_those_of_a_forward_pass(run):
    folder, config, _ = run
    result = evaluate(folder, EvaluationConfig("loss", '{"n": 5}'))
    assert result.flops == pytest.approx(forward_flops(config.model, (5, 32)))
    assert result.flops == pytest.approx(config.flops / config.trained_tokens / 3 * 5 * 32)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("los", "", "did you mean 'loss'"),
        ("loss", '{"m": 3}', "loss has no 'm'"),
        ("loss", '{"n": "many"}', "expected a whole number"),
        ("loss", "[]", "JSON object"),
    ],
)
def test_a_misspelt_question_is_one_line(name, options, match):
    with pytest.raises(InputError, match=match):
        EvaluationConfig(name, options)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("answers", "", "a text without questions"),
        ("loss", '{"subset": "values"}', "expected one of all"),
        ("kl", "", "has no parent"),
        ("kl", '{"to": "../../etc"}', "no run id"),
        ("kl", '{"to": "0123456789ab"}', "no such folder"),
        ("samples", '{"k": [20]}', "from 1 to samples = 16"),
        ("samples", "", "a text without questions"),
        ("enumerate", '{"k": [0]}', "at least 1"),
    ],
)
def test_what_cannot_be_asked_of_a_run_is_one_line_and_writes_nothing(run, name, options, match):
    folder = run[0]
    before = sorted((folder / "evaluations").glob("*")) if (folder / "evaluations").exists() else []
    with pytest.raises(InputError, match=match):
        evaluate(folder, EvaluationConfig(name, options))
    assert sorted((folder / "evaluations").glob("*") if (folder / "evaluations").exists() else []) == before


def test_a_source_of_other_tokens_or_that_has_changed_is_refused(run, monkeypatch, tmp_path):
    """Else a loss would be printed of tokens that mean something else, or of text that was trained on."""
    folder, _, _ = run
    model = load(folder)
    other = dataclasses.replace(model, result=dataclasses.replace(model.result, corpus="another"))
    with pytest.raises(InputError, match="has changed since"):
        evaluate(folder, EvaluationConfig("loss", '{"n": 7}'), other)
    monkeypatch.setattr("scaling.data.tokenizers.Bytes.identity", property(lambda self: str(id(self))))
    with pytest.raises(InputError, match="is another than the model's"):
        evaluate(folder, EvaluationConfig("loss", '{"n": 7}'), model)


def test_an_evaluation_that_is_told_to_stop_leaves_nothing(run):
    folder, _, _ = run
    wanted = EvaluationConfig("loss", '{"n": 6}')
    with pytest.raises(Stopped):
        evaluate(folder, wanted, should_stop=lambda: True)
    assert not path_of(folder, wanted).exists()


def test_an_unfinished_run_is_not_asked(tmp_path, run):
    config = run[1]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(InputError, match="not finished"):
        evaluate(tmp_path, EvaluationConfig("loss"))
    assert not (tmp_path / "evaluations").exists()


def test_nothing_is_written_through_a_link_out_of_the_run(run, tmp_path):
    folder, elsewhere = tmp_path / run[0].name, tmp_path / "elsewhere"
    elsewhere.mkdir()
    import shutil

    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("evaluations"))
    (folder / "evaluations").symlink_to(elsewhere)
    with pytest.raises(InputError, match="link out"):
        evaluate(folder, EvaluationConfig("loss", '{"n": 3}'))
    assert not list(elsewhere.iterdir())


def test_divergence_is_that_of_the_distributions_and_zero_from_itself():
    p, q = fresh(7), fresh(7, seed=5)
    tokens_BU = np.random.default_rng(0).integers(0, 7, (5, 6))
    assert np.allclose(p.divergence(p, tokens_BU), 0, atol=1e-6)
    # The last distribution of each prefix, by the other program.
    logp, logq = p.next(tokens_BU[:, :3]), q.next(tokens_BU[:, :3])
    assert np.allclose(p.divergence(q, tokens_BU)[:, 2], np.sum(np.exp(logp) * (logp - logq), axis=1), atol=1e-5)
    assert (p.divergence(q, tokens_BU) > 0).all()


def test_target_logprobs_and_margins_are_those_of_the_next_distribution():
    asker = fresh(6)
    tokens_BU = np.random.default_rng(1).integers(0, 6, (33, 5))
    logprob_BT, margin_BT = asker.targets(tokens_BU)
    for t in range(4):
        next_BV = asker.next(tokens_BU[:, : t + 1])
        target = tokens_BU[:, t + 1]
        own = next_BV[np.arange(33), target]
        next_BV[np.arange(33), target] = -np.inf
        assert np.allclose(logprob_BT[:, t], own, atol=1e-5)
        assert np.allclose(margin_BT[:, t], own - next_BV.max(axis=1), atol=1e-5)


def test_the_prefix_tree_gives_what_teacher_forcing_gives():
    """Every string of the answer space, scored whole: if this fails, a prefix is paired with another's symbol."""
    asker = fresh(9)
    choices = (np.array([1, 4, 5]), np.array([2, 3]), np.array([7, 8]))
    prompts_NP = np.random.default_rng(2).integers(0, 9, (4, 5))
    strings = np.array(list(itertools.product(*choices)))
    logprob_NS = tree_logprobs(asker, prompts_NP, choices)
    for n, prompt in enumerate(prompts_NP):
        whole_BU = np.concatenate([np.tile(prompt, (len(strings), 1)), strings], axis=1)
        assert np.allclose(asker.targets(whole_BU)[0][:, -3:].sum(axis=1), logprob_NS[n], atol=1e-4)


def test_measures_of_an_enumerated_answer_space():
    p_NS = np.array([[0.5, 0.2, 0.1], [0.1, 0.6, 0.3]])  # of the first problem 0.2 is no answer at all
    right_NS = np.array([[True, False, True], [False, False, True]])
    rows = {(r["metric"], r.get("k")): r for r in measured(np.log(p_NS), right_NS, (1, 2))}
    assert rows["success", None]["value"] == pytest.approx((0.6 + 0.3) / 2)
    assert rows["pass@k", 2]["value"] == pytest.approx((1 - 0.4**2 + 1 - 0.7**2) / 2)
    assert rows["mode", None]["value"] == 0.5
    assert rows["margin", None]["value"] == pytest.approx((np.log(0.5 / 0.2) + np.log(0.3 / 0.6)) / 2)
    assert rows["guess", None]["value"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_pass_at_k_of_very_small_and_large_p_does_not_round_away():
    rows = pass_at_k(np.array([1e-12, 1.0]), (1, 10**6))
    assert rows[1]["value"] == pytest.approx((1e-6 + 1) / 2, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 3, 5)])
def test_the_unbiased_estimator_is_the_share_of_all_subsets(n, c, k):
    subsets = list(itertools.combinations(range(n), k))
    assert unbiased(n, c, k) == pytest.approx(np.mean([min(s) < c for s in subsets]))


def test_answers_are_runs_of_targets():
    answer_BT = np.array([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]], bool)
    row, which = answers_of(answer_BT)
    assert which.tolist() == [0, 0, 1, 2, 2, 3]
    assert row.tolist() == [0, 0, 0, 1, 1, 1]


def test_calibration_error_of_a_planted_gap():
    """10,000 tokens said with 0.75, of which 0.6 are right: the gap is 0.15."""
    right = np.arange(10_000) < 6_000
    row = calibration_row(np.full(10_000, 0.75), right)
    assert row["value"] == pytest.approx(0.15)
    assert row["stderr"] == pytest.approx(np.sqrt(0.6 * 0.4 / 10_000))


def test_none_right_does_not_mean_no_noise():
    """Rule of three (Hanley & Lippman-Hand 1983): of none in n the 95 % upper bound is about 3 / n."""
    found = share_row("accuracy", np.zeros(100, bool))
    assert found["value"] == 0
    assert 0.5 * 3 / 100 < 1.64 * found["stderr"] < 3 / 100
    assert share_row("accuracy", np.ones(100))["stderr"] == found["stderr"]
    half = share_row("accuracy", np.arange(100) < 50)
    assert half["stderr"] == pytest.approx(np.sqrt(0.25 / 99))


def test_every_evaluation_has_a_summary_and_works_without_options():
    for name in evaluation.names():
        assert evaluation.class_of(name).SUMMARY
        evaluation.find(name)


@pytest.fixture(scope="module")
def facts_run(tmp_path_factory):
    config = RunConfig(
        model=ModelConfig(vocab_size=48, d_model=16, n_layers=1, n_heads=1),
        data=DataConfig(source="facts", tokenizer="symbols", seq_len=40, valid_tokens=400),
        schedule=ScheduleConfig(warmup_tokens=1024),
        tokens=16_384,
    )
    folder = tmp_path_factory.mktemp("facts") / config.run_id
    train(config, folder)
    return folder


def test_excess_is_the_loss_less_that_of_who_knows_the_task(facts_run):
    """Over all it is the loss less the entropy; on one sample the noise of the source is the same in both."""
    rows = {
        r["metric"]: r for r in evaluate(facts_run, EvaluationConfig("loss", '{"subset": "answer", "n": 400}')).rows
    }
    entropy = 0.650829393  # of a value token at eps = 0.1 (docs/data.md)
    assert rows["loss"]["value"] - rows["excess"]["value"] == pytest.approx(entropy, abs=4 * 1.68 / np.sqrt(400 * 16))
    assert rows["excess"]["stderr"] < rows["loss"]["stderr"]
    assert rows["excess"]["value"] > 0.5


def test_answers_of_a_task_are_asked(facts_run):
    result = evaluate(facts_run, EvaluationConfig("answers", '{"n": 64, "k": [1, 1024]}'))
    rows = {(r["metric"], r.get("k")): r for r in result.rows}
    assert rows["answer_logprob", None]["n"] == 64 * 8
    assert rows["pass@k", 1]["value"] < rows["pass@k", 1024]["value"] < 1
    assert 0 <= rows["calibration_error", None]["value"] < 0.5


def test_p_of_each_answer_is_what_pass_at_k_is_of(facts_run):
    rows = evaluate(facts_run, EvaluationConfig("answers", '{"n": 32, "k": [7], "each": true}')).rows
    p = np.array([r["value"] for r in rows if r["metric"] == "p"])
    (passed,) = (r["value"] for r in rows if r["metric"] == "pass@k")
    assert [r["problem"] for r in rows if r["metric"] == "p"] == list(range(32 * 8))
    assert passed == pytest.approx(np.mean(1 - (1 - p) ** 7))


def test_sampled_pass_at_k_agrees_with_the_exact_one(facts_run):
    """Of a model that has learned little, answers are found by luck: how often is known from their probabilities.

    On the same world without noise, as what is sampled is verified against the right value.
    """
    options = {"source": "facts:eps=0", "n": 256, "k": [16]}
    exact = evaluate(facts_run, EvaluationConfig("answers", json.dumps(options))).rows
    options |= {"samples": 32, "k": [1, 16]}
    sampled = evaluate(facts_run, EvaluationConfig("samples", json.dumps(options))).rows
    right = {(r["metric"], r.get("k")): r for r in sampled}
    expected = next(r for r in exact if r["metric"] == "pass@k")
    found = right["pass@k", 16]
    assert abs(found["value"] - expected["value"]) < 4 * np.hypot(found["stderr"], expected["stderr"]) + 0.02
    assert right["accuracy", None]["stderr"] < 0.04


def test_a_verifier_that_raises_is_one_line(facts_run, monkeypatch):
    from scaling.data.sources.facts import Facts

    def broken(self, prompt, text):
        raise ZeroDivisionError("a mistake of its author")

    monkeypatch.setattr(Facts, "verify", broken)
    with pytest.raises(InputError, match=r"'facts.*': its verifier failed \(ZeroDivisionError: a mistake"):
        evaluate(facts_run, EvaluationConfig("samples", '{"n": 3}', 7))


def test_problems_one_by_one_give_the_means(facts_run):
    """What is resampled over problems later is what the means are of, in the problems' order, run after run."""
    result = evaluate(facts_run, EvaluationConfig("answers", '{"n": 16, "k": [64], "each": true}'))
    each = [r for r in result.rows if r["metric"] == "p"]
    assert [r["problem"] for r in each] == list(range(16 * 8))
    (mean,) = (r for r in result.rows if r["metric"] == "pass@k")
    assert np.mean([1 - (1 - r["value"]) ** 64 for r in each]) == pytest.approx(mean["value"], rel=1e-6)


def test_each_of_an_enumerated_space_keeps_the_number_of_its_problem():
    """Problems of two prompt lengths are asked in groups: their numbers must come back in order, with their own p."""
    from scaling.evaluation.enumerate import groups

    examples = [SimpleNamespace(prompt=np.arange(1 + i % 2), number=i) for i in range(6)]
    task = SimpleNamespace(
        example=lambda split, i: examples[i], right=lambda example, answers: answers[:, 0] == example.number
    )
    found = list(groups(task, 6, np.arange(6)[:, None]))
    assert [problems.tolist() for problems, *_ in found] == [[0, 2, 4], [1, 3, 5]]
    for problems, _, right_NS in found:
        assert np.argmax(right_NS, axis=1).tolist() == problems.tolist()


def test_samples_of_several_lengths_are_each_read_as_far_as_the_right_answer_goes():
    """A model that goes on with the next question is right all the same."""
    from scaling.data.store import open_store
    from scaling.evaluation.samples import Samples

    task = open_store("relations:hops=3", "symbols").task
    examples = [task.example("valid", i) for i in range(12)]
    assert len({len(e.answer) for e in examples}) > 1
    longest = max(len(e.answer) for e in examples)
    for example in examples:
        written = np.concatenate([example.answer, np.ones(longest, int)])[:longest]
        assert Samples().score(task, example, written) == 1
        assert Samples().score(task, example, np.roll(written, 1)) == 0
