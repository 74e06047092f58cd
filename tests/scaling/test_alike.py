"""Every projection of a configuration: for every field, in which of them runs may differ and still be alike."""

import pytest

from models.config import ModelConfig
from scaling import alike
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.fields import leaves, value_at
from sweeps.define import configure

PROJECTIONS = {
    "program": alike.same_program,
    "swarm": alike.same_swarm,
    "trunk": alike.same_trunk,
    "rates": alike.same_rates,
    "rate": alike.same_but_horizon_and_rate,
    "speed": alike.same_speed,
    "regime": alike.same_regime,
}
HOOK = "optax:scale_by_adam"
BASE = RunConfig(model=ModelConfig(d_model=48, n_heads=3), optim=OptimConfig(name=HOOK), data=DataConfig(seq_len=64))
ADAPTED = configure(BASE, {"lora.rank": 2, "parent": "abcdefabcdef"})
HOST = "program swarm speed regime"  # what only the host reads: the compiled program takes it as an argument

# Field: (another value, the projections in which runs may differ by it).
MAY_DIFFER = {
    "model.vocab_size": (512, "regime rates"),
    "model.d_model": (96, "regime rates"),
    "model.n_layers": (2, "regime rates"),
    "model.n_heads": (2, "regime rates"),
    "model.n_kv_heads": (1, "regime rates"),
    "model.d_ff": (64, "regime rates"),
    "model.activation": ("gelu", "regime rates"),
    "model.qk_norm": (False, "regime rates"),
    "model.tied": (True, "regime rates"),
    "model.logit_softcap": (30.0, "regime rates"),
    "model.z_loss": (1e-4, "regime rates"),
    "model.rope_theta": (100.0, "regime rates"),
    "model.parametrization": ("mup", "regime rates"),
    "model.base_width": (32, "regime rates"),
    "model.base_depth": (2, "regime rates"),
    "model.base_head_dim": (8, "regime rates"),
    # The corpus lies on the device, so its length is part of the program.
    "data.source": ("tfds:c4", "speed regime rates"),
    "data.tokenizer": ("bpe:512", "speed regime rates"),
    "data.valid_fraction": (0.1, "speed regime rates"),
    "data.seq_len": (128, ""),
    "data.seed": (1, HOST + " rates"),
    "data.repeat": (True, HOST + " rates trunk"),
    "data.unique_tokens": (6400, "program speed regime rates"),
    "data.valid_tokens": (6400, "program speed regime rates"),
    "optim.name": ("adamw", "rates"),
    "optim.lr": (0.5, HOST + " rate"),
    "optim.b1": (0.5, "speed regime rates"),
    "optim.b2": (0.5, "speed regime rates"),
    "optim.eps": (1e-6, "speed regime rates"),
    "optim.weight_decay": (0.5, HOST),
    "optim.clip": (2.0, "speed regime rates"),
    "optim.decay": ("independent", HOST),
    "optim.momentum": (0.5, "speed regime rates"),
    "optim.options": ('{"b1":0.5}', "regime rates"),
    "schedule.name": ("cosine", HOST + " trunk"),
    "schedule.warmup_tokens": (0, HOST),
    "schedule.decay_fraction": (0.5, HOST + " trunk"),
    "schedule.final": (0.5, HOST + " trunk"),
    "tokens": (2_000_000, HOST + " trunk rate"),
    "batch_size": (16, "regime"),
    "seed": (1, HOST + " rates"),
    "dtype": ("bfloat16", "rates"),
    "objective.name": ("answers", "rates"),
    "objective.options": ('{"beta":0.1}', "regime rates"),
    "parent": ("0123456789ab", HOST + " rates"),
    "lora.rank": (4, "rates"),
    "lora.alpha": (16.0, "regime rates"),
    "lora.targets": (("qkv",), "regime rates"),
}


@pytest.mark.parametrize("path", leaves(RunConfig))
def test_what_may_differ(path):
    assert path in MAY_DIFFER, (
        f"{path} is new: say for each projection of scaling/alike.py whether runs that differ in it are still alike. "
        "Does the compiled program read it (program)? May lanes of one program differ in it (swarm)? Do two runs that "
        "differ in it begin with the same steps (trunk)? Are their learning rates equal at every step (rates)? Is one "
        "peak rate chosen for both (rate)? Do their steps take equally long (speed), or at least nearly (regime)? A "
        "wrong yes gives wrong results or a program compiled anew; a wrong no only costs time."
    )
    other, allowed = MAY_DIFFER[path]
    base = ADAPTED if path in ("lora.alpha", "lora.targets") else BASE
    changed = configure(base, {path: other})
    assert value_at(changed, path) != value_at(base, path), "the values must differ, or this tests nothing"
    found = {name for name, of in PROJECTIONS.items() if of(changed) == of(base)}
    assert found == set(allowed.split())


def test_adapters_of_two_parents_share_a_program_and_are_no_swarm():
    """A swarm holds one frozen model for all of its members."""
    other = configure(ADAPTED, {"parent": "0123456789ab"})
    found = {name for name, of in PROJECTIONS.items() if of(other) == of(ADAPTED)}
    assert found == {"program", "speed", "regime", "rates"}


@pytest.mark.parametrize("path", [path for path, (_, allowed) in MAY_DIFFER.items() if "program" in allowed])
def test_runs_of_one_program_are_given_one(path):
    """A worker takes a run for cheap as its program is compiled: then the engine must find that one, not another."""
    from scaling.engine.program import program_for
    from scaling.engine.sharding import make_mesh
    from scaling.execution import Execution

    changed = configure(BASE, {path: MAY_DIFFER[path][0]})
    assert program_for(changed, Execution(), make_mesh()) is program_for(BASE, Execution(), make_mesh())
