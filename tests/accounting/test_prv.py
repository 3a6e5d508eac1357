"""The PLD accountant against an independent algorithm with proven bounds on both sides (Gopi et al. 2021)."""

from __future__ import annotations

import numpy as np
import pytest

from synthward.engine.accounting import (
    ApproximateEvent,
    CyclicPoissonGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    epsilon_of,
)
from synthward.engine.accounting.prv import prv_bounds
from synthward.engine.errors import ConfigError


def random_settings(count, seed):
    """Sampled Gaussians of an epsilon below 10, small enough to be quick: (event, delta)."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        rate = float(np.exp(rng.uniform(np.log(2e-3), np.log(0.5))))
        noise = float(np.exp(rng.uniform(0.0, np.log(8.0))))
        steps = int(np.exp(rng.uniform(0.0, np.log(200.0))))
        event, delta = PoissonGaussianEvent(rate, noise, steps), float(10.0 ** rng.uniform(-8, -4))
        if epsilon_of([event], delta) < 10.0:
            found.append((event, delta))
    return found


@pytest.mark.slow
def test_inside_the_proven_bounds_on_a_hundred_settings():
    widths = []
    for event, delta in random_settings(100, 20261123):
        low, _, high = prv_bounds([event], delta)
        assert low <= epsilon_of([event], delta) <= high, (event, delta)
        widths.append(high - low)
    assert 0.015 < np.mean(widths) < 0.03, "the bounds are about 0.01 to either side"


def test_rdp_is_never_below_pld():
    for event, delta in random_settings(20, 7):
        assert epsilon_of([event], delta) <= epsilon_of([event], delta, "rdp") * (1.0 + 1e-6)


def test_bounds_of_compositions():
    """Queries, cyclic rounds and steps together."""
    events = [GaussianEvent(8.0, 2), PoissonGaussianEvent(0.05, 1.5, 100)]
    low, _, high = prv_bounds(events, 1e-6)
    assert low <= epsilon_of(events, 1e-6) <= high == epsilon_of(events, 1e-6, "prv")
    cyclic = [CyclicPoissonGaussianEvent(0.05, 1.5, 4, 401)]
    assert epsilon_of(cyclic, 1e-6, "prv") == epsilon_of([PoissonGaussianEvent(0.05, 1.5, 101)], 1e-6, "prv")


@pytest.mark.parametrize(
    "event",
    [LaplaceEvent(5.0), ApproximateEvent(0.1, 1e-9), TruncatedPoissonGaussianEvent(0.1, 2.0, 5, 40, 100)],
    ids=lambda event: event.kind,
)
def test_other_kinds_are_refused_by_name(event):
    with pytest.raises(ConfigError, match=f"prv.*{event.kind}"):
        epsilon_of([event], 1e-6, "prv")


def test_other_relations_and_settings_out_of_reach_are_refused():
    with pytest.raises(ConfigError, match=r"prv.*replace_one"):
        epsilon_of([GaussianEvent(2.0)], 1e-6, "prv", "replace_one")
    with pytest.raises(ConfigError, match=r"prv.*can not answer here"):
        epsilon_of([PoissonGaussianEvent(0.5, 0.2, 1000)], 1e-6, "prv")
