"""Bounds on an attacker: against closed forms, and never below what an attacker can do."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of
from synthward.report.documents import Guarantee, Unit
from synthward.report.meaning import group_guarantee, interpret, true_positive_rate
from synthward.report.numbers import exact, percent_up, round_up

UNIT = Unit(column=None)


def guarantee(
    epsilon: float, delta: float, relation: str = "add_or_remove_one", accountant: str = "pld"
) -> Guarantee:
    return Guarantee(epsilon=epsilon, delta=delta, unit=UNIT, relation=relation, accountant=accountant)


@pytest.mark.parametrize("noise", [0.35, 1.0, 3.0])
def test_true_positive_rates_of_a_gaussian_are_bounded_closely(noise):
    """The strongest test of a Gaussian mechanism is known: power Phi(Phi^-1(rate) + 1 / noise)."""
    event = GaussianEvent(noise)
    found = interpret(guarantee(epsilon_of([event], 1e-6, "pld"), 1e-6), [event])
    for rate in found.rates:
        power = norm.cdf(norm.ppf(rate.false_positive_rate) + 1.0 / noise)
        assert power <= rate.true_positive_rate <= 1.1 * power


def test_a_curve_bounds_better_than_one_pair_and_an_accountant_without_one_still_bounds():
    events = [PoissonGaussianEvent(0.05, 1.0, 200)]
    pair = guarantee(epsilon_of(events, 1e-6, "pld"), 1e-6)
    alone, curve = interpret(pair), interpret(pair, events)
    for one, more in zip(alone.rates, curve.rates, strict=True):
        assert more.true_positive_rate < one.true_positive_rate
    assert alone.correct_guess == curve.correct_guess


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-9), (1.0, 1e-6), (8.0, 1e-5), (20.0, 0.5)])
def test_rates_are_rates_and_follow_the_definition(epsilon, delta):
    for rate in (0.0, 0.001, 0.1, 0.5, 1.0):
        found = true_positive_rate(rate, epsilon, delta)
        assert rate <= found <= 1.0
        # (epsilon, delta) for the test's outcome and for its opposite.
        assert found <= math.exp(epsilon) * rate + delta + 1e-12
        assert 1.0 - rate <= math.exp(epsilon) * (1.0 - found) + delta + 1e-6 or found == rate
    found = interpret(guarantee(epsilon, delta))
    assert 0.5 <= found.correct_guess <= 1.0
    assert interpret(guarantee(900.0, delta)).rates[0].true_positive_rate == 1.0


def test_pure_privacy_of_epsilon_one():
    found = interpret(guarantee(1.0, 1e-15))
    assert found.likelihood_ratio == math.e
    assert found.correct_guess == pytest.approx(math.e / (1 + math.e), rel=1e-12)
    rates = {rate.false_positive_rate: rate.true_positive_rate for rate in found.rates}
    assert rates[0.01] == pytest.approx(0.01 * math.e, rel=1e-9)


def test_two_units_together():
    pair = group_guarantee(guarantee(1.0, 1e-6), 2)
    assert pair is not None and pair.epsilon == 2.0
    assert pair.delta == pytest.approx(1e-6 * (1 + math.e), rel=1e-12)
    assert group_guarantee(guarantee(30.0, 1e-6), 2) is None
    # A Gaussian mechanism on two units has half the noise multiplier: the bound must cover it.
    one = guarantee(epsilon_of([GaussianEvent(2.0)], 1e-6, "pld"), 1e-6)
    both = group_guarantee(one, 2)
    assert both is not None
    assert epsilon_of([GaussianEvent(1.0)], both.delta, "pld") <= both.epsilon


def test_numbers_in_words_never_promise_more():
    assert percent_up(0.95257) == "95.3 %" and percent_up(0.5) == "50.0 %" and percent_up(1.2) == "100.0 %"
    assert round_up(20.0855) == "20.1" and round_up(1.0) == "1" and round_up(0.0) == "0"
    assert float(exact(1 / 3)) == 1 / 3 and exact(0.25) == "0.25"
