"""The Ray engine on Ray's own cluster of two nodes, one of which is lost midway."""

import sys
from pathlib import Path

import pytest

from models.errors import InputError
from sweeps.launch import ray as engine
from sweeps.launch.placement import Placement

sys.path.insert(0, str(Path(__file__).parent))


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
