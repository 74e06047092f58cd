"""Studies: claims that stand before the runs, verdicts by rule, and what a run that fails does to them."""

import importlib
import json
import re
import shutil
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from models.errors import InputError
from models.sizing import counts
from sweeps.cli.main import main
from sweeps.studies import _sizes
from sweeps.studies._measure import joined
from sweeps.studies._study import Claim, Study, Verdict, load_study, studies, write_claims

STUDY = '''
"""Does loss fall with D?"""

from models.config import ModelConfig
from scaling.config import DataConfig, OptimConfig, RunConfig
from sweeps.define import grid
from sweeps.studies._rules import rows_of
from sweeps.studies._study import Claim, EvaluationSpec, Study, Verdict

QUESTION = "Does the loss fall with D?"
COST = "seconds"
DATA = DataConfig(source="{source}", seq_len=32, valid_fraction=0.1, repeat=True)
BASE = RunConfig(model=ModelConfig(d_model=8, n_layers=1, n_heads=2), data=DATA, batch_size=2)


def falls(frame):
    loss = rows_of(frame, "asked", metric="loss").sort_values("tokens")["value"].to_list()
    verdict = "upheld" if loss[0] > loss[-1] else "refuted"
    return Verdict("", verdict, predicted=0.0, low=0.0, measured=loss[0] - loss[-1])


def broken(frame):
    return frame["no such column"]


def claim(name, decide, runs=None, text="{text}", evaluations=None):
    return Claim(name, text, "loss", "tokens", "none", ("none",), "none", "no fall", decide, runs, evaluations)


def study(dial=1, tiny=False):
    short, long = grid({{"tokens": [6_400, round(64_000 * dial)]}}, BASE)
    claims = (claim("falls", falls), claim("broken", broken), claim("short", falls, lambda c: c == short))
    claims += (claim("asked", falls, evaluations=("asked",)),)
    asked = (EvaluationSpec("loss", {{"n": 32}}, label="asked"), *{asked})
    return Study("stub", QUESTION, (short, long, *{more}), asked, claims, table=lambda f: [("loss",), ("{mark}",)])
'''


def stub(folder, corpus, text="it falls", more="()", mark="table of mine", asked="()"):
    path = folder / "stub.py"
    path.write_text(STUDY.format(source=corpus, text=text, more=more, mark=mark, asked=asked))
    return path


@pytest.fixture(scope="module")
def conducted(corpus, tmp_path_factory):
    """The stub study's file, its folder after it was conducted, and what the command printed."""
    home = tmp_path_factory.mktemp("study")
    path, out = stub(home, corpus), home / "out"
    return path, out, run_json(["study", str(path), "--out", str(out), "--json"])


def run_json(argv):
    """(exit code, the JSON that the command printed)."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(argv)
    return code, json.loads(printed.getvalue())


def test_a_study_prints_a_verdict_for_each_claim_and_its_cost(conducted):
    _, out, (code, result) = conducted
    assert code == 0
    assert list(result) == ["name", "seconds", "flops", "claims"]
    falls, broken, short, asked = result["claims"]
    assert list(falls) == ["name", "verdict", "predicted", "low", "high", "measured", "note"]
    assert (falls["verdict"], short["verdict"]) == ("upheld", "refuted")  # of one run alone nothing falls
    assert asked | {"name": "falls"} == falls
    assert falls["measured"] > 0.1
    assert falls["high"] is None
    assert broken["verdict"] == "undecided", "a rule that fails must not take the other verdicts with it"
    assert "KeyError" in broken["note"]
    table = pd.read_csv(out / "measurements.csv")
    assert sorted(table["evaluation"]) == ["asked", "asked", "result", "result"]
    assert result["flops"] > table.drop_duplicates("run")["flops_spent"].sum(), "asking costs FLOPs too"
    page = (out / "study.html").read_text()
    assert all(word in page for word in ("Does the loss fall with D?", "table of mine", "no fall", "upheld"))


def test_launched_again_it_trains_nothing_and_says_the_same(conducted):
    path, out, (_, before) = conducted
    made = ("runs/*/result.json", "runs/*/evaluations/*.json")
    results = {p: p.stat().st_mtime_ns for pattern in made for p in out.glob(pattern)}
    claims = (out / "claims.json").read_bytes()
    assert len(results) == 4
    assert run_json(["study", str(path), "--out", str(out), "--json"]) == (0, before)
    assert {p: p.stat().st_mtime_ns for pattern in made for p in out.glob(pattern)} == results
    assert (out / "claims.json").read_bytes() == claims


def test_claims_that_stand_are_never_overwritten(conducted, corpus, capsys):
    """Else a study could be bent to its result after the fact."""
    path, out, _ = conducted
    claims, text = (out / "claims.json").read_bytes(), path.read_text()
    stub(path.parent, corpus, text="it rises")
    with pytest.raises(SystemExit) as ended:
        main(["study", str(path), "--out", str(out)])
    path.write_text(text)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert "other claims were written here before the runs (asked, broken, falls differ)" in error
    assert (out / "claims.json").read_bytes() == claims


def test_a_rule_that_changes_after_the_claims_were_written_is_told(conducted, corpus, capsys):
    path, out, _ = conducted
    text = path.read_text()
    stub(path.parent, corpus, mark="another table")
    assert main(["study", str(path), "--out", str(out)]) == 0
    path.write_text(text)
    assert "note: the study's rules have changed since its claims were written" in capsys.readouterr().out


def test_a_claim_without_all_its_runs_is_undecided_and_says_which(conducted, corpus, tmp_path):
    """A run that diverges (its rate is absurd): claims on all runs are undecided, one on other runs is not."""
    shutil.copytree(conducted[1], tmp_path / "out")
    wild = "grid({'tokens': [64_000], 'optim.lr': [1e30], 'optim.clip': [0.0]}, BASE)"
    code, result = run_json(["study", str(stub(tmp_path, corpus, more=wild)), "--out", str(tmp_path / "out"), "--json"])
    falls, _, short, _ = result["claims"]
    assert code == 1
    assert (falls["verdict"], short["verdict"]) == ("undecided", "refuted")
    _, study = load_study(str(tmp_path / "stub.py"))
    assert falls["note"] == f"1 of 3 runs are lacking (run {study.runs[2].run_id}: diverged)"
    assert falls["measured"] > 0, "what there is to see is shown"


def test_an_evaluation_that_fails_is_named_and_the_verdicts_stay(conducted, corpus, tmp_path, capsys):
    """A question that one run cannot answer, and a table that cannot be drawn: nothing else is lost to them."""
    shutil.copytree(conducted[1], tmp_path / "out")
    wrong = "[EvaluationSpec('loss', {'source': 'text:/nowhere/*'}, lambda c: c == long, 'elsewhere')]"
    path = stub(tmp_path, corpus, asked=wrong)
    path.write_text(path.read_text().replace("table=lambda f: [", "table=lambda f: f['none'] or ["))
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    _, study = load_study(str(path))
    assert f"1 of 2 runs are lacking (run {study.runs[1].run_id}: evaluation elsewhere: " in text
    assert "/nowhere/*" in text
    assert "note: no table: KeyError: 'none'" in text
    claims = json.loads((tmp_path / "out" / "verdicts.json").read_text())["claims"]
    assert [c["verdict"] for c in claims] == ["undecided", "undecided", "refuted", "upheld"]


def test_claims_are_written_before_the_first_run(conducted):
    _, out, _ = conducted
    written = (out / "claims.json").stat().st_mtime_ns
    assert all(p.stat().st_mtime_ns > written for p in out.glob("runs/*/config.json"))


def test_the_second_stage_follows_from_what_the_first_measured(conducted, corpus, tmp_path):
    shutil.copytree(conducted[1], tmp_path / "out")
    file = stub(tmp_path, corpus)
    text = file.read_text().replace("table=lambda", "then=more, table=lambda")
    more = "\n\ndef more(frame):\n    frame = rows_of(frame, 'asked')\n"
    more += "    best = frame.loc[frame['value'].idxmin(), 'tokens']\n"
    file.write_text(text + more + "    return grid({'tokens': [int(best)], 'seed': [1]}, BASE), ()\n")
    assert run_json(["study", str(file), "--out", str(tmp_path / "out"), "--json"])[0] == 0
    table = pd.read_csv(tmp_path / "out" / "measurements.csv").drop_duplicates("run")
    assert sorted(zip(table["tokens"], table["seed"], strict=True)) == [(6_400, 0), (64_000, 0), (64_000, 1)]


def claim(**changes) -> Claim:
    stated = {"name": "a", "text": "b", "metric": "loss", "axis": "N", "law": "none", "controls": ("c",)}
    return Claim(**(stated | {"holdout": "d", "refuted_by": "e", "decide": lambda f: Verdict("a", "upheld")} | changes))


def test_a_claims_hash_is_of_all_it_states_and_of_nothing_else():
    base = claim().sha256
    assert claim(decide=print, runs=bool).sha256 == base
    for name in ("name", "text", "metric", "axis", "law", "holdout", "refuted_by"):
        assert claim(**{name: "other"}).sha256 != base, name
    assert claim(controls=("c", "d")).sha256 != base


def test_claims_are_not_written_behind_results(conducted, tmp_path, capsys):
    """Without this a study whose claims.json was removed could be given new claims, made to fit."""
    shutil.copytree(conducted[1], tmp_path / "out")
    (tmp_path / "out" / "claims.json").unlink()
    with pytest.raises(SystemExit):
        main(["study", str(conducted[0]), "--out", str(tmp_path / "out")])
    assert "holds runs that were trained before any claims were written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "claims.json").exists()


def test_the_example_of_the_docs_is_a_study(tmp_path):
    text = (Path(__file__).parents[2] / "docs/studies.md").read_text()
    block = re.search(r"\n    # mine.py\n(.*?)\n\n[^ ]", text, flags=re.S)
    (tmp_path / "mine.py").write_text(textwrap.dedent(block.group(1)))
    name, study = load_study(str(tmp_path / "mine.py"), "tiny")
    assert (name, len(study.runs), study.claims[0].name) == ("mine", 2, "falls")
    falling = pd.DataFrame({"tokens": [1, 2], "value": [3.0, 2.0]})
    assert [study.claims[0].decide(f).verdict for f in (falling, falling.assign(value=[2, 3]))] == ["upheld", "refuted"]


@pytest.mark.parametrize("name", studies())
def test_every_study_says_what_it_asks_and_states_its_claims(name):
    """The list of studies shows the first two; a claim that says nothing of its hold-out or law was not thought out."""
    module = importlib.import_module(f"sweeps.studies.{name}")
    assert module.QUESTION.endswith("?")
    assert module.COST
    assert f"scaling study {name}" in module.__doc__
    for dial in (None, "tiny"):
        _, study = load_study(name, dial)
        assert study.question == module.QUESTION
        for claim in study.claims:
            assert all((claim.text, claim.metric, claim.axis, claim.law, claim.holdout)), claim.name
        assert any(claim.controls for claim in study.claims), "no control at all"
    assert sum(c.flops for c in study.runs) < 2e11, "the tiny form is one of seconds"


def test_claims_of_another_study_or_a_damaged_file_are_refused(tmp_path):
    from scaling.config import RunConfig

    study = Study("s", "q", (RunConfig(),), (), (claim(),))
    (tmp_path / "claims.json").write_text('{"claims": 3}')
    with pytest.raises(InputError, match="holds no list of claims"):
        write_claims(study, tmp_path, "")
    assert (tmp_path / "claims.json").read_text() == '{"claims": 3}'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claims": ()}, "has no claims"),
        ({"runs": ()}, "has no runs"),
        ({"claims": (claim(), claim())}, "two claims are called 'a'"),
        ({"claims": (claim(evaluations=("los",)),)}, "claim 'a': no evaluation is called 'los'"),
    ],
)
def test_a_study_that_cannot_be_conducted_is_refused(changes, message):
    from scaling.config import RunConfig

    with pytest.raises(InputError, match=message):
        Study(
            **(
                {"name": "s", "question": "q", "runs": (RunConfig(),), "evaluations": (), "claims": (claim(),)}
                | changes
            )
        )


@pytest.mark.parametrize("dial", ["0", "-1", "nan", "inf", "large"])
def test_a_dial_that_is_no_multiple_is_refused(dial):
    with pytest.raises(InputError, match="expected a positive number, which multiplies"):
        load_study("none.py", dial)


def test_an_axis_named_like_a_column_of_the_run_keeps_both():
    runs = pd.DataFrame({"run": ["x"], "seed": [7], "loss": [1.0]})
    rows = {("x", "pass"): [{"metric": "pass@k", "value": 0.5, "stderr": 0.1, "n": 9, "k": 2, "seed": 3}]}
    (row,) = joined(runs.set_index("run", drop=False), rows).to_dict("records")
    assert (row["seed"], row["asked_seed"], row["k"], row["value"], row["evaluation"]) == (7, 3, 2, 0.5, "pass")


def test_the_sizes_are_those_of_the_design():
    """N = 24 d^2 + 48 d, within the rounding of the feed-forward width."""
    for size, d in _sizes.WIDTHS.items():
        config = _sizes.model(size, vocab_size=48)
        assert counts(config).n_compute == pytest.approx(24 * d**2 + 48 * d, rel=0.05), size
        assert config.head_dim == 16 or size == "S2"
    assert _sizes.width(64, 16) == 128
    assert _sizes.tokens(1e6, 16) == 4_000_000
    assert (_sizes.width(64, 0.5), _sizes.tokens(1e6, 0.5)) == (64, 500_000)


def test_claims_that_were_written_before_other_runs_are_told_of(conducted, corpus, tmp_path, capsys):
    """As of another dial: the hash of a claim says nothing of the runs."""
    shutil.copytree(conducted[1], tmp_path / "out")
    assert main(["study", str(stub(tmp_path, corpus)), "--out", str(tmp_path / "out"), "--dial", "2"]) == 0
    assert "other runs than when its claims were written" in capsys.readouterr().out
