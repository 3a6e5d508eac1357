"""Truncated Poisson sampling: what a cap costs, head-room, and that the largest number of units covers all others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from synthward.engine.accounting import (
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    cost_of_cap,
    epsilon_of,
    head_room,
)
from synthward.engine.accounting.head_room import largest_rate, starting_cap
from synthward.engine.accounting.rdp import ORDERS, rdp_curve
from synthward.engine.errors import ConfigError


def cut(rate, noise, steps, cap, units):
    return TruncatedPoissonGaussianEvent(rate, noise, steps, cap, units)


def random_caps(count, seed):
    """(rate, noise, steps, cap, units, delta) with as little room as the accountant takes, or more."""
    rng = np.random.default_rng(seed)
    while count:
        cap = int(np.exp(rng.uniform(0.0, np.log(400.0))))
        rate = float(np.exp(rng.uniform(np.log(2e-3), np.log(0.6))))
        units = int((math.sqrt(cap + 0.25) - 0.5) ** 2 / rate * rng.uniform(0.7, 1.0))
        if units < 3:
            continue
        noise = float(np.exp(rng.uniform(np.log(0.8), np.log(6.0))))
        steps = int(np.exp(rng.uniform(0.0, np.log(200.0))))
        yield rate, noise, steps, cap, units, float(10.0 ** rng.uniform(-8, -3))
        count -= 1


@pytest.mark.slow
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_more_units_never_cost_less(relation):
    """The event is charged at the public upper bound of the number of units, whatever their number is."""
    for rate, noise, steps, cap, units, delta in random_caps(8, 11):
        first = max(1, int((cap - 4.0 * math.sqrt(cap)) / rate))
        counts = sorted({*np.linspace(min(first, units - 1), units, 4).astype(int).tolist(), units - 1})
        found = [epsilon_of([cut(rate, noise, steps, cap, n)], delta, "pld", relation) for n in counts]
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(found)), (
            cap,
            rate,
            noise,
            counts,
            found,
        )


def test_more_units_never_cost_less_by_rdp():
    for rate, noise, steps, cap, units, _ in random_caps(20, 12):
        curves = [rdp_curve([cut(rate, noise, steps, cap, n)], ORDERS[::8]) for n in (1, units // 2, units)]
        assert all((a <= b * (1 + 1e-9)).all() for a, b in itertools.pairwise(curves))


def exact_divergence(rate, noise, cap, units, epsilon):
    """Hockey-stick divergence of one step where the unit's vector is opposite to all others', by quadrature.

    The others hold -1 each, the unit +1, C = 1. Of the drawn others a uniform part is kept; without the unit the sum is
    -min(k, cap); with it, one of the cap that are kept has probability cap / (k + 1) to be the unit.
    """
    k = np.arange(units)
    others = binom.pmf(k, units - 1, rate)
    without, kept = np.minimum(k, cap), np.where(k < cap, 1.0, cap / (k + 1.0))
    x = np.linspace(-cap - 12.0 * noise, 12.0 * noise + 1.0, 20_001)
    away = norm.pdf(x[:, None], -without, noise)
    # A unit that is kept is one more below the cap, and takes another's place at it.
    held = norm.pdf(x[:, None], np.where(k < cap, -k + 1.0, -cap + 2.0), noise)
    removed = away @ others
    present = away @ (others * (1.0 - rate * kept)) + held @ (others * rate * kept)
    gaps = [np.maximum(p - math.exp(epsilon) * q, 0.0) for p, q in ((present, removed), (removed, present))]
    return max(float(gap.sum()) * (x[1] - x[0]) for gap in gaps)


@pytest.mark.parametrize(
    ("rate", "noise", "cap", "units"), [(0.2, 1.0, 6, 16), (0.1, 0.8, 4, 20), (0.5, 2.0, 9, 12)]
)
@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_one_step_is_never_undercharged(rate, noise, cap, units, kind):
    """Against the true divergence for the worst data that is known, at each number of units up to the bound."""
    for delta in (1e-2, 1e-3, 1e-5):
        epsilon = epsilon_of([cut(rate, noise, 1, cap, units)], delta, kind)
        for n in range(2, units + 1):
            assert exact_divergence(rate, noise, cap, n, epsilon) <= delta * (1 + 1e-6)


@pytest.mark.parametrize(("rate", "noise", "units"), [(0.19, 1.0, 2), (0.05, 1.0, 7), (0.05, 2.0, 7)])
def test_a_cap_that_is_not_charged_for_leaks(rate, noise, units):
    """A batch of one: the true divergence is above what the step without a cap is charged, and not above ours."""
    for delta in (1e-3, 1e-5):
        uncut = epsilon_of([PoissonGaussianEvent(rate, noise, 1)], delta)
        assert exact_divergence(rate, noise, 1, units, uncut) > 1.1 * delta
        charged = epsilon_of([cut(rate, noise, 1, 1, units)], delta)
        assert exact_divergence(rate, noise, 1, units, charged) <= delta


@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_a_cap_that_cuts_nothing_costs_nothing(kind):
    plain = epsilon_of([PoissonGaussianEvent(0.1, 1.5, 50)], 1e-5, kind)
    assert epsilon_of([cut(0.1, 1.5, 50, 100, 100)], 1e-5, kind) == pytest.approx(plain, rel=1e-9)
    assert epsilon_of([cut(1.0, 9.0, 50, 100, 100)], 1e-5, kind) > 0.0


def test_a_cap_without_room_is_refused_and_told_what_would_do():
    with pytest.raises(ConfigError, match="at least 601"):
        epsilon_of([cut(0.01, 1.0, 10, 510, 50_000)], 1e-5)
    assert starting_cap(0.01, 50_000) == 601
    assert largest_rate(600, 600) == 1.0
    rate = largest_rate(600, 50_000)
    assert epsilon_of([cut(rate, 8.0, 1, 600, 50_000)], 1e-5) > 0.0
    with pytest.raises(ConfigError, match="max batch size"):
        epsilon_of([cut(rate * 1.001, 8.0, 1, 600, 50_000)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_head_room_costs_below_a_hundredth(kind):
    found = head_room(0.02, 20_000, 1.2, 500, 1e-6, kind)
    assert found.max_batch_size >= 400 + 4.5 * 20
    assert 0.0 <= found.cost < 0.01
    assert found.epsilon == epsilon_of([cut(0.02, 1.2, 500, found.max_batch_size, 20_000)], 1e-6, kind)
    assert found.uncut_epsilon == epsilon_of([PoissonGaussianEvent(0.02, 1.2, 500)], 1e-6, kind)
    assert f"{found.max_batch_size} units" in str(found)


def test_too_little_room_is_dear():
    """PRIVACY: at N = 50,000 and q = 0.01 a cap of 550 costs 2.6 times the epsilon, 600 half a percent."""
    assert cost_of_cap(cut(0.01, 1.0, 1000, 550, 50_000), 1e-5).cost == pytest.approx(1.645, abs=0.01)
    assert cost_of_cap(cut(0.01, 1.0, 1000, 600, 50_000), 1e-5).cost == pytest.approx(0.0053, abs=2e-4)


def test_head_room_of_small_batches_is_the_whole_when_need_be():
    assert head_room(0.5, 8, 3.0, 5, 1e-5).max_batch_size == 8
    with pytest.raises(ConfigError, match="most cost"):
        head_room(0.5, 8, 3.0, 5, 1e-5, most_cost=0.0)
