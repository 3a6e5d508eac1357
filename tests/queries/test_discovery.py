"""Categories: what only one unit has stays hidden but for delta; what many have is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from synthward.engine.accounting import ApproximateEvent, GaussianEvent
from synthward.engine.queries import Units, discover_categories
from synthward.engine.queries.discovery import least_threshold, release_probability
from tests.privacy.stats import FALSE_ALARM
from tests.queries.asking import ListLedger, mechanism


def exact_release(threshold: int, std: float, categories: int) -> float:
    """The same probability from the law of the integer noise, summed over the integers."""
    noise = np.arange(threshold - 1, threshold - 1 + math.ceil(40 * std) + 40)
    mass = stats.norm.sf((noise - 0.5) / std) - stats.norm.sf((noise + 0.5) / std)
    return 1.0 - (1.0 - mass.sum()) ** categories


@pytest.mark.parametrize("categories", [1, 2, 7])
@pytest.mark.parametrize("delta", [0.3, 1e-3, 1e-7])
@pytest.mark.parametrize("std", [0.4, 3.0, 40.0])
def test_the_threshold_is_the_least_that_delta_allows(std, delta, categories):
    threshold = least_threshold(std, delta, categories)
    assert exact_release(threshold, std, categories) <= delta * (1 + 1e-6)
    assert release_probability(threshold, std, categories) <= delta
    assert threshold == 1 or exact_release(threshold - 1, std, categories) > delta * (1 - 1e-6)


def test_the_tail_is_right_far_beyond_what_a_difference_from_one_can_tell():
    assert release_probability(25, 2.0, 4) == pytest.approx(4 * stats.norm.sf(23.5 / 2.0), rel=1e-9)
    assert release_probability(1, 0.01, 2) == 1.0


@pytest.mark.parametrize(("categories", "noise", "threshold"), [(1, 3.0, 20), (3, 3.0, 30), (4, 2.0, 25)])
def test_opendps_thresholded_gaussian_costs_no_more(categories, noise, threshold):
    """Its discrete noise is not rounded, so that its delta lies between ours at this threshold and at the next."""
    import opendp.metrics
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.map_domain(dp.atom_domain(T=str), dp.atom_domain(T=int))
    metric = opendp.metrics.l02inf_distance(dp.absolute_distance(T=float))
    std = noise * math.sqrt(categories)
    made = dp.m.make_gaussian_threshold(space, metric, scale=std, threshold=threshold)
    rho, delta = made.map((categories, math.sqrt(categories), 1))
    assert rho == pytest.approx(1 / (2 * noise**2), rel=1e-9)
    ours = [release_probability(t, std, categories) for t in (threshold, threshold + 1)]
    assert ours[1] < delta < ours[0]


@pytest.mark.parametrize("most", [1, 4])
def test_what_one_unit_alone_has_is_released_as_rarely_as_said(most):
    """20,000 units with categories that nobody else has: so many are released as the exact tail says."""
    units = Units.from_ids(np.repeat(np.arange(20_000), most))
    delta = 0.02
    found = discover_categories(
        mechanism(),
        units,
        np.arange(20_000 * most),
        noise_multiplier=1.5,
        delta=delta,
        max_categories_per_unit=most,
    )
    hit = len({number // most for number in found.counts})
    expected = exact_release(found.threshold, found.noise_std, most)
    assert expected <= delta
    assert stats.binomtest(hit, 20_000, expected).pvalue > FALSE_ALARM
    assert all(count >= found.threshold for count in found.counts.values())


def test_a_unit_counts_in_its_first_categories_only():
    """Unit 0 has a hundred; with a limit of two it is counted in the first two of its rows."""
    from synthward.engine.queries.discovery import _units_by_category

    ids = np.array([0] * 100 + [1, 1, 1])
    values = np.concatenate([np.arange(100)[::-1], [99, 99, 5]])
    held = _units_by_category(Units.from_ids(ids), values, np.ones(103, dtype=bool), 2)
    assert held == {"99": 2, "98": 1, "5": 1}


@pytest.mark.parametrize("kind", ["numbers", "text"])
def test_what_many_units_have_is_found_in_order(kind):
    numbers = np.repeat([10, 9, -3], [200, 300, 500])
    values = numbers if kind == "numbers" else np.array([f"code {n}" for n in numbers])
    found = discover_categories(mechanism(), Units.of_rows(1000), values, noise_multiplier=2.0, delta=1e-6)
    expected = [-3, 9, 10] if kind == "numbers" else ["code -3", "code 10", "code 9"]
    assert list(found.counts) == expected
    assert all(type(name) is type(expected[0]) for name in found.counts)
    exact = dict(zip(expected, [500, 300, 200] if kind == "numbers" else [500, 200, 300], strict=True))
    assert all(abs(found.counts[name] - exact[name]) < 9.5 * 2.0 for name in expected)


def test_missing_values_are_left_out_by_the_mask():
    where = np.arange(400) < 200
    values = np.where(where, 1, 2)
    found = discover_categories(
        mechanism(), Units.of_rows(400), values, noise_multiplier=2.0, delta=1e-6, where=where
    )
    assert list(found.counts) == [1]


def test_both_parts_are_charged_in_one_question():
    ledger = ListLedger()
    found = discover_categories(
        mechanism(ledger=ledger), Units.of_rows(0), np.zeros(0), noise_multiplier=2.0, delta=1e-6
    )
    assert found.counts == {}
    assert ledger.events == [ApproximateEvent(0.0, 1e-6, 1), GaussianEvent(2.0, 1)]
    assert len({note for _, note in ledger.charged}) == 1


def test_composed_the_charge_covers_both_directions():
    """Exact laws of both answers, for neighbours of which one has one category more: no event is likelier than the
    charge allows, at any epsilon, whichever of the two is the true table."""
    std, delta = 2.0, 0.05
    threshold = least_threshold(std, delta, 1)
    hidden = release_probability(threshold, std, 1)
    noise = np.arange(-60, 61)

    def law(count):
        return stats.norm.cdf((noise - count + 0.5) / std) - stats.norm.cdf((noise - count - 0.5) / std)

    # A shared category whose count the unit also moves, by 1 of sqrt(2); the other is the unit's own.
    shared, shared_without = law(1), law(0)
    with_unit = np.concatenate([shared * (1 - hidden), shared * hidden])
    without = np.concatenate([shared_without, np.zeros_like(noise, dtype=float)])
    for epsilon in (0.0, 0.3, 1.0):
        mu = 1 / std
        gaussian = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(
            -mu / 2 - epsilon / mu
        )
        charged = delta + (1 - delta) * gaussian
        for one, other in ((with_unit, without), (without, with_unit)):
            assert np.maximum(one - math.exp(epsilon) * other, 0).sum() <= charged * (1 + 1e-9)
