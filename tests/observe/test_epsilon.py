"""Epsilon so far is never less than what was spent, and not much more."""

from __future__ import annotations

import pytest

from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of
from synthward.observe import EpsilonSoFar

QUERY = GaussianEvent(20.0, 1)
DELTA, STEPS = 1e-6, 1000


def so_far(charged, first=0, target=1e9) -> EpsilonSoFar:
    return EpsilonSoFar(
        charged,
        lambda steps: PoissonGaussianEvent(0.02, 1.0, steps),
        first=first,
        steps=STEPS,
        stretch=50,
        target=target,
        delta=DELTA,
        accountant="rdp",
        relation="add_or_remove_one",
    )


def spent(steps: int) -> float:
    events = [QUERY, PoissonGaussianEvent(0.02, 1.0, steps)] if steps else [QUERY]
    return epsilon_of(events, DELTA, "rdp")


def test_it_is_an_upper_bound():
    shown = so_far([QUERY])
    assert shown(0) == spent(0)
    for step in (1, 7, 50, 51, 99, 100, 640, 999):
        assert spent(step) <= shown(step) <= spent(max(50, round(1.1 * step) + 50)) * (1 + 1e-12)
    assert shown(STEPS) == pytest.approx(spent(STEPS), rel=1e-12)


def test_it_does_not_fall():
    shown = so_far([QUERY])
    values = [shown(step) for step in range(STEPS + 1)]
    assert values == sorted(values)
    assert len(set(values)) < 40, "it is not computed for each step"


def test_a_run_that_goes_on_counts_what_was_charged_before():
    charged = [QUERY, PoissonGaussianEvent(0.02, 1.0, 130)]
    shown = so_far(charged, first=130)
    assert shown(130) == pytest.approx(spent(130), rel=1e-12)
    assert spent(131) <= shown(131) <= spent(200) * (1 + 1e-12)
    assert shown(STEPS) == pytest.approx(spent(STEPS), rel=1e-12)


def test_it_stays_within_the_budget():
    """The ledger refuses a lease beyond it."""
    assert so_far([QUERY], target=1.25)(900) == 1.25 < spent(900)


def test_without_a_charge_nothing_is_spent():
    assert so_far([])(0) == 0.0
