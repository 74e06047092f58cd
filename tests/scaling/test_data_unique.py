"""data.unique_tokens: epochs over a part of the corpus."""

import dataclasses

import numpy as np
import pytest

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import DataConfig, RunConfig, check_fits
from scaling.data.order import window_indices
from scaling.data.store import open_store
from scaling.engine.loop import train
from sweeps.table import planned_row


@pytest.fixture
def limited(corpus):
    """16 windows of 32 tokens, seen five times in steps of 4 windows."""
    data = DataConfig(source=corpus, seq_len=32, valid_fraction=0.1, repeat=True, unique_tokens=16 * 32 + 5)
    model = ModelConfig(d_model=8, n_layers=1, n_heads=2)
    return RunConfig(model=model, data=data, tokens=5 * 16 * 32, batch_size=4)


@pytest.mark.parametrize(("n", "unique"), [(1000, 7), (1000, 64), (64, 64), (5, 1)])
def test_epochs_are_orders_of_the_streams_own_beginning(n, unique):
    epochs = window_indices(n, 3, 0, 5 * unique, n_unique=unique).reshape(5, unique)
    assert (epochs[0] == window_indices(n, 3, 0, unique)).all(), "the first epoch is the unlimited stream"
    assert (np.sort(epochs) == np.sort(epochs[0])).all(), "each epoch holds the same windows, each once"
    if unique > 10:
        assert all((epochs[i] != epochs[0]).any() for i in range(1, 5)), "an epoch repeats the order of the first"
    assert (window_indices(n, 3, unique + 1, 2 * unique, unique) == epochs.ravel()[unique + 1 : 3 * unique + 1]).all()


def test_one_epoch_is_the_unlimited_run_and_more_are_not(limited, tmp_path):
    def loss(name, config):
        return train(config, tmp_path / name)

    free = dataclasses.replace(limited.data, unique_tokens=0)
    once, five = dataclasses.replace(limited, tokens=16 * 32), limited
    assert loss("a", once).loss == loss("b", dataclasses.replace(once, data=free)).loss
    result = loss("c", five)
    assert result.loss != loss("d", dataclasses.replace(five, data=free)).loss
    assert result.unique_tokens == 16 * 32 == planned_row(five)["unique_tokens"]


def test_ids_of_runs_without_it_stay(limited):
    plain = dataclasses.replace(limited, data=dataclasses.replace(limited.data, unique_tokens=0))
    assert "unique_tokens" not in plain.to_dict()["data"]
    assert limited.run_id != plain.run_id
    assert RunConfig.from_dict(limited.to_dict()) == limited


def test_limits_that_cannot_be_are_refused(limited, corpus):
    store = open_store(corpus, "bytes", valid_fraction=0.1)
    check_fits(limited, store)
    for changes, message in (
        ({"repeat": False}, "holds 512 training tokens by data.unique_tokens; train on fewer"),
        ({"unique_tokens": 10**9}, "data.unique_tokens = 1,000,000,000: the corpus"),
    ):
        with pytest.raises(InputError, match=message):
            check_fits(dataclasses.replace(limited, data=dataclasses.replace(limited.data, **changes)), store)
    for bad in (-1, 31, True, 64.0):
        with pytest.raises(InputError, match=r"data\.unique_tokens = .*expected 0"):
            dataclasses.replace(limited, data=dataclasses.replace(limited.data, unique_tokens=bad))
