"""The order function: a permutation per epoch, the same for ever, whatever the batch."""

import numpy as np
import pytest
from scipy import stats

from models.errors import InputError
from scaling.data.order import batch_windows, window_indices

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 100, 1000, 4097]
GOLDEN_FAILED = (
    "The order of the data changed: runs made before cannot be resumed or compared with runs made after. "
    "Undo the change to scaling/data/order.py."
)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_every_epoch_holds_every_window_once(n, seed):
    epochs = window_indices(n, seed, 0, 4 * n).reshape(4, n)
    assert epochs.dtype == np.int64
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()


def test_golden():
    assert window_indices(1000, 0, 0, 8).tolist() == [496, 148, 153, 23, 408, 450, 35, 178], GOLDEN_FAILED
    assert window_indices(93045, 7, 93040, 8).tolist() == [35091, 61252, 38011, 52498, 56571, 11603, 88696, 2954], (
        GOLDEN_FAILED
    )
    assert window_indices(2**40 + 1, 3, 2**41, 4).tolist() == [
        910751098068,
        466324493484,
        610287063553,
        358033500853,
    ], GOLDEN_FAILED


def test_a_shorter_run_sees_a_prefix_whatever_its_batch():
    stream = window_indices(37, 5, 0, 240)
    for batch_size in (1, 3, 8, 40, 120):
        steps = [batch_windows(37, 5, step, batch_size) for step in range(240 // batch_size)]
        assert (np.concatenate(steps) == stream).all()
    assert (window_indices(37, 5, 101, 50) == stream[101:151]).all()
    assert window_indices(37, 5, 3, 0).shape == (0,)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13])
def test_every_window_is_as_likely_at_every_position(n):
    epochs = 2000
    order = window_indices(n, 11, 0, n * epochs).reshape(epochs, n)
    counts = np.stack([(order == value).sum(axis=0) for value in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert 1e-4 < stats.chi2.sf(chi2, (n - 1) ** 2) < 1 - 1e-4


@pytest.mark.parametrize("n", [3, 5])
def test_every_permutation_of_a_few_windows_is_as_likely(n):
    epochs = 6000
    order = window_indices(n, 4, 0, n * epochs).reshape(epochs, n)
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert counts.size == {3: 6, 5: 120}[n]
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("n", [1000, 1024, 60_000])
def test_position_tells_nothing_about_value(n):
    order = window_indices(n, 2, 0, n)
    table = np.histogram2d(np.arange(n), order, bins=10)[0]
    assert stats.chisquare(table.ravel(), ddof=18).pvalue > 1e-4
    steps = np.diff(order) % n
    assert stats.kstest(steps / n, "uniform").pvalue > 1e-4, "successive windows are related"


def test_epochs_and_seeds_are_unrelated():
    n = 5000
    orders = [window_indices(n, seed, epoch * n, n) for seed in (0, 1, 2, 2**32) for epoch in (0, 1)]
    correlation = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)
    same = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(same) < 12, "two orders share far more places than the one expected by chance"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((0, 0, 0, 1), "n_windows"),
        ((5, -1, 0, 1), "data_seed"),
        ((5, 2**64, 0, 1), "data_seed"),
        ((5, 0, -1, 1), "start"),
    ],
)
def test_bad_input(arguments, field):
    with pytest.raises(InputError, match=field):
        window_indices(*arguments)
