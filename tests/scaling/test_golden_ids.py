"""Ids are for ever: those of a dozen configurations, and of one with each field that was added since, made in 2026."""

import pytest

from models.config import LoraConfig, ModelConfig
from scaling.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, ScheduleConfig
from scaling.fields import fields_of, part_of

GOLDEN = {
    "default": (RunConfig(), "89cc13872255"),
    "small": (
        RunConfig(model=ModelConfig(d_model=48, n_heads=3, n_layers=2), tokens=123_456, optim=OptimConfig(lr=0.0123)),
        "8200feb88bcc",
    ),
    "grouped": (
        RunConfig(model=ModelConfig(n_heads=8, n_kv_heads=2, d_ff=200, activation="gelu"), batch_size=16),
        "bc123cd2db5f",
    ),
    "tied": (
        RunConfig(
            model=ModelConfig(
                tied=True, logit_softcap=30.0, z_loss=1e-4, qk_norm=False, activation="relu2", rope_theta=500.0
            )
        ),
        "41c4c52a88fb",
    ),
    "bf16": (RunConfig(dtype="bfloat16", seed=7), "293e681229a1"),
    "bpe": (
        RunConfig(
            model=ModelConfig(vocab_size=1024),
            data=DataConfig(
                source="text:corpus/*.txt", tokenizer="bpe:1024", seq_len=256, valid_fraction=0.1, seed=3, repeat=True
            ),
        ),
        "cf679cd319d1",
    ),
    "cosine": (RunConfig(schedule=ScheduleConfig(name="cosine", warmup_tokens=0, final=0.1)), "13d1662dd370"),
    "constant": (RunConfig(schedule=ScheduleConfig(name="constant", decay_fraction=0.0)), "9d0a8d1fed93"),
    "muon": (RunConfig(optim=OptimConfig(name="muon", lr=0.02, b1=0.8, weight_decay=0.0)), "d4732f1ecca2"),
    "lion": (RunConfig(optim=OptimConfig(name="lion", eps=1, clip=0)), "9515febdf107"),
    "adafactor": (RunConfig(optim=OptimConfig(name="adafactor", b2=0.99)), "de1947f639f0"),
    "hook": (RunConfig(optim=OptimConfig(name="optax:scale_by_adam")), "0b4f77d82986"),
    "wholefloat": (RunConfig(optim=OptimConfig(clip=1, weight_decay=1)), "04d00c24f4c7"),
    "model.parametrization=mup": (RunConfig(model=ModelConfig(parametrization="mup")), "e3fd7cc590ed"),
    "model.parametrization=completep": (
        RunConfig(model=ModelConfig(parametrization="completep", n_layers=8)),
        "07d30f2ef015",
    ),
    "model.base_width": (RunConfig(model=ModelConfig(base_width=32)), "74b0f64996e5"),
    "model.base_depth": (RunConfig(model=ModelConfig(base_depth=2)), "5f12c8a1a39b"),
    "model.base_head_dim": (RunConfig(model=ModelConfig(base_head_dim=8)), "dc72ea6c4036"),
    "optim.decay": (RunConfig(optim=OptimConfig(decay="independent")), "c2ec56194a97"),
    "optim.momentum": (RunConfig(optim=OptimConfig(momentum=0.9)), "098801f5ae48"),
    "optim.options": (
        RunConfig(optim=OptimConfig(name="optax:scale_by_adam", options='{"b2": 0.9, "b1": 0.8}')),
        "6e47339e5610",
    ),
    "data.unique_tokens": (RunConfig(data=DataConfig(unique_tokens=4096)), "7454f389be55"),
    "data.valid_tokens": (RunConfig(data=DataConfig(valid_tokens=8192)), "8e096182384d"),
    "objective.name": (RunConfig(objective=ObjectiveConfig(name="answers")), "e0bc2f014112"),
    "parent": (RunConfig(parent="89cc13872255"), "d4ccd3734ef8"),
    "lora.rank": (RunConfig(lora=LoraConfig(rank=4)), "abf76cc3c6bc"),
    "lora.alpha": (RunConfig(lora=LoraConfig(rank=4, alpha=16)), "6832401e0aa5"),
    "lora.targets": (RunConfig(lora=LoraConfig(rank=4, targets=("up", "qkv"))), "54c99982c0f4"),
    "objective.options": (
        RunConfig(objective=ObjectiveConfig(name="answers", options='{"b": 1,  "a": 2}')),
        "fe88d3c70736",
    ),
    "every_added": (
        RunConfig(
            model=ModelConfig(parametrization="mup", base_width=32, base_depth=2, base_head_dim=8),
            data=DataConfig(unique_tokens=4096),
            optim=OptimConfig(name="optax:scale_by_adam", decay="independent", momentum=0.9, options='{"b1":0.8}'),
        ),
        "4b15a09987aa",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_for_ever(name):
    """If this fails, finished runs of earlier versions are no longer found: a new field must be marked as added."""
    config, run_id = GOLDEN[name]
    assert config.run_id == run_id
    assert RunConfig.from_dict(config.to_dict()) == config


def added(kind=RunConfig, path="", inherited=False):
    """The paths of the fields that are added, or lie in a part that is."""
    found = set()
    for name, (f, inner) in fields_of(kind).items():
        here, is_added = f"{path}{name}", inherited or "added" in f.metadata
        if part := part_of(inner):
            found |= added(part, here + ".", is_added)
        elif is_added:
            found.add(here)
    return found


def test_every_added_field_is_among_them():
    assert added() <= {name.partition("=")[0] for name in GOLDEN}


@pytest.mark.parametrize("path", sorted(added()))
def test_an_added_field_is_absent_while_it_holds_its_default(path):
    """An old config.json, which lacks it, is read; the id of a run that sets it is another."""

    def keys(values, before=""):
        inner = (keys(v, f"{before}{k}.") for k, v in values.items() if isinstance(v, dict))
        return {before + k for k in values}.union(*inner)

    assert path not in keys(RunConfig().to_dict())
    changed = GOLDEN[next(name for name in GOLDEN if name.partition("=")[0] == path)][0]
    assert path in keys(changed.to_dict())
    assert changed.run_id != RunConfig().run_id
