"""Questions from a file, and mixtures: what a model reads and writes, which rows are whose, what is refused."""

import json

import numpy as np
import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.chain import check_child
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.data.batches import batch_at, n_valid_windows, valid_starts
from scaling.data.store import open_store
from scaling.engine.loop import train
from scaling.objectives import find


def write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def sums(tmp_path):
    """100 sums, one of them twice."""
    lines = [{"prompt": f"{i} + {2 * i}", "answer": str(3 * i)} for i in range(100)]
    return write(tmp_path / "sums.jsonl", [*lines, lines[7]])


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
def test_rows_are_the_template_filled_in(sums, tmp_path, tokenizer):
    """START, the question, the answer, the end of a document, padding; what answers is the answer and that end."""
    store = open_store(f"jsonl:{sums}", tokenizer, tmp_path, 0.1)
    task, text_of = store.task, store.tokenizer.decode
    assert store.n_train_windows(40) + store.n_valid_windows(40) == 101
    seen = []
    for split, n in (("train", store.n_train_windows(40)), ("valid", store.n_valid_windows(40))):
        rows = store.rows(split, np.arange(n), 40)
        for tokens, answer, real in zip(rows["tokens_BU"], rows["answer_BT"], rows["real_BT"], strict=True):
            assert tokens[0] == 0
            assert (real | ~answer).all()
            assert not tokens[1:][~real].any()
            prompt, given = text_of(tokens[1:][real & ~answer]), tokens[1:][answer]
            assert given[-1] == 0
            assert not (given[:-1] == 0).any()
            i = int(prompt.split()[1])
            assert (prompt, text_of(given[:-1])) == (f"Q: {i} + {2 * i}\nA: ", f"{3 * i}\n")
            seen.append((split, i))
    assert sorted(i for _, i in seen) == sorted([*range(100), 7])
    assert len({split for split, i in seen if i == 7}) == 1, "lines of one prompt stay on one side"
    question = task.example("valid", 0)
    assert task.verify(question.prompt, question.answer) == 1
    asked = text_of(question.prompt[1:]).removeprefix("Q: ").removesuffix("\nA: ")
    assert (task.prompt(asked) == question.prompt).all()
    right = text_of(question.answer[:-1])
    assert [task.verify(question.prompt, text) for text in (right, right.strip(), right + "1", "")] == [1, 1, 0, 0]
    with pytest.raises(InputError, match="has no such prompt"):
        task.verify(task.prompt("1 + 1"), "2")
    again = open_store(f"jsonl:{sums}", tokenizer, tmp_path, 0.1)
    assert (again.key, again.tokenizer.identity) == (store.key, store.tokenizer.identity)
    assert open_store(f"jsonl:{sums}", tokenizer, tmp_path, 0.2).key != store.key
    valid = {valid_starts(config_of(sums, valid_tokens=n * 40), store).tobytes() for n in (3, 4)}
    assert len(valid) == 2
    assert n_valid_windows(config_of(sums, valid_tokens=0), store) == store.n_valid_windows(40)


def config_of(path, T=40, **data):
    return RunConfig(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2),
        data=DataConfig(source=f"jsonl:{path}", seq_len=T, valid_fraction=0.1, repeat=True, **data),
        optim=OptimConfig(lr=0.01),
        schedule=ScheduleConfig(warmup_tokens=640),
        tokens=40 * T * 8,
        objective=ObjectiveConfig("answers_only"),
    )


def test_a_template_of_ones_own(sums, tmp_path):
    template = tmp_path / "chat.txt"
    template.write_text("<user>{prompt}</user><model>{answer}</model>")
    spec = f"jsonl:{sums}?template={template}"
    task = open_store(spec, "bytes", tmp_path).task
    question = task.example("train", 0)
    text = task.tokenizer.decode(np.concatenate([question.prompt[1:], question.answer[:-1]]))
    assert text.startswith("<user>")
    assert text.endswith("</model>")
    assert text.count("</user><model>") == 1
    key = open_store(spec, "bytes", tmp_path).key
    template.write_text("{prompt}={answer}")
    assert open_store(spec, "bytes", tmp_path).key != key
    for wrong in ("{prompt}", "{answer}{prompt}", "{prompt}{answer}{answer}", "plain"):
        template.write_text(wrong)
        with pytest.raises(InputError, match="a template has"):
            open_store(spec, "bytes", tmp_path)


def test_pairs(tmp_path):
    """For the objectives on pairs; next token and answers say that they are not."""
    lines = [{"prompt": f"{i}?", "chosen": f"{i} it is", "rejected": "no"} for i in range(20)]
    store = open_store(f"jsonl:{write(tmp_path / 'pairs.jsonl', lines)}", "bytes", tmp_path)
    rows = store.rows("train", np.array([3, 1]), 30)
    line = store.task.train.number_n[3] - 1
    for kind, text in (("chosen", f"{line} it is\n\0"), ("rejected", "no\n\0")):
        given = rows[f"{kind}_BU"][0, 1:][rows[f"{kind}_answer_BT"][0]]
        assert store.tokenizer.decode(given) == text
    for name in ("next_token", "answers_only"):
        with pytest.raises(InputError, match="gives pairs"):
            batch_at(store, find(name), "train", np.zeros(1, int), 30)


def test_the_byte_pairs_of_the_base(sums, corpus, tmp_path, monkeypatch):
    """A child reads lines in its parent's byte pairs; in its own it would read the same ids as other text."""
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path))
    parent = RunConfig(
        model=ModelConfig(vocab_size=280), data=DataConfig(source=corpus, tokenizer="bpe:280", valid_fraction=0.1)
    )
    for options, goes in ((f"?tokenizer={corpus}", True), ("", False)):
        spec = f"jsonl:{sums}{options}"
        child = RunConfig(model=parent.model, data=DataConfig(source=spec, tokenizer="bpe:280", valid_fraction=0.1))
        if goes:
            check_child(child, parent)
        else:
            with pytest.raises(InputError, match="another vocabulary"):
                check_child(child, parent)


def test_a_run_on_a_file(sums, tmp_path):
    """Its loss is a mean over the answers' tokens: the digits, the new line, the end."""
    result = train(config_of(sums), tmp_path / "run")
    store = open_store(f"jsonl:{sums}", "bytes", valid_fraction=0.1)
    answers = store.rows("valid", np.arange(store.n_valid_windows(40)), 40)["answer_BT"]
    assert result.valid_tokens == answers.sum()
    assert result.loss < 3
    assert result.unique_tokens == store.n_train_windows(40) * 40


GOOD = [{"prompt": f"{i}", "answer": "yes"} for i in range(5)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{\n", "line 6 is not JSON"),
        ("[1]\n", "line 6 is not a JSON object"),
        ({"prompt": "a", "answer": ""}, "line 6, field 'answer' is empty"),
        ({"prompt": "a", "answer": " \n"}, "line 6, field 'answer' is empty"),
        ({"prompt": "a", "anwser": "b"}, "line 6 needs the fields prompt and answer, or"),
        ({"prompt": "a", "anwser": "b"}, "did you mean 'answer'"),
        ({"prompt": 3, "answer": "b"}, "line 6, field 'prompt' holds int, not text"),
        ({"prompt": "a\0", "answer": "b"}, "line 6, field 'prompt' holds a NUL or half a character"),
        ('{"prompt": "a", "answer": "\\ud800"}\n', "line 6, field 'answer' holds a NUL or half a character"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "line 6 has other fields than line 1"),
        ({"prompt": "a", "answer": "b" * 60}, "line 6 of lines.jsonl takes 70 tokens, its prompt 8 and its answer 62"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    path = write(tmp_path / "lines.jsonl", [*GOOD, line, *GOOD])
    with pytest.raises(InputError) as error:
        train(config_of(path), tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [([], "holds no lines"), (GOOD[:1] * 3, "too few prompts"), (None, "is no file")],
)
def test_a_file_of_nothing(lines, message, tmp_path):
    path = tmp_path / "lines.jsonl"
    if lines is not None:
        write(path, lines)
    with pytest.raises(InputError, match=message):
        open_store(f"jsonl:{path}", "bytes", tmp_path)
    with pytest.raises(InputError, match="is text; take bytes"):
        open_store(f"jsonl:{write(path, GOOD)}", "symbols", tmp_path)


def test_a_mixture_holds_rows_of_its_parts_by_their_shares():
    """For replay: each row is whole and of one part, at its share; a part's rows are those that it gives by itself."""
    parts = ["facts:form=qa,uniform=100,eps=0", "facts:a=1"]
    store = open_store(f"mix:0.8*{parts[0]}|0.2*{parts[1]}", "symbols")
    indices = np.arange(5000) * 11
    rows = store.rows("train", indices, 70)
    alone = [open_store(part, "symbols").rows("train", indices, 70) for part in parts]
    asks = rows["tokens_BU"][:, 1] == 1
    assert asks.mean() == pytest.approx(0.8, abs=0.02)
    for name in ("tokens_BU", "answer_BT"):
        for of, rows_of in ((asks, alone[0]), (~asks, alone[1])):
            np.testing.assert_array_equal(rows[name][of], rows_of[name][of])
    backwards = store.rows("train", indices[::-1], 70)
    np.testing.assert_array_equal(backwards["tokens_BU"], rows["tokens_BU"][::-1])
    padded = store.rows("train", indices[:100], 72)
    assert padded["real_BT"].sum(axis=1).tolist() == [70] * 100
    exact = store.task.exact()
    assert exact["1.share"] == pytest.approx(0.8)
    assert exact["2.value_token"] == pytest.approx(0.6508, abs=1e-4)
    single = store.rows("train", indices[asks][:1], 71)
    assert set(single) == {"tokens_BU", "answer_BT", "real_BT"}, "whichever rows are asked for"


def test_a_mixture_of_text_and_questions(sums, corpus, tmp_path):
    store = open_store(f"mix:0.5*{corpus}|0.5*jsonl:{sums}", "bytes", tmp_path, 0.1)
    rows = store.rows("train", np.arange(400), 40)
    text = rows["answer_BT"].all(axis=1)
    assert text.mean() == pytest.approx(0.5, abs=0.1)
    whole = open_store(corpus, "bytes", tmp_path, 0.1).train.tobytes()
    assert all(row.astype(np.uint8).tobytes() in whole for row in rows["tokens_BU"][text])
    assert (rows["tokens_BU"][~text][:, 1:4] == list(b"Q: ")).all()
    assert len({row.tobytes() for row in rows["tokens_BU"][~text]}) > 60, "drawn from all lines"


@pytest.mark.parametrize(
    ("spec", "tokenizer", "message"),
    [
        ("mix:facts|signs", "symbols", "'facts' is no part: expected SHARE*SOURCE"),
        ("mix:0*facts|1*signs", "symbols", "'0*facts' is no part"),
        ("mix:1*facts|1*signs", "symbols", "'signs:' has other tokens than 'facts:'"),
        ("mix:1*facts|1*fact", "symbols", "unknown 'fact', did you mean 'facts'"),
        ("mix:1*facts|1*sotu", "bytes", "'facts:' has 48 symbols of its own"),
    ],
)
def test_mixtures_that_are_none(spec, tokenizer, message):
    with pytest.raises(InputError) as error:
        open_store(spec, tokenizer).n_train_windows(40)
    assert message in str(error.value)


def test_pairs_are_not_mixed_with_rows():
    with pytest.raises(InputError, match="mixes pairs with single rows"):
        open_store("mix:1*markov|1*comparisons", "symbols").n_train_windows(24)
