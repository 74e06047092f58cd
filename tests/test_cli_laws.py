"""The commands on finished runs: what they refuse, write, and say of the C, the doubts and the sizes."""

import json

import numpy as np
import pandas as pd
import pytest

from models.config import ModelConfig
from scaling.config import RunConfig
from scaling.result import result_of
from sweeps.cli.main import main


def planted(**changes) -> pd.DataFrame:
    """Runs of a Chinchilla law with 0.3 % noise, FLOPs counted as 1.25 times 6ND."""
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    loss = (1.7 + 400 * n**-0.34 + 400 * d**-0.28) * np.exp(0.003 * np.random.default_rng(0).standard_normal(n.size))
    return pd.DataFrame({"n_compute": n, "tokens": d, "loss": loss, "flops": 7.5 * n * d} | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    planted().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fitted(runs):
    path = runs.parent / "fit.json"
    assert main(["fit", str(runs), "--law", "chinchilla", "--out", str(path)]) == 0
    return path


def refusal(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def printed(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["allocate", "FIT", "--flops", "1e20", "--figures", "out"], "unknown option --figures"),
        (["multiverse", "RUNS", "--figures", "out"], "unknown option --figures"),
        (["predict", "FIT", "--n", "1e9", "--d", "1e10", "--figures", "out"], "unknown option --figures"),
        (["allocate", "FIT", "--flops", "1e20", "--where", "loss < 3"], "--where says how to read --runs"),
        (["predict", "besiroglu", "--input", "U=1e9"], "--n is needed"),
        (["predict", "besiroglu", "--n", "1e9"], "--d is needed"),
        (["predict", "besiroglu", "--n", "1e9", "--d", "1e10", "--input", "U=1e9"], "besiroglu is not a law of it"),
        (["predict", "muennighoff", "--n", "1e9", "--d", "1e10", "--input", "V=1e9"], "not a law of it"),
        (["report", "RUNS"], "--out DIR is needed"),
        (["health", "RUNS", "--coordinates"], "is a table"),
        (["tune", "RUNS"], "--lr-column"),
        (["fit", "RUNS", "--loss-column", "los\x1b[31ms"], "no column"),
    ],
)
def test_an_option_of_no_use_is_refused_in_one_line(argv, message, runs, fitted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    text = refusal(capsys, *({"FIT": fitted, "RUNS": runs}.get(a, a) for a in argv))
    assert message in text
    assert "\x1b" not in text
    assert list(tmp_path.iterdir()) == []


def test_published_laws_are_listed_and_predict(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "besiroglu" in capsys.readouterr().out
    with_repeats = printed(capsys, "predict", "muennighoff", "--n", "1e9", "--d", "1e11", "--input", "U=1e10")
    assert with_repeats != printed(capsys, "predict", "muennighoff", "--n", "1e9", "--d", "1e11")


def test_allocate_says_which_c_is_which(runs, fitted, capsys):
    """The law's C is 6ND; that of the runs is counted, here 1.25 times as much."""
    argv = ["allocate", fitted, "--flops", "1e20", "--runs", runs]
    text = printed(capsys, *argv)
    assert "C = 6ND" in text
    assert "here C is flops, 1.25 times 6ND in the median run" in text
    approaches = json.loads(printed(capsys, *argv, "--json"))["approaches"]
    assert approaches["flops"] == "flops"
    assert isinstance(approaches["isoflop parabola"], dict), "JSON within a string"
    assert approaches["isoflop parabola"]["slices"][0]["C"] > 0
    assert approaches["isoflop parabola"]["at"]["N"] > 0


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["compare", "RUNS", "--laws", "chinchilla,kaplan"], ["compare"]),
        (["backtest", "RUNS", "--law", "chinchilla"], ["backtest"]),
        (["fit", "CURVE", "--input", "x=samples", "--law", "saturating"], ["fit"]),
    ],
)
def test_figures_are_made_where_they_are_asked_for(argv, names, runs, capsys, tmp_path):
    x = np.geomspace(1e3, 1e6, 20)
    curve = tmp_path / "curve.csv"
    pd.DataFrame({"samples": x, "loss": 0.2 + 5 * x**-0.3}).to_csv(curve, index=False)
    printed(capsys, *({"RUNS": runs, "CURVE": curve}.get(a, a) for a in argv), "--figures", tmp_path / "figures")
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == files


def test_the_report_of_a_table_opens_with_its_doubts(capsys, tmp_path):
    """Copies and outliers that `fit` warns of stand above the figures; nothing of a table is markup in the page."""
    frame = planted(run=[f"<script>r{i}</script>" for i in range(36)], optim="lion", lr=0.01)
    frame.loc[7, "loss"] *= 1.2
    frame = pd.concat([frame, frame.iloc[[3]]])
    table, out = tmp_path / "a<b>.csv", tmp_path / "out"
    frame.to_csv(table, index=False)
    options = ["--law", "chinchilla", "--holdout", "C > 4e20"]
    text = printed(capsys, "report", table, *options, "--out", out)
    assert "warning: 1 of 37 rows are copies" in text
    assert text.index("outliers beyond 5 sigma") < text.index("Held-out runs")
    page = (out / "report.html").read_text()
    assert page.index("rows are copies") < page.index("outliers beyond") < page.index("<figure>")
    assert "lion" in page
    assert "AdamW" not in page
    assert "<script>" not in page
    assert "a<b>" not in page
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["warnings"]) >= 2
    assert (out / "figures" / "compute.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_pooled_and_intervals_go_by_trunk(capsys, tmp_path):
    """Two halves give the fit of the whole; runs that share trunks are resampled by trunk, and the fit says so."""
    frame = planted(trunk=[f"t{i % 6}" for i in range(36)])
    halves = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, part in zip((tmp_path / "whole.csv", *halves), (frame, frame.iloc[:20], frame.iloc[20:]), strict=True):
        part.to_csv(path, index=False)
    options = ("--law", "chinchilla", "--json")
    pooled = json.loads(printed(capsys, "fit", *halves, *options))
    whole = json.loads(printed(capsys, "fit", tmp_path / "whole.csv", *options))
    assert pooled == whole
    assert whole["cluster"] == "trunk"
    assert (
        json.loads(printed(capsys, "fit", tmp_path / "whole.csv", *options, "--cluster", "none"))["cluster"] == "none"
    )


def write_run(folder, config: RunConfig, loss: float):
    run = folder / "runs" / config.run_id
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "result.json").write_text(json.dumps(result_of(config, loss, corpus="c").to_dict()))
    return run


def test_folders_of_sweeps_are_pooled(capsys, tmp_path):
    """A run that is in both counts once; different hold-outs are asked about; what is written goes where it is told."""
    for i, d_model in enumerate((16, 32, 64, 128)):
        for tokens in (200_000, 400_000, 800_000, 1_600_000):
            config = RunConfig(model=ModelConfig(d_model=d_model, n_heads=2), tokens=tokens)
            loss = 1.2 + 30 * config.counts.n_compute**-0.4 + 80 * config.trained_tokens**-0.36
            for folder in ("a", "b") if i == 1 else ("a",) if i < 2 else ("b",):
                write_run(tmp_path / folder, config, loss)
    argv = ["fit", tmp_path / "a", tmp_path / "b", "--law", "chinchilla", "--json"]
    assert json.loads(printed(capsys, *argv))["n_runs"] == 16
    for folder in ("a", "b"):
        runs = [path.name for path in (tmp_path / folder / "runs").iterdir()]
        sweep = {"name": folder, "runs": runs, "holdout": f"flops > 1e{12 + (folder == 'b')}"}
        (tmp_path / folder / "sweep.json").write_text(json.dumps(sweep))
    assert "a: flops > 1e12; b: flops > 1e13" in refusal(capsys, *argv)
    pooled = [*argv[:-1], "--holdout", "flops > 2e12"]
    pooled[0] = "report"
    assert "--out DIR is needed" in refusal(capsys, *pooled)
    text = printed(capsys, *pooled, "--out", tmp_path / "out")
    assert "Tuning of each size" in text
    assert "adamw" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["name"] == "a, b"
    assert not (tmp_path / "a" / "report.html").exists()


def write_curve(folder, config: RunConfig, floor: float) -> None:
    run = write_run(folder, config, floor)
    step = np.arange(1, 401)
    lr = 0.01 * np.minimum(step / 40, 1.0) * np.minimum((401 - step) / 100, 1.0)
    noise = np.exp(0.001 * np.random.default_rng(len(config.run_id)).standard_normal(400))
    loss = (floor + 0.5 * np.cumsum(lr) ** -0.5) * noise
    pd.DataFrame({"step": step, "lr": lr, "loss": loss}).to_parquet(run / "curve.parquet")


def test_the_curves_of_a_sweep_are_fitted_by_size(capsys, tmp_path):
    """One law over models of several sizes would call their distance noise."""
    for d_model in (16, 32):
        for tokens in (200_000, 400_000):
            config = RunConfig(model=ModelConfig(d_model=d_model, n_heads=2), tokens=tokens)
            write_curve(tmp_path, config, 100 / d_model)
    result = json.loads(printed(capsys, "curves", tmp_path, "--law", "tissue", "--json"))
    assert len(result["models"]) == 2
    assert len({model["model"].split(",")[0] for model in result["models"]}) == 2
    for model in result["models"]:
        assert len(model["fit"]["curves"]) == 2
    assert "2 models, each with a law of its own" in refusal(capsys, "curves", tmp_path, "--out", tmp_path / "law.json")


def test_tune_and_health_take_a_table(capsys, tmp_path):
    rows = [
        {"params": n, "tokens": d, "lr": lr, "bs": 4, "loss": 1.5 + 0.05 * np.log(lr / (0.01 * (n / 1e5) ** -0.4)) ** 2}
        for n in (1e4, 3e4, 9e4)
        for d in (2.5e5, 1e6)
        for lr in (0.005, 0.01, 0.02, 0.04, 0.08)
    ]
    table, rule = tmp_path / "runs.csv", tmp_path / "rule.json"
    pd.DataFrame(rows).to_csv(table, index=False)
    assert "PowerRule(c=0.01, p=-0.400" in printed(capsys, "tune", table, "--out", rule)
    assert json.loads(rule.read_text())["rule"] == "power"
    assert "tuned" in printed(capsys, "health", table)


def test_a_sweep_json_from_elsewhere_is_refused_in_a_line(capsys, tmp_path):
    config = RunConfig()
    write_curve(tmp_path, config, 2.0)
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x", "runs": [config.run_id], "holdout": 5}))
    assert "holdout = 5, expected text" in refusal(capsys, "fit", tmp_path)


@pytest.mark.parametrize("more", [[], ["--drop-outliers"]])
def test_a_law_is_chosen_among_those_that_can_be_fitted_as_asked(more, runs, tmp_path, capsys):
    """Failure would mean: one fit chooses the law, another is reported. Of each set one law has the parameter held."""
    x = np.geomspace(1e3, 1e7, 24)
    pd.DataFrame({"x": x, "loss": 0.5 + 30 * x**-0.3}).to_csv(tmp_path / "x.csv", index=False)
    held = ["--input", "x=x", "--fix", "g=1e-6"]
    assert printed(capsys, "fit", tmp_path / "x.csv", *held, *more).startswith("shifted: ")
    if not more:
        assert json.loads(printed(capsys, "fit", runs, "--fix", "gamma=0.9", "--json"))["law"] == "coupled"


def test_a_law_of_learning_rates_allocates_nothing(runs, tmp_path, capsys):
    """Its least value along a budget is the smallest learning rate, not an optimum of anything."""
    path, frame = tmp_path / "fit.json", planted()
    frame["best_lr"] = 1.8 * frame["n_compute"] ** -0.7 * frame["tokens"] ** 0.3
    frame.to_csv(tmp_path / "rates.csv", index=False)
    argv = ["fit", tmp_path / "rates.csv", "--law", "learning_rate", "--loss-column", "best_lr", "--profile"]
    text = printed(capsys, *argv, "--figures", tmp_path / "figures", "--out", path)
    assert "learning rate = c N^p D^q" in text
    assert "\n  a " not in text, "the profile of an exponent of N*"
    assert "the learning rate by N, D" in refusal(capsys, "allocate", path, "--flops", "1e20")
    assert [figure.name for figure in (tmp_path / "figures").glob("*.png")] == ["predicted.png"]


def test_a_gold_reward_below_zero_is_fitted_and_predicted(tmp_path, capsys):
    """A law whose metric has the identity link takes values of either sign; others still refuse them."""
    K = np.geomspace(0.1, 30, 30)
    gold = np.sqrt(K) * (0.9 - 0.2 * np.sqrt(K)) + 0.01 * np.random.default_rng(0).standard_normal(30)
    pd.DataFrame({"kl": K, "gold": gold}).to_csv(tmp_path / "gold.csv", index=False)
    asked = [tmp_path / "gold.csv", "--input", "K=kl", "--loss-column", "gold", "--json"]
    fit = json.loads(printed(capsys, "fit", *asked, "--law", "best_of_n", "--out", tmp_path / "fit.json"))
    assert fit["params"]["beta"] == pytest.approx(0.2, abs=0.01)
    told = json.loads(printed(capsys, "predict", tmp_path / "fit.json", "--input", "K=30", "--json"))
    assert told["low"] < told["predicted"] < told["high"] < 0
    asked[2] = "x=kl"
    assert "3 of 30 runs have no positive finite value" in refusal(capsys, "fit", *asked, "--law", "power")
