"""Intervals and tests against enumeration, tables and simulation."""

import itertools

import numpy as np
import pytest

from hllm.significance import holm, paired, seed_interval, t_quantile, user_interval


def test_quantiles_of_students_t_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    assert [round(t_quantile(freedom), 4) for freedom in table] == list(table.values())


def test_an_interval_over_seeds_by_hand() -> None:
    spread = seed_interval([1.0, 2.0, 3.0])
    assert (spread.mean, spread.sd) == (2.0, 1.0)
    assert spread.high - spread.mean == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert np.isnan(seed_interval([1.0]).low)


def test_the_permutation_test_agrees_with_all_sign_flips() -> None:
    delta = np.array([0.5, -0.25, 1.0, 0.125, 0.75, 0.3, -0.1, 0.0])
    sums = [abs(np.dot(signs, delta)) for signs in itertools.product((-1, 1), repeat=len(delta))]
    exact = np.mean([total >= abs(delta.sum()) - 1e-9 for total in sums])
    assert paired(delta, np.zeros(8), draws=20_000).p == pytest.approx(exact, abs=0.01)


def test_a_bootstrap_interval_is_the_normal_one_for_many_users() -> None:
    values = np.random.default_rng(0).random(2000) < 0.2
    error = np.sqrt(values.var() / 2000)
    expected = (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    assert user_interval(values) == pytest.approx(expected, abs=0.001)


def test_p_values_of_systems_that_do_not_differ_are_uniform() -> None:
    generator = np.random.default_rng(1)
    ps = [paired(*generator.random((2, 40)), draws=200, seed=trial).p for trial in range(200)]
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.1
    assert 0.4 < np.mean(ps) < 0.6


def test_a_difference_in_every_user_is_certain_and_none_is_not() -> None:
    a = np.full(50, 0.5)
    found = paired(a, a - 0.125, draws=500)
    assert (found.a, found.b, found.difference, found.low, found.high) == (0.5, 0.375, 0.125, 0.125, 0.125)
    assert found.p == 1 / 501
    same = paired(a, a)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_users_predictions_are_drawn_and_flipped_as_one() -> None:
    effect = np.random.default_rng(2).normal(0.3, 1, 30)
    several = paired(np.repeat(effect, 20), np.zeros(600), np.repeat(np.arange(30), 20))
    once = paired(effect, np.zeros(30))
    assert several.p == pytest.approx(once.p, abs=0.02)
    assert (several.low, several.high) == pytest.approx((once.low, once.high), abs=0.03)
    assert paired(np.repeat(effect, 20), np.zeros(600)).p < 0.05 < once.p


def test_draws_are_the_same_again() -> None:
    a, b = np.random.default_rng(3).random((2, 60))
    assert paired(a, b, draws=300) == paired(a, b, draws=300)


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_systems_of_other_users_are_no_pair() -> None:
    with pytest.raises(ValueError, match="the same users"):
        paired(np.zeros(3), np.zeros(4))
