"""Tasks on their way through the engine: the same rows in every batch, lane and mesh; padding counts for nothing."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models.config import ModelConfig
from models.errors import InputError
from models.transformer import next_token_loss
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.data.batches import batch_at, n_valid_windows, train_starts, valid_starts
from scaling.data.draws import below, bits, choose, stream, thresholds, unit
from scaling.data.store import open_store
from scaling.data.task import MOST_VALID_ROWS, UNLIMITED, VALID_ROWS
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.loop import train
from scaling.engine.memory import plan
from scaling.engine.program import program_for
from scaling.engine.sharding import make_mesh
from scaling.engine.swarm import Member, train_swarm
from scaling.execution import Execution
from scaling.objectives import find

T = 40
CONFIG = RunConfig(
    model=ModelConfig(vocab_size=48, d_model=16, n_layers=1, n_heads=2),
    data=DataConfig(source="facts:a=1", tokenizer="symbols", seq_len=T, valid_tokens=64 * T),
    optim=OptimConfig(lr=0.01),
    schedule=ScheduleConfig(warmup_tokens=1_280),
    tokens=50 * 8 * T,
)


def with_data(config=CONFIG, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_draws_are_uniform_and_what_they_were():
    """A number that changes here changes every row of every task: raise the worlds' revision, or put it back."""
    drawn = bits(stream("test", 0), np.arange(20_000), 3)
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "d2a32f580a5c486d"
    assert (bits(stream("test", 0), np.array([7, 19_999]), 3) == drawn[[7, 19_999]]).all()
    assert np.corrcoef(unit(drawn).T)[0, 1:] == pytest.approx([0, 0], abs=0.03)
    for numbers in (below(drawn, 32).ravel(), choose(thresholds(np.ones(32, int)), drawn).ravel()):
        counts = np.bincount(numbers, minlength=32)
        assert ((counts - 1875) ** 2 / 1875).sum() < 62, "chi-square of 31 degrees of freedom, p = 0.001"


def test_a_batch_is_a_function_of_the_step_and_validation_has_rows_of_its_own():
    store, objective = open_store("facts", "symbols"), find("next_token")
    starts = train_starts(CONFIG, store, 3, 4)
    assert (train_starts(CONFIG, store, 5, 1) == starts[2]).all()
    assert len(set(starts.ravel().tolist())) == starts.size
    assert starts.max() < UNLIMITED
    whole = batch_at(store, objective, "train", starts.ravel(), T)["tokens_BU"]
    assert whole.dtype == np.int32
    assert (batch_at(store, objective, "train", starts[1], T)["tokens_BU"] == whole.reshape(4, 8, -1)[1]).all()
    rows = {split: store.rows(split, np.arange(500), T)["tokens_BU"] for split in ("train", "valid")}
    assert not {r.tobytes() for r in rows["train"]} & {r.tobytes() for r in rows["valid"]}
    few = with_data(unique_tokens=5 * T)
    assert len(set(train_starts(few, store, 0, 10).ravel().tolist())) == 5


@pytest.mark.parametrize(
    ("tokens", "rows"), [(0, VALID_ROWS), (T, 1), (5_000 * T + 3, 5_000), (10**9, MOST_VALID_ROWS)]
)
def test_rows_to_validate_on(tokens, rows):
    """More of them begin with fewer of them, so that losses of two sizes differ by sampling alone."""
    store = open_store("facts", "symbols")
    assert n_valid_windows(with_data(valid_tokens=tokens), store) == rows
    assert (valid_starts(with_data(valid_tokens=tokens), store) == np.arange(rows)).all()


def test_a_run_alone_or_in_a_swarm(tmp_path):
    """The same run; and its loss is that of the validation rows, by hand."""
    result = train(CONFIG, tmp_path / "alone")
    assert result.bits_per_byte is None
    assert result.valid_tokens == 64 * T
    assert result.unique_tokens == result.tokens
    others = [CONFIG, dataclasses.replace(CONFIG, seed=1), with_data(seed=1)]
    swarm = train_swarm([Member(c, tmp_path / f"swarm{i}") for i, c in enumerate(others)])
    assert swarm[0].loss == pytest.approx(result.loss, rel=1e-5)
    assert len({r.loss for r in swarm}) == 3
    program = program_for(CONFIG, Execution(), make_mesh())
    _, state = Checkpointer(tmp_path / "alone" / "checkpoints", keep=2).restore(program.abstract_state, pytest.fail)
    tokens_BU = open_store(CONFIG.data.source, "symbols").rows("valid", np.arange(64), T)["tokens_BU"]
    loss_BT, _ = jax.jit(next_token_loss, static_argnums=0)(CONFIG.model, state["params"], tokens_BU)
    assert result.loss == pytest.approx(float(loss_BT.mean()), rel=1e-6)


@pytest.mark.parametrize("name", ["next_token", "answers_only"])
def test_padding_counts_for_nothing(name, tmp_path):
    """Rows of T = 44 hold what those of T = 40 do, and 4 tokens of padding: the same losses, step by step. (40 and 44
    positions are rounded otherwise.) If it fails, padding is trained on, or answers are weighted by the room around.
    """
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(name))
    padded = with_data(config, seq_len=44, valid_tokens=64 * 44)
    padded = dataclasses.replace(padded, tokens=50 * 8 * 44, schedule=ScheduleConfig(warmup_tokens=1_408))
    results = [train(c, tmp_path / str(i)) for i, c in enumerate((config, padded))]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4)
    assert results[1].valid_tokens == results[0].valid_tokens == 64 * 8 * (5 if name == "next_token" else 2)


def test_plan_memory_knows_the_batches_of_a_task():
    result = plan(dataclasses.replace(CONFIG, objective=ObjectiveConfig("answers_only")), Execution(), compiled=True)
    assert result["total_bytes"] > 0


MESH = """
import json, sys
from pathlib import Path
from scaling.config import RunConfig
from scaling.engine.loop import train
from scaling.execution import Execution
config = RunConfig.from_dict(json.loads(sys.argv[1]))
print(train(config, Path("run"), Execution(mesh=sys.argv[2])).loss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2", "fsdp=2,sequence=2"])
def test_on_a_mesh(mesh, tmp_path):
    """Every device is given its own rows of the same batch."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", MESH, json.dumps(CONFIG.to_dict()), mesh]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(train(CONFIG, tmp_path / "alone").loss, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bytes"}, "tokenizer = 'bytes': 'facts:a=1' has 48 symbols of its own; set data.tokenizer to"),
        ({"source": "sotu"}, "'symbols' are those of a task, and 'sotu' is text; take bytes or bpe:VOCAB"),
        ({"source": "facts:eps=2"}, "source: 'facts:eps=2': eps = 2.0: expected a number of 0 to 1"),
        ({"source": "facts:epps=0.1"}, "unknown option 'epps=0.1', did you mean 'eps'"),
        ({"source": "facts:a=x"}, "source: 'facts:a=x': a = 'x': expected a finite number"),
        ({"source": "fact"}, "source: unknown 'fact', did you mean 'facts'"),
        ({"source": "sotu:a=1"}, "source: 'sotu:a=1' is incomplete, or has too much"),
        ({"source": "facts:form=qa", "seq_len": 6}, "a question of facts and its answer take 7 tokens"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(changes, message, tmp_path):
    with pytest.raises(InputError) as error:
        train(with_data(**changes), tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_vocabulary_must_be_the_symbols(tmp_path):
    with pytest.raises(InputError, match=r"model.vocab_size = 256: tokenizer 'symbols' has a vocabulary of 48"):
        train(dataclasses.replace(CONFIG, model=ModelConfig()), tmp_path / "run")
