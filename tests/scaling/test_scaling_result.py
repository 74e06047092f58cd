"""result.json as a type: what is written is read, what is damaged is refused, and FLOPs are split by who spent them."""

import json
import math

import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, RunConfig
from scaling.result import RunResult, flops_by_step, read_result, result_of

CONFIG = RunConfig(model=ModelConfig(d_model=16, n_layers=1, n_heads=2), data=DataConfig(seq_len=32), tokens=40 * 256)
A_STEP = CONFIG.flops / 40

# As the version before RunResult wrote it.
OLD = """{"run": "63457d614692", "status": "finished", "loss": 5.5273794410073025, "bits_per_byte": 7.974467173966325,
"train_loss": 5.52904748916626, "steps": 8, "tokens": 2048, "unique_tokens": 2048, "n_nonembedding": 3008,
"n_compute": 7104, "n_total": 11200, "flops": 92995584.0, "flops_6nd": 87293952.0, "flops_spent": 92995584.0,
"branched_from": null, "branched_at_step": 0, "valid_tokens": 276352, "corpus": "ebf3de729da7bba70978",
"timing": {"seconds": 14.214, "resumed_at_step": 0, "seconds_per_step": 0.003403},
"where": {"jax": "0.10.2", "python": "3.11.7", "device": "cpu", "devices": 1, "processes": 1}}"""
OLD_DIVERGED = json.loads(OLD) | {"status": "diverged", "loss": None, "bits_per_byte": None, "diverged_at_step": 2}


@pytest.mark.parametrize(
    ("result", "ancestors", "own", "spent"),
    [
        (result_of(CONFIG, 2.0), 0, 40, 40),
        (result_of(CONFIG, 2.0, branched_from="0" * 12, branched_at_step=32), 32, 8, 8),
        (result_of(CONFIG, None, diverged_at_step=10), 0, 40, 10),
        (result_of(CONFIG, None, branched_from="0" * 12, branched_at_step=32, diverged_at_step=35), 32, 8, 3),
    ],
    ids=["finished", "branched", "diverged", "branched and diverged"],
)
def test_flops_are_those_of_the_steps(result, ancestors, own, spent):
    """If this fails, a budget counts steps that nobody made, or the trunk's twice."""
    assert result.flops == CONFIG.flops
    found = (result.flops_ancestors, result.flops_own, result.flops_spent)
    assert found == (A_STEP * ancestors, A_STEP * own, A_STEP * spent)


@pytest.mark.parametrize("loss", [0.0, -1.5])
def test_any_finite_loss_is_a_result(loss):
    """An objective's loss may be below 0: refusing it would lose a run after all its compute."""
    assert RunResult.from_dict(result_of(CONFIG, loss).to_dict()).loss == loss


def test_a_run_under_way_has_made_the_steps_since_it_branched():
    flops = flops_by_step(CONFIG.flops, 40, 32, 0)
    assert (flops.spent, flops.left) == (0.0, 8 * A_STEP), "it begins where it branched"
    assert flops_by_step(CONFIG.flops, 40, 0, 30)[3:] == (30 * A_STEP, 10 * A_STEP)


def test_what_is_written_is_read(tmp_path):
    result = result_of(CONFIG, 2.5, branched_from="0" * 12, branched_at_step=3, timing={"seconds": 1.5, "swarm": 2})
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(json.dumps(result.to_dict()))
    assert read_result(tmp_path) == result


def test_results_of_earlier_versions_are_read():
    """A diverged run of theirs claims to have spent the FLOPs of all its steps: it made two of eight."""
    old = RunResult.from_dict(json.loads(OLD))
    assert (old.loss, old.flops_spent, old.where["devices"]) == (5.5273794410073025, 92995584.0, 1)
    assert RunResult.from_dict(OLD_DIVERGED).flops_spent == 92995584.0 / 4
    first = {k: v for k, v in json.loads(OLD).items() if k not in ("branched_from", "branched_at_step", "flops_spent")}
    assert RunResult.from_dict(first) == old, "before runs branched"


WRONG = {
    "loss": [None, math.nan, math.inf, -math.inf, "2.0", True, [2.0], 10**400],
    "status": ["diverged", "done", None, 1],
    "run": [None, 7],
    "steps": [0, -1, 2.5, None, "8", True],
    "flops": [0.0, math.nan, "many"],
    "branched_at_step": [-1, 9, None, 0.5],
    "diverged_at_step": [9, "2"],
    "timing": [[1], {"seconds": "long"}, {"seconds": math.nan}, None],
    "where": ["here", {"device": [1]}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_no_result_is_refused_with_a_remedy(tmp_path, name, value):
    (tmp_path / "result.json").write_text(json.dumps(json.loads(OLD) | {name: value}))
    with pytest.raises(InputError, match=rf"result.json: .*{name}.*; remove it and launch again"):
        read_result(tmp_path)


@pytest.mark.parametrize("name", ["run", "status", "loss", "steps", "tokens", "n_compute", "flops", "corpus"])
def test_a_result_without_a_field_is_refused(name):
    with pytest.raises(InputError, match=f"lacks {name}"):
        RunResult.from_dict({k: v for k, v in json.loads(OLD).items() if k != name})
