"""A planted learning-rate rule is recovered from the losses of a tuning sweep."""

import numpy as np
import pandas as pd
import pytest

from models.errors import InputError
from sweeps.tuning import fit_rule, optimum, tune


def planted(lrs, best_batch=4, p=-0.4, q=-0.3):
    rows = []
    for n in (1e4, 3e4, 9e4):
        for d in (2.5e5, 1e6):
            for batch in (2, 4, 8):
                best = 0.01 * (n / 1e5) ** p * (d / 1e6) ** q
                for lr in lrs:
                    loss = 1.5 + 0.05 * np.log(lr / best) ** 2 + 0.02 * np.log2(batch / best_batch) ** 2
                    row = {"n_compute": n, "tokens": d + batch, "batch_size": batch, "lr": lr, "loss": loss}
                    rows.append(row | {"status": "finished"})
    return pd.DataFrame(rows)


def test_planted_rule_is_recovered():
    rule, found, scatter = fit_rule(planted([0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]))
    assert rule.batch_size == 4
    assert (rule.c, rule.p, rule.q) == pytest.approx((0.01, -0.4, -0.3), rel=1e-3)
    assert scatter < 1e-3
    assert found["inside"].all()


def test_the_batch_is_compared_where_it_was_varied():
    """Further horizons at one batch size say nothing about the others: they must not make it win."""
    frame = planted([0.005, 0.01, 0.02, 0.04, 0.08])
    more = frame[(frame["batch_size"] == 8) & (frame["tokens"] < 5e5)].assign(tokens=5e5)
    rule, _, _ = fit_rule(pd.concat([frame, more]))
    assert rule.batch_size == 4


def test_optima_at_the_edge_are_not_used():
    rule, found, _ = fit_rule(planted([0.01, 0.02, 0.04, 0.08]))
    assert not found["inside"].all()
    assert (rule.c, rule.p, rule.q) == pytest.approx((0.01, -0.4, -0.3), rel=1e-3)
    with pytest.raises(InputError, match="widen the grid"):
        fit_rule(planted([0.1, 0.2, 0.4]))


def test_optimum_of_a_parabola():
    lr = np.array([0.01, 0.02, 0.04, 0.08])
    at, loss, inside = optimum(lr, 2 + 0.3 * np.log(lr / 0.025) ** 2)
    assert (at, loss, inside) == (pytest.approx(0.025), pytest.approx(2.0), True)
    with pytest.raises(InputError, match="at least three"):
        optimum(lr[:2], lr[:2])


def test_tune_prints_a_rule_to_paste():
    assert "PowerRule(c=0.01, p=-0.400, q=-0.300, batch_size=4" in tune(planted([0.005, 0.01, 0.02, 0.04, 0.08])).text


def test_unfinished_runs_are_no_optimum():
    frame = planted([0.005, 0.01, 0.02]).assign(status="diverged")
    with pytest.raises(InputError, match="no finished runs"):
        tune(frame)
