"""The Ray engine on Ray's own cluster of two nodes, one of which is lost midway."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
import slurm_cluster
from engine_sweeps import real_sweep, starts, stub, stub_sweep, wait_for
from processes import assert_same_runs

from models.errors import InputError
from scaling.evaluate import EvaluationConfig
from sweeps.asking import Asked, ask, measurements
from sweeps.launch import ray as engine
from sweeps.launch.engine import standing
from sweeps.launch.placement import Placement
from sweeps.table import table


def test_what_ray_is_asked_for():
    asked = engine.options(Placement(cpus=4, gpus=1, memory_gib=2, requeues=3, ray_resources={"a100": 1}))
    assert asked == {
        "num_cpus": 4,
        "num_gpus": 1,
        "memory": 2**31,
        "resources": {"a100": 1},
        "max_retries": 3,
        "retry_exceptions": False,
    }
    assert engine.lacks(Placement(gpus=1, ray_resources={"a100": 1}), {"CPU": 8.0}) == "GPU, a100"
    assert engine.lacks(Placement(cpus=8), {"CPU": 8.0}) == ""


def test_a_run_on_ray_has_one_node(tmp_path):
    with pytest.raises(InputError, match="nodes = 2"):
        engine.launch(tmp_path, Placement(nodes=2))


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="not installed"):
        engine.launch(tmp_path, Placement())


@pytest.fixture(scope="module")
def cluster():
    """Ray's own cluster on this machine: a head and, added by the tests, further nodes."""
    pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@contextlib.contextmanager
def beside(action: Callable[[], object], seconds: float = 90):
    """Does something while a launch goes on, which is interrupted if that fails or after some time."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def act() -> None:
        try:
            action()
        except BaseException:
            interrupt()
            raise

    thread, timer = threading.Thread(target=act), threading.Timer(seconds, interrupt)
    thread.start()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        thread.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_task_goes_on_at_another_node_and_the_table_is_the_local_engines(cluster, corpus, request, tmp_path):
    """There is one worker, and two nodes that have what it needs: the one that it is on is lost."""
    folder = tmp_path / "sweep"
    real_sweep(corpus, folder, chained=True)
    ask(folder, [Asked(EvaluationConfig("loss", '{"n": 8}'))])
    nodes = [cluster.add_node(num_cpus=1, resources={"spare": 1}) for _ in range(2)]

    def lose() -> None:
        # What is still being written has a name with a dot, and does not count.
        saved = lambda: [p for p in folder.glob("runs/*/checkpoints/*") if p.name.isdigit()]  # noqa: E731
        wait_for(saved, 60, "a whole checkpoint")
        commands = dict(slurm_cluster.processes())
        (lost,) = (
            node
            for node in nodes
            if any(
                "sweeps.launch.worker" in commands.get(pid, "")
                for pid in slurm_cluster.descendants([p.process.pid for p in node.all_processes["raylet"]])
            )
        )
        nodes.remove(lost)
        cluster.remove_node(lost, allow_graceful=False)

    said = []
    with beside(lose):
        end = engine.launch(folder, Placement(workers=1, ray_resources={"spare": 1}), said.append)
    cluster.remove_node(*nodes)
    assert (end.finished, end.left) == (5, 0), said
    results = [json.loads(p.read_text()) for p in folder.glob("runs/*/result.json")]
    continued = [r for r in results if r["timing"]["resumed_at_step"] and not r.get("branched_at_step")]
    assert len(continued) == 1, "the run of the lost node goes on from its checkpoint"
    assert len(measurements(folder)) == 5, "every run was asked"
    assert_same_runs(table(folder), request.getfixturevalue("local_table"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lost_nodes_runs_are_taken_over(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 4)
    lost = cluster.add_node(num_cpus=2)

    def lose() -> None:
        wait_for(lambda: len(starts(folder)) == 4, 30, "all four workers")
        cluster.remove_node(lost, allow_graceful=False)

    with beside(lose):
        end = engine.launch(folder, Placement(workers=4), lambda line: None, command=stub(folder, 30))
    assert end.finished == 4
    assert len(starts(folder)) == 6, "the two runs of the lost node begin again"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_saves_and_a_second_launch_continues(cluster, tmp_path):
    folder = stub_sweep(tmp_path / "sweep", 2)

    def interrupt() -> None:
        wait_for(lambda: len(starts(folder)) == 2, 30, "both workers")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    said = []
    with pytest.raises(SystemExit, match="75"), beside(interrupt):
        engine.launch(folder, Placement(workers=2), said.append, command=stub(folder, 40))
    assert "stopping" in said[-1]
    assert standing(folder).left == 2
    end = engine.launch(folder, Placement(workers=2), said.append, command=stub(folder, 40))
    assert end.finished == 2
    assert [step > 0 for _, step, _ in starts(folder)] == [False, True, False, True]
