"""Private selection: its price against the paper's formulas and the library, the number of trials, solving."""

from __future__ import annotations

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from scipy.stats import chisquare, geom, logser, poisson

from synthward.engine.accounting import (
    GaussianEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    calibrate_trial,
    draw_trials,
    epsilon_of,
)
from synthward.engine.accounting.rdp import ORDERS, rdp_curve
from synthward.engine.accounting.selection import gamma_of, probabilities, selection_curve
from synthward.engine.errors import ConfigError

# Calibrated to epsilon 1 at delta 1e-5 by PLD; 1.10 by RDP.
TRIAL = PoissonGaussianEvent(0.01, 1.4146308387124935, 1000)
SHAPES = [0.0, 0.5, 1.0, 3.0, math.inf]


@pytest.mark.parametrize(
    ("mean", "shape", "expected"),
    [(10, 0.0, 1.93), (10, 1.0, 2.31), (10, math.inf, 2.47), (30, 0.0, 2.14), (30, math.inf, 4.74)],
)
def test_the_price_of_tuning(mean, shape, expected):
    assert epsilon_of([TRIAL], 1e-5, "rdp") == pytest.approx(1.105, abs=5e-4)
    assert epsilon_of([SelectionEvent((TRIAL,), mean, shape)], 1e-5, "rdp") == pytest.approx(
        expected, abs=5e-3
    )


def paper_curve(orders, moments, mean, shape):
    """Theorems 2 and 6 of Papernot & Steinke 2022, order by order."""
    found = []
    if shape == math.inf:
        for order, moment in zip(orders, moments, strict=True):
            epsilon = math.log1p(1 / (order - 1))
            deltas = [
                min(
                    math.exp(min(0.0, (a - 1) * (m - epsilon + math.log1p(-1 / a)) - math.log(a))),
                    math.sqrt(-math.expm1(-m)),
                )
                for a, m in zip(orders, moments, strict=True)
            ]
            found.append(moment + mean * min(deltas) + math.log(mean) / (order - 1))
        return found
    gamma = bisected_gamma(mean, shape)
    for order, moment in zip(orders, moments, strict=True):
        own = [
            moment + (1 + shape) * ((1 - 1 / a) * m + math.log(1 / gamma) / a) + math.log(mean) / (order - 1)
            for a, m in zip(orders, moments, strict=True)
        ]
        found.append(min(own))
    return [min(found[i:]) for i in range(len(found))]


def bisected_gamma(mean, shape):
    """gamma of this mean, by definition 1 of the paper and bisection."""
    low, high = 1e-12, 1 - 1e-12
    for _ in range(200):
        gamma = math.sqrt(low * high)
        own = (
            (1 / gamma - 1) / -math.log(gamma)
            if shape == 0
            else shape * (1 - gamma) / (gamma * (1 - gamma**shape))
        )
        low, high = (gamma, high) if own > mean else (low, gamma)
    return low


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [1.5, 10.0, 300.0])
def test_the_curve_is_the_paper_s_and_the_library_s(mean, shape):
    moments = rdp_curve([TRIAL], ORDERS)
    found = rdp_curve([SelectionEvent((TRIAL,), mean, shape)], ORDERS)
    assert np.allclose(found, paper_curve(ORDERS, moments, mean, shape), rtol=1e-8)
    built = rdp.RdpAccountant(orders=ORDERS)
    one = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(TRIAL.noise_multiplier))
    trial = dp_accounting.SelfComposedDpEvent(one, TRIAL.steps)
    built.compose(dp_event.RepeatAndSelectDpEvent(trial, mean, shape))
    assert np.allclose(found, built.rdp, rtol=1e-8)


def test_selection_adds_up_with_what_comes_beside_it():
    selection = SelectionEvent((TRIAL, GaussianEvent(20.0)), 10.0, 0.0)
    both = rdp_curve([selection, selection, GaussianEvent(9.0)], ORDERS)
    inner = rdp_curve([TRIAL, GaussianEvent(20.0)], ORDERS)
    expected = 2 * selection_curve(ORDERS, inner, 10.0, 0.0) + rdp_curve([GaussianEvent(9.0)], ORDERS)
    assert np.allclose(both, expected, rtol=1e-12)
    costs = [epsilon_of([SelectionEvent((TRIAL,), m, 0.0)], 1e-5, "rdp") for m in (1, 2, 10, 100)]
    assert all(a < b for a, b in itertools.pairwise(costs))
    assert costs[0] >= epsilon_of([TRIAL], 1e-5, "rdp")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [1.0, 1.0 + 1e-13, 1.2, 7.0, 45.0])
def test_the_law_adds_up_and_has_its_mean(mean, shape):
    law = np.array(list(itertools.islice(probabilities(mean, shape), 20_000)))
    assert law[:, 1].sum() == pytest.approx(1.0, abs=1e-9)
    assert (law[:, 0] * law[:, 1]).sum() == pytest.approx(mean, rel=1e-6)
    assert law[0, 0] == (0 if shape == math.inf else 1)


def test_known_laws():
    for shape, law in ((1.0, geom(0.1)), (math.inf, poisson(10)), (0.0, logser(1 - gamma_of(10.0, 0.0)))):
        ours = np.array(list(itertools.islice(probabilities(10.0, shape), 60)))
        assert np.allclose(ours[:, 1], law.pmf(ours[:, 0]), rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_follow_the_law(shape):
    """Chi-square over 20,000 draws; a false alarm once in 10^9."""
    rng = np.random.default_rng(8)
    words = iter(rng.integers(0, 2**64, size=20_000, dtype=np.uint64).tolist())
    draws = np.array([draw_trials(6.0, shape, lambda: next(words)) for _ in range(20_000)])
    law = np.array([p for _, p in itertools.islice(probabilities(6.0, shape), 12)])
    first = 0 if shape == math.inf else 1
    counts = np.array([(draws == first + i).sum() for i in range(12)])
    seen = np.append(counts, len(draws) - counts.sum())
    expected = len(draws) * np.append(law, 1.0 - law.sum())
    kept = expected > 5
    seen = np.append(seen[kept], seen[~kept].sum())
    expected = np.append(expected[kept], expected[~kept].sum() + 1e-9)
    assert chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-9


def test_draws_are_from_the_system_and_end():
    assert len({draw_trials(1000.0, 1.0) for _ in range(20)}) > 5
    assert draw_trials(1.0) == 1
    assert draw_trials(10.0, 1.0, lambda: 0) == 1
    assert 300 < draw_trials(10.0, 1.0, lambda: 2**64 - 1) < 10_000
    for mean, shape in (
        (0.5, 0.0),
        (math.nan, 0.0),
        (1e9, 0.0),
        (10.0, -1.0),
        (10.0, math.nan),
        (1e4, math.inf),
    ):
        with pytest.raises(ConfigError):
            draw_trials(mean, shape)


@pytest.mark.parametrize("shape", [0.0, 1.0])
def test_a_trial_s_budget_meets_the_total_from_below(shape):
    beside = [GaussianEvent(20.0)]
    found = calibrate_trial(lambda z: PoissonGaussianEvent(0.01, z, 1000), 2.0, 1e-5, 10.0, shape, beside)
    assert found.events == (PoissonGaussianEvent(0.01, found.noise_multiplier, 1000),)
    assert found.selection == SelectionEvent(found.events, 10.0, shape)
    assert found.epsilon == epsilon_of([*beside, found.selection], 1e-5, "rdp")
    assert 1.999 < found.epsilon <= 2.0
    assert found.trial_epsilon == epsilon_of(found.events, 1e-5, "rdp") < 1.2
    with pytest.raises(ConfigError, match="already spent"):
        calibrate_trial(lambda z: GaussianEvent(z), 2.0, 1e-5, 10.0, shape, [GaussianEvent(1.0)])


def test_a_total_that_does_not_pay_for_the_choice_is_refused():
    with pytest.raises(ConfigError, match="noise multiplier above"):
        calibrate_trial(lambda z: PoissonGaussianEvent(0.01, z, 10), 1e-3, 1e-9, 1000.0)
