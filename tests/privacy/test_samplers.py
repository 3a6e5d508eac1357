"""Samplers with a cap and with groups, and the events that plans give for them: what is accounted is what is run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from synthward.engine import PoissonSampler, PrivacyPlan
from synthward.engine.accounting.events import (
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import ConfigError
from synthward.engine.sampling import CyclicPoissonSampler, TruncatedPoissonSampler, physical_batches
from tests.privacy.stats import FALSE_ALARM

KEY = bytes(range(32))
BANDED = Strategy("banded", (0.8, 0.6))
BLT = Strategy("blt", (0.2,), (0.9,))


def plan(**changes):
    fields = {
        "sample_rate": 0.1,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "steps": 12,
        "expected_batch_size": 8.0,
    }
    return PrivacyPlan(**(fields | changes))


# Cap on a draw


def capped(units=400, rate=0.1, cap=40, key=KEY):
    return TruncatedPoissonSampler(units, rate, key, max_batch_size=cap, max_units=units)


def test_a_cut_draw_is_a_part_of_the_poisson_draw_and_never_larger_than_the_cap():
    whole, cut = PoissonSampler(400, 0.1, KEY), capped()
    sizes = []
    for step in range(300):
        drawn, kept = whole.draw(step), cut.draw(step)
        assert len(kept) == min(len(drawn), 40)
        assert np.isin(kept, drawn).all() and (np.diff(kept) > 0).all()
        sizes.append(len(drawn))
    assert max(sizes) > 40 > min(sizes), "both cases were there"


def test_who_is_cut_is_chosen_at_random():
    """At rate 1 every draw is cut to a fifth: each unit is kept equally often, and pairs are independent of place."""
    draws = 2000
    kept = np.zeros((draws, 50))
    sampler = capped(units=50, rate=1.0, cap=10)
    for step in range(draws):
        kept[step, sampler.draw(step)] = 1.0
    counts = kept.sum(0)
    # Without replacement the counts vary a little less than independent ones: 1 - 10/50, over N - 1.
    statistic = ((counts - draws / 5) ** 2 / (draws / 5 * 0.8)).sum() * 49 / 50
    assert stats.chi2.sf(statistic, 49) > FALSE_ALARM
    neighbours = (kept[:, :-1] * kept[:, 1:]).mean()
    expected = 10 * 9 / (50 * 49)
    assert abs(neighbours - expected) < 6.11 * (expected / (draws * 49)) ** 0.5 * 1.5


def test_more_units_than_declared_are_refused():
    with pytest.raises(ConfigError, match="max_units"):
        TruncatedPoissonSampler(401, 0.1, KEY, max_batch_size=40, max_units=400)


def test_with_a_cap_every_step_has_the_same_number_of_physical_batches():
    sampler = capped()
    for step in range(50):
        batches = physical_batches(sampler.draw(step), 16, at_least=3)
        assert len(batches) == 3 and all(len(b) == 16 for b in batches)


# Groups that take turns


@pytest.mark.parametrize("period", [1, 2, 7, 30])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_no_unit_comes_back_within_the_period(period, rate):
    """Min-separation, which the sensitivity of correlated noise rests on."""
    sampler = CyclicPoissonSampler(300, rate, KEY, period=period)
    last = np.full(300, -(10**9))
    for step in range(4 * period + 3):
        drawn = sampler.draw(step)
        assert (step - last[drawn] >= period).all()
        last[drawn] = step
    assert (last >= 0).any()


def test_groups_are_even_and_a_unit_s_group_is_its_own():
    big, small = (CyclicPoissonSampler(n, 1.0, KEY, period=5) for n in (5000, 4999))
    sizes = []
    for step in range(5):
        first, second = big.draw(step), small.draw(step)
        assert np.array_equal(first[first < 4999], second), "one more unit moves no other"
        sizes.append(len(first))
    assert sum(sizes) == 5000
    assert stats.chisquare(sizes).pvalue > FALSE_ALARM


def test_units_of_a_group_are_drawn_at_the_rate_and_independently():
    sampler = CyclicPoissonSampler(2000, 0.25, KEY, period=4)
    groups = [CyclicPoissonSampler(2000, 1.0, KEY, period=4).draw(g) for g in range(4)]
    drawn = np.zeros((400, 2000))
    for step in range(400):
        found = sampler.draw(step)
        assert np.isin(found, groups[step % 4]).all()
        drawn[step, found] = 1.0
    share = sum(drawn[g::4][:, groups[g]].sum() for g in range(4)) / (100 * 2000)
    assert abs(share - 0.25) < 6.11 * (0.25 * 0.75 / 200_000) ** 0.5
    both = np.mean([(drawn[g::4][:, groups[g][0]] * drawn[g::4][:, groups[g][1]]).mean() for g in range(4)])
    assert both < 0.25, "coins of two units differ"


def test_two_keys_make_other_groups():
    first, second = (CyclicPoissonSampler(1000, 1.0, k * 32, period=2).draw(0) for k in (b"a", b"b"))
    assert not np.array_equal(first, second)


# Plans


def test_sampler_and_event_of_a_plan_are_of_one_kind():
    found = [
        plan(),
        plan(max_batch_size=90, max_units=500),
        plan(period=4),
        plan(period=4, strategy=BANDED),
        plan(period=4, strategy=BANDED, sample_rate=1.0),
        plan(period=4, strategy=BLT, sample_rate=1.0),
        plan(period=4, strategy=BLT, sample_rate=0.5),
        plan(period=1, strategy=BANDED),
    ]
    kinds = [(type(p.event()), type(p.sampler(100, KEY))) for p in found]
    correlated = CorrelatedGaussianEvent
    assert kinds == [
        (PoissonGaussianEvent, PoissonSampler),
        (TruncatedPoissonGaussianEvent, TruncatedPoissonSampler),
        (CyclicPoissonGaussianEvent, CyclicPoissonSampler),
        (CyclicPoissonGaussianEvent, CyclicPoissonSampler),
        (correlated, CyclicPoissonSampler),
        (correlated, CyclicPoissonSampler),
        (correlated, CyclicPoissonSampler),
        (correlated, PoissonSampler),
    ]
    for p in found:
        event, sampler = p.event(5), p.sampler(100, KEY)
        assert event.steps == 5 and p.event().steps == p.steps
        assert getattr(event, "sample_rate", sampler.sample_rate) == sampler.sample_rate == p.sample_rate
        assert getattr(event, "period", 1) == sampler.period == p.period


def test_amplification_is_not_claimed_for_bands_that_reach_over_the_period():
    three = Strategy("banded", (0.8, 0.5, 0.33))
    assert isinstance(plan(period=2, strategy=three).event(), CorrelatedGaussianEvent)
    assert isinstance(plan(period=3, strategy=three).event(), CyclicPoissonGaussianEvent)


def test_columns_longer_than_one_cost_noise():
    """The multiplier that is accounted is over the sensitivity, whatever the scale of the strategy."""
    long = Strategy("banded", (1.6, 1.2))
    assert plan(period=4, strategy=BANDED).event().noise_multiplier == pytest.approx(1.0, rel=1e-12)
    assert plan(period=4, strategy=long).event().noise_multiplier == pytest.approx(0.5, rel=1e-12)
    assert plan(period=4, strategy=long).event().noise_multiplier <= 0.5


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_batch_size": 10}, "max_units"),
        ({"max_units": 10}, "max_batch_size"),
        ({"max_batch_size": 10, "max_units": 100, "period": 2}, "period"),
        ({"max_batch_size": 10, "max_units": 100, "strategy": BANDED}, "strategy"),
        ({"period": 0}, "period"),
        ({"period": True}, "period"),
        ({"arithmetic": "exact"}, "arithmetic"),
        ({"arithmetic": "discrete", "strategy": BANDED}, "discrete"),
        ({"arithmetic": "discrete", "clipping": "adaptive"}, "adaptive"),
        ({"strategy": BANDED, "clipping": "adaptive"}, "adaptive"),
        ({"strategy": "banded"}, "strategy"),
    ],
)
def test_what_is_no_mechanism_is_refused_in_one_line(changes, word):
    with pytest.raises(ConfigError, match=word) as caught:
        plan(**changes)
    assert "\n" not in str(caught.value)


def test_every_pair_of_kinds_differs():
    events = [plan().event(), plan(period=4).event(), plan(period=4, strategy=BLT).event()]
    for first, second in itertools.combinations(events, 2):
        assert first != second
