"""Rules are applied to configurations; published ones know their range."""

import dataclasses
import json
import warnings

import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, RunConfig
from sweeps.hyperparameters import PUBLISHED, OutOfRange, PowerRule, load_rule, published_rule, rule_of

GRID = {
    "rule": "grid",
    "c": 0.01,
    "p": -0.4,
    "q": -0.3,
    "b": 800.0,
    "r": 0.5,
    "n_range": [1e4, 9e4],
    "d_range": [1e6, 4e6],
}
BAD = json.dumps(GRID | {"c": "much"})


def test_a_fitted_rule_sets_learning_rate_and_batch_of_a_run():
    config = RunConfig(data=DataConfig(seq_len=50), tokens=4_000_000)
    rule = rule_of(GRID)
    assert rule(config).batch_size == 32
    assert rule(config).optim.lr == pytest.approx(rule.lr(config.counts.n_compute, 4e6))


@pytest.mark.parametrize("content", [None, "{}", '{"rule": "grid"}', '{"rule": "no"}', '["power"]', BAD])
def test_what_is_no_rule_says_how_to_make_one(tmp_path, content):
    path = tmp_path / "rule.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="scaling tune"):
        load_rule(path)


LARGE = RunConfig(
    model=ModelConfig(vocab_size=32_768, d_model=768, n_layers=12, n_heads=12),
    data=DataConfig(seq_len=2048),
    tokens=2_000_000_000,
)


def test_published_rules_by_hand():
    """Closed forms at N = 108M (Porian) and at a model of 85M without embeddings (Step Law)."""
    rule = published_rule("porian")
    assert (rule.lr(108e6, 0), rule.batch_tokens(108e6, 0)) == pytest.approx((0.0047, 160 * 2048))
    made = published_rule("step-law")(LARGE)
    n = LARGE.counts.n_nonembedding
    assert made.optim.lr == pytest.approx(1.79 * n**-0.713 * 2e9**0.307, rel=5e-3)
    assert made.batch_size == round(0.58 * 2e9**0.571 / 2048)
    assert made.schedule.warmup_tokens == 2e8  # 2,000 steps would be more than a tenth of D
    large = dataclasses.replace(LARGE, tokens=10_000_000_000)
    assert published_rule("deepseek")(large).optim.lr == pytest.approx(
        0.3118 * (large.flops * 0.75) ** -0.125, rel=0.05
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_outside_its_range_a_rule_warns_once_in_one_line(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for tokens in (1_000_000, 2_000_000):
            PUBLISHED[name](RunConfig(tokens=tokens))
    assert len(caught) == 1
    assert caught[0].category is OutOfRange
    assert "outside the range it was fitted on" in str(caught[0].message)
    assert "\n" not in str(caught[0].message)


def test_a_rule_of_our_own_may_be_used_above_its_sizes_but_not_anywhere():
    rule = PowerRule(c=0.003, p=-0.4, q=-0.6, batch_size=2, n_range=(1e4, 1e5), d_range=(2.5e5, 2e6))
    rule(RunConfig(tokens=4_000_000))  # warnings are errors here
    with pytest.warns(OutOfRange):
        rule(RunConfig(tokens=400_000_000, data=DataConfig(repeat=True)))


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(InputError, match="step-law"):
        published_rule("steplaw")
