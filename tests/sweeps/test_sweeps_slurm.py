"""The Slurm engine on a real Slurm of two virtual nodes: arrays, preemption, time limits, a lost node, many hosts."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from engine_sweeps import real_sweep, starts, stub, stub_sweep, wait_for
from processes import assert_same_runs

from models.errors import InputError
from scaling.evaluate import EvaluationConfig
from sweeps.asking import Asked, ask, measurements
from sweeps.launch import local, slurm
from sweeps.launch.engine import standing
from sweeps.launch.placement import Placement, read_placement
from sweeps.table import table


def test_a_placement_is_checked(tmp_path):
    path = tmp_path / "placement.toml"
    path.write_text('workers = 4\npartition = "gpu"\nsetup = ["module load cuda"]\nsbatch = { exclude = "n7" }\n')
    placement = read_placement(path)
    assert (placement.workers, placement.partition, placement.setup) == (4, "gpu", ("module load cuda",))
    for text, message in {
        'partiton = "gpu"': "did you mean 'partition'",
        "workers = 0": "at least 1",
        "workers = true": "whole number",
        "memory_gib = nan": "above 0",
        "minutes = 1": "little but save",
        "setup = 'module load cuda'": "list of shell lines",
        "workers =": "not TOML",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_placement(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_placement(tmp_path / "none.toml")


def test_options_of_sbatch():
    parameters = slurm.sbatch_parameters("ladder", Placement(nodes=2, gpus=4, cpus=8, memory_gib=1.5, qos="long"))
    assert parameters["mem"] == "1536M"
    assert (parameters["nodes"], parameters["ntasks_per_node"], parameters["gpus_per_node"]) == (2, 1, 4)
    assert "--cpus-per-task=8" in parameters["srun_args"]  # srun does not take them from sbatch
    assert parameters["qos"] == "long"
    assert "partition" not in parameters


def test_without_submitit_or_slurm(tmp_path, monkeypatch):
    folder = stub_sweep(tmp_path / "sweep", 1)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="squeue is not found"):
        slurm.queued()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="submitit is not installed"):
        slurm.launch(folder, Placement())


def test_ids_of_arrays():
    jobs = ["9_0", "12_1", "12_10", "12_2", "13"]
    assert sorted(jobs, key=slurm.job_order) == ["9_0", "12_1", "12_2", "12_10", "13"]
    assert slurm.array_ids(jobs) == ["9", "12", "13"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("submitit", reason="submitit is not installed (extra: slurm)")
    if why := slurm_cluster.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        slurm_cluster.start(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}".strip(":")
    yield folder
    slurm_cluster.stop(folder)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


def wait_for_end(folder: Path, seconds: float) -> None:
    wait_for(lambda: standing(folder).left == 0, seconds, f"the sweep: {standing(folder)}, starts {starts(folder)}")
    wait_for(lambda: not set(slurm.read_jobs(folder)) & slurm.queued(), 20, "the jobs' ends")


@pytest.mark.slow
def test_an_array_does_the_sweep_and_the_launcher_tells(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 4)
    said = []
    end = slurm.launch(folder, Placement(workers=2, cpus=1), said.append, wait=True, command=stub(folder, 5))
    assert (end.finished, end.left) == (4, 0)
    assert len(slurm.read_jobs(folder)) == 2
    assert len(starts(folder)) == 4, "each run starts once"
    assert any("4 finished" in line for line in said)
    again = slurm.launch(folder, Placement(workers=2), said.append, command=stub(folder, 5))
    assert again.left == 0
    assert "nothing to submit" in said[-1]


@pytest.mark.slow
def test_refused_jobs_are_bad_input(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 2)
    with pytest.raises(InputError, match=r"refuses the jobs.*partition"):
        slurm.launch(folder, Placement(workers=2, partition="none"), command=stub(folder, 1))
    assert not list(folder.rglob("*.pkl"))
    assert not (folder / "slurm.json").exists()


@pytest.mark.slow
def test_a_cancelled_sweep_is_launched_again_and_no_worker_too_many(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 3)
    said = []
    slurm.launch(folder, Placement(workers=2), said.append, command=stub(folder, 40))
    wait_for(lambda: len(starts(folder)) == 2, 20, "two workers")
    slurm.launch(folder, Placement(workers=2), said.append, command=stub(folder, 40))
    assert any("2 workers of an earlier launch" in line and "0 more" in line for line in said)
    slurm.launch(folder, Placement(workers=3), said.append, command=stub(folder, 40))
    jobs = slurm.read_jobs(folder)
    assert len(jobs) == 3
    wait_for(lambda: len(starts(folder)) == 3, 20, "a third worker")
    time.sleep(0.5)
    slurm_cluster.ask(cluster, "scancel", *slurm.array_ids(jobs))
    wait_for(lambda: not set(jobs) & slurm.queued(), 20, "the end of the cancelled jobs")
    assert standing(folder).left == 3
    assert len(list(folder.glob("runs/*/step"))) == 3, "a cancelled worker saves first"
    slurm.launch(folder, Placement(workers=3), said.append, command=stub(folder, 40))
    wait_for_end(folder, 30)
    assert all(step > 0 for _, step, _ in starts(folder)[1::2]), "the runs continue"


@pytest.mark.slow
def test_a_worker_whose_time_is_up_is_queued_again(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 1)
    placement = Placement(workers=1, minutes=1, notice=30)
    slurm.launch(folder, placement, lambda line: None, command=stub(folder, 300))
    wait_for_end(folder, 100)  # Slurm may send the notice up to a minute early
    steps, restarts = [step for _, step, _ in starts(folder)], [count for _, _, count in starts(folder)]
    assert len(steps) > 1
    assert restarts == list(range(len(steps))), "each start is one of Slurm's"
    assert steps == sorted(set(steps)), "each goes on from the saved state"


@pytest.mark.slow
def test_a_lost_node(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 4)
    slurm.launch(folder, Placement(workers=4), lambda line: None, command=stub(folder, 30))
    wait_for(lambda: len(starts(folder)) == 4, 20, "all four workers")
    lost = slurm_cluster.NODES[1]
    slurm_cluster.end_node(cluster, lost)
    wait_for(lambda: standing(folder).left == 0, 30, "the workers of the other node")
    nodes = [node for node, _, _ in starts(folder)]
    assert nodes.count(lost) == 2
    assert nodes.count(slurm_cluster.NODES[0]) == 4, "the other node's workers take over the lost node's runs"
    down = lambda: "down" in slurm_cluster.ask(cluster, "sinfo", "-h", "-n", lost, "-p", "low", "-o", "%T")  # noqa: E731
    wait_for(down, 40, "Slurm to miss the node")
    assert len(set(slurm.read_jobs(folder)) & slurm.queued()) == 2, "the jobs of the lost node are queued again"
    slurm_cluster.start_node(cluster, lost)
    wait_for_end(folder, 30)


@pytest.mark.slow
def test_preempted_workers_give_the_same_table_as_the_local_engine(cluster, corpus, request, tmp_path):
    folder = tmp_path / "sweep"
    sweep = real_sweep(corpus, folder, chained=True)
    ask(folder, [Asked(EvaluationConfig("loss", '{"n": 8}'))])
    slurm.launch(folder, Placement(workers=3, partition="low"), lambda line: None)
    logs = lambda: "".join(p.read_text() for p in folder.glob("logs/slurm/*_log.out"))  # noqa: E731
    wait_for(lambda: logs().count('"begin"') == 2, 60, "the two trunks")
    time.sleep(1)
    slurm_cluster.ask(cluster, "srun", "-p", "high", "-N2", "-n4", "--immediate=15", "sleep", "1")
    wait_for(lambda: logs().count('"preempted"') == 2, 30, "both trunks saved at Slurm's signal")
    wait_for_end(folder, 90)
    results = [json.loads(p.read_text()) for p in folder.glob("runs/*/result.json")]
    anew = [r["run"] for r in results if not r["timing"]["resumed_at_step"]]
    (child,) = [c.run_id for c in sweep.runs if c.parent]
    assert anew == [child], "no run was begun anew but the one that had to wait for its parent"
    assert len(measurements(folder)) == 5, "and every run was asked"
    assert_same_runs(table(folder), request.getfixturevalue("local_table"))


@pytest.mark.slow
def test_a_run_over_two_nodes_is_preempted_and_goes_on(cluster, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device a host
    one, two = tmp_path / "one", tmp_path / "two"
    local.launch(real_sweep(corpus, one, [8], [30_000]), one, 1)
    real_sweep(corpus, two, [8], [30_000])
    slurm.launch(two, Placement(workers=1, nodes=2, partition="low"), lambda line: None)
    logs = lambda: "".join(p.read_text() for p in two.glob("logs/slurm/*_log.out"))  # noqa: E731
    wait_for(lambda: list(two.glob("runs/*/progress.json")), 60, "the run")
    slurm_cluster.ask(cluster, "srun", "-p", "high", "-N2", "-n4", "--immediate=15", "sleep", "1")
    wait_for(lambda: logs().count('"preempted"') == 2, 30, "both hosts left together")
    wait_for_end(two, 90)
    (result,) = [json.loads(p.read_text()) for p in two.glob("runs/*/result.json")]
    assert result["timing"]["resumed_at_step"] > 0
    assert result["loss"] == pytest.approx(table(one)["loss"][0], rel=1e-5)
