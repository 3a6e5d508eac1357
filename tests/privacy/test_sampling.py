"""Invariant 5, the sampler: every unit by its own coin of probability q, static physical batches, nothing
dropped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tests.privacy.stats import FALSE_ALARM

UNITS, RATE = 500, 0.07


@pytest.fixture(scope="module")
def draws():
    """Membership of each unit in each of 4000 draws, bool [4000, 500], under a fixed key."""
    from synthward.engine import PoissonSampler

    sampler = PoissonSampler(UNITS, RATE, bytes(range(32)))
    membership = np.zeros((4000, UNITS), dtype=bool)
    for step, row in enumerate(membership):
        row[sampler.draw(step)] = True
    return membership


def test_batch_sizes_follow_the_binomial(draws):
    """Fixed-size or shuffled batches have no variance; a chi-square over the binomial's bins sees it."""
    sizes = draws.sum(axis=1)
    edges = stats.binom.ppf(np.linspace(0, 1, 21)[1:-1], UNITS, RATE)
    bins = np.unique(edges)
    observed = np.bincount(np.searchsorted(bins, sizes), minlength=len(bins) + 1)
    upper = np.append(stats.binom.cdf(bins, UNITS, RATE), 1.0)
    expected = np.diff(np.insert(upper, 0, 0.0)) * len(sizes)
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM


def test_every_unit_is_drawn_at_the_rate(draws):
    counts = draws.sum(axis=0)
    statistic = ((counts - 4000 * RATE) ** 2 / (4000 * RATE * (1 - RATE))).sum()
    assert FALSE_ALARM < stats.chi2.sf(statistic, UNITS) < 1 - FALSE_ALARM


def test_units_are_drawn_independently_of_each_other_and_over_steps(draws):
    """Pair co-occurrence and repetition in the next step both have probability q^2."""
    pairs = sum(int((draws[:, i] & draws[:, i + gap]).sum()) for gap in (1, 7) for i in range(0, UNITS - 7))
    trials = 2 * (UNITS - 7) * 4000
    assert abs(pairs - trials * RATE**2) < 6.2 * (trials * RATE**2) ** 0.5 * 1.2
    repeats = int((draws[1:] & draws[:-1]).sum())
    trials = 3999 * UNITS
    assert abs(repeats - trials * RATE**2) < 6.2 * (trials * RATE**2) ** 0.5 * 1.2


def test_a_draw_is_a_function_of_key_and_step():
    from synthward.engine import PoissonSampler

    first = PoissonSampler(UNITS, RATE, b"a" * 32)
    same = PoissonSampler(UNITS, RATE, b"a" * 32)
    other = PoissonSampler(UNITS, RATE, b"b" * 32)
    late = same.draw(9)
    assert np.array_equal(first.draw(9), late)
    assert np.array_equal(first.draw(9), first.draw(9))
    assert not np.array_equal(first.draw(9), first.draw(10))
    assert not np.array_equal(first.draw(9), other.draw(9))


def test_a_draw_is_sorted_unique_and_in_range():
    from synthward.engine import PoissonSampler

    drawn = PoissonSampler(1000, 0.5, b"k" * 32).draw(0)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all() and drawn.min() >= 0 and drawn.max() < 1000


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_rates_that_are_no_probabilities_are_refused(rate):
    from synthward.engine import PoissonSampler
    from synthward.engine.errors import SynthwardError

    with pytest.raises((ValueError, SynthwardError)):
        PoissonSampler(10, rate, b"k" * 32)


def test_the_coin_of_a_unit_does_not_depend_on_the_others():
    """Add/remove: with one unit fewer, the draws of the remaining units stay what they were."""
    from synthward.engine import PoissonSampler

    for step in range(20):
        big = PoissonSampler(1000, 0.1, b"k" * 32).draw(step)
        small = PoissonSampler(999, 0.1, b"k" * 32).draw(step)
        assert np.array_equal(big[big < 999], small)


def test_rate_one_draws_everyone():
    from synthward.engine import PoissonSampler

    assert np.array_equal(PoissonSampler(300, 1.0, b"k" * 32).draw(4), np.arange(300))


def test_tiny_rates_are_not_rounded_up():
    """A rate of 2^-60 is below what fp32 coins can show (they would stop at 2^-24): nobody in 2e7 draws."""
    from synthward.engine import PoissonSampler

    sampler = PoissonSampler(1_000_000, 2.0**-60, b"k" * 32)
    assert sum(len(sampler.draw(step)) for step in range(20)) == 0


@pytest.mark.parametrize(("count", "size"), list(itertools.product([0, 1, 7, 8, 9, 24], [1, 8])))
def test_physical_batches_are_static_and_complete(count, size):
    from synthward.engine.sampling import physical_batches

    indices = np.arange(100, 100 + count)
    batches = physical_batches(indices, size)
    assert batches, "an empty draw is one batch of masked rows, not no batch"
    assert all(len(batch) == size for batch in batches)
    real = np.concatenate(batches)
    assert np.array_equal(np.sort(real[real >= 0]), indices)
    assert set(real[real < 0].tolist()) <= {-1}
    assert len(batches) == max(1, -(-count // size))
