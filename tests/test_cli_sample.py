"""`scaling sample` as a user meets it: text from a run's folder, and one line for what cannot be continued."""

import json
import shutil

import numpy as np
import pytest

from scaling.data.tokenizers import END_OF_DOCUMENT
from scaling.generate import CHUNK
from scaling.load import load
from sweeps.cli.main import main
from tests.test_cli import fails_with


def printed(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def test_prompts_are_continued_and_the_seed_decides(trained_run, capsys):
    argv = ["sample", trained_run, "--prompt", "the union of ", "--n", "3", "--max-tokens", "20"]
    text = printed(capsys, *argv, "--seed", "5")
    assert text.count("the union of ") == 3
    assert text.count("--- continuation ") == 3
    assert printed(capsys, *argv, "--seed", "5") == text
    assert printed(capsys, *argv, "--seed", "6") != text


def test_one_continuation_is_the_text_alone(trained_run, capsys):
    text = printed(capsys, "sample", trained_run, "--prompt", "the uni", "--greedy", "--max-tokens", "2")
    assert text == "the union\n", "the model of this fixture has not learned its words; or greedy is not greedy"


def test_json_has_the_log_probabilities_of_the_model(trained_run, capsys):
    """Those of the full forward pass over prompt and text, whatever the temperature."""
    argv = ["sample", trained_run, "--prompt", "debts", "--prompt", "", "--n", "2", "--temperature", "0.7", "--json"]
    rows = json.loads(printed(capsys, *argv, "--max-tokens", str(CHUNK + 2)))
    assert [(row["prompt"], row["continuation"]) for row in rows] == [("debts", 0), ("debts", 1), ("", 0), ("", 1)]
    model = load(trained_run)
    for row in rows:
        prompt = list(row["prompt"].encode()) or [END_OF_DOCUMENT]
        full = model.token_logprobs(np.array([prompt + row["tokens"]]))[0, len(prompt) - 1 :]
        np.testing.assert_allclose(row["logprobs"], full, rtol=1e-4, atol=1e-4)
        assert np.abs(np.subtract(row["drawn_logprobs"], full)).max() > 1e-2
        assert row["text"] == bytes(row["tokens"][: row["kept"]]).decode(errors="replace")


def test_a_stop_ends_the_text_and_is_not_in_it(trained_run, capsys):
    argv = ["sample", trained_run, "--prompt", "the union", "--greedy", "--max-tokens", "40", "--json"]
    free = json.loads(printed(capsys, *argv))[0]
    stop = free["text"][5:9]
    stopped = json.loads(printed(capsys, *argv, "--stop", stop, "--stop", "never written"))[0]
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["stopped"]
    assert not free["stopped"]


def test_the_best_of_a_beam_is_no_worse_than_greedy(trained_run, capsys):
    argv = ["sample", trained_run, "--prompt", "keep ", "--max-tokens", "12", "--json"]
    greedy = json.loads(printed(capsys, *argv, "--greedy"))[0]
    beam = json.loads(printed(capsys, *argv, "--beam", "4", "--n", "2"))
    totals = [sum(row["logprobs"]) for row in beam]
    assert len(beam) == 2
    assert totals[0] >= max(totals[1], sum(greedy["logprobs"]) - 1e-4)


def test_what_a_model_writes_reaches_the_terminal_without_escape_codes(trained_run, capsys):
    text = printed(capsys, "sample", trained_run, "--prompt", "\x1b]0;owned\x07 the", "--max-tokens", "3")
    assert "\x1b" not in text
    assert "]0;owned" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "0"], "temperature = 0.0: expected a number from 1e-06 to 1e+06; for the most probable"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--top-p", "0"], "top_p = 0.0: expected a number above 0 and at most 1"),
        (["--top-p", "1.1"], "top_p = 1.1"),
        (["--top-k", "-2"], "top_k = -2"),
        (["--n", "0"], "n = 0: expected a whole number of at least 1"),
        (["--max-tokens", "0"], "max_tokens = 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--prompt", "a" * 65], "prompt 0: 65 tokens, longer than the window of 64"),
        (["--prompt", "a\0b"], "NUL"),
        (["--prompt", "\udce4"], "half a character"),
        (["--stop", ""], "stop = ''"),
        (["--greedy", "--top-k", "2"], "leave temperature, top_k and top_p out"),
        (["--beam", "2", "--n", "3"], "--n 3: a beam of 2"),
        (["--beam", "2", "--greedy"], "--beam: takes what is most probable as a whole"),
        (["--beam", "-1"], "beam = -1"),
        (["--beam", "0"], "beam = 0: expected a whole number of at least 1"),
        (["--tempreature", "1"], "did you mean '--temperature'"),
    ],
)
def test_mistakes_get_one_line(trained_run, argv, message, capsys):
    assert message in fails_with(capsys, "sample", trained_run, *argv)


def test_a_run_that_is_not_finished_is_not_asked(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "result.json").unlink()
    assert "not finished" in fails_with(capsys, "sample", run)
    assert "no such folder" in fails_with(capsys, "sample", tmp_path / "nowhere")
    assert "a sweep, not a run" in fails_with(capsys, "sample", sweep_of(tmp_path))


def sweep_of(folder):
    (folder / "sweep" / "runs").mkdir(parents=True)
    return folder / "sweep"


def test_a_question_is_put_in_the_template_of_the_runs_source(trained_run, capsys, monkeypatch):
    """A run on text has none: the question is the prompt."""
    monkeypatch.setattr("scaling.chat.talk.template_of", lambda model: "Q: {prompt}\nA: ")
    assert main(["sample", str(trained_run), "--ask", "who", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Q: who\nA: ")
    monkeypatch.undo()
    assert main(["sample", str(trained_run), "--ask", "who", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("who")
