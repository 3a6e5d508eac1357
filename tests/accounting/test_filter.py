"""The adaptive filter: the choice among orders is paid, a release over the target is refused, whoever chooses."""

from __future__ import annotations

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from scipy.stats import norm

from synthward.engine.accounting import (
    ApproximateEvent,
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    FixedSizeGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    RdpFilter,
    TruncatedPoissonGaussianEvent,
    epsilon_of,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import ConfigError

PLANNED = [GaussianEvent(20.0), PoissonGaussianEvent(0.01, 1.0, 1000)]
DELTA = 1e-6


def converted(order, moment, delta):
    """RDP to epsilon at one order (Canonne, Kamath & Steinke 2020)."""
    return max(0.0, moment + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def test_epsilon_is_the_least_over_orders_each_at_its_share_of_delta():
    found = RdpFilter(1e-5, (2.0, 8.0, 20.0), (0.2, 0.5, 0.3), 1e-6)
    events = [GaussianEvent(4.0, 2), PoissonGaussianEvent(0.1, 2.0, 30)]
    built = rdp.RdpAccountant(orders=[2.0, 8.0, 20.0])
    built.compose(dp_accounting.GaussianDpEvent(4.0), 2)
    built.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(2.0)), 30)
    expected = min(
        converted(order, moment, 9e-6 * weight)
        for order, moment, weight in zip(found.orders, built.rdp, found.weights, strict=True)
    )
    assert found.epsilon(events) == pytest.approx(expected, rel=1e-12)


def test_never_below_the_best_single_order():
    """What one order alone, chosen after the fact, would claim at the whole delta; and near it where planned."""
    filtered = RdpFilter.planned(PLANNED, DELTA)
    rng = np.random.default_rng(3)
    for _ in range(40):
        events = [
            PoissonGaussianEvent(
                float(rng.uniform(0.001, 0.2)), float(rng.uniform(0.8, 5)), int(rng.integers(1, 500))
            ),
            GaussianEvent(float(rng.uniform(2, 30)), int(rng.integers(1, 4))),
        ]
        assert filtered.epsilon(events) >= epsilon_of(events, DELTA, "rdp")
    planned = epsilon_of(PLANNED, DELTA, "rdp")
    assert planned < filtered.epsilon(PLANNED) < 1.03 * planned
    assert filtered.epsilon(PLANNED) > epsilon_of(PLANNED, DELTA, "pld")


@pytest.mark.parametrize("seed", range(2))
def test_an_adversary_who_chooses_each_step_is_stopped_within_the_target(seed):
    """Rates and noise are chosen from what was spent, to spend all; some order then is within its own budget."""
    rng = np.random.default_rng(seed)
    target = 2.0
    filtered = RdpFilter.planned(PLANNED, DELTA)
    spent, refused = [], 0
    while refused < 8:
        room = 1.0 - filtered.epsilon(spent) / target
        noise = float(rng.uniform(0.7, 1.5) / max(room, 0.05))
        event = PoissonGaussianEvent(float(rng.choice([0.01, 0.1, 1.0])), noise, int(rng.integers(1, 60)))
        if filtered.allows([*spent, event], target):
            spent.append(event)
        else:
            refused += 1
    assert 0.6 * target < filtered.epsilon(spent) <= target
    assert epsilon_of(spent, DELTA, "rdp") <= target
    assert not filtered.allows([*spent, GaussianEvent(0.2)], target)


def test_adaptive_gaussians_keep_delta():
    """A simulated adversary: after a release that looks like the neighbour, it asks with less noise, else with more.

    All releases are Gaussian with shift 1 under the neighbour, so that the privacy loss is known exactly; the share of
    runs whose loss is above epsilon bounds delta from above. Here the target is small and delta large, to be seen.
    """
    delta, target = 0.05, 1.0
    filtered = RdpFilter.planned([GaussianEvent(3.0)], delta)
    rng = np.random.default_rng(5)
    menu = (4.0, 6.0, 12.0)
    costs: dict[tuple[int, ...], bool] = {}

    def allowed(counts):
        if counts not in costs:
            events = [GaussianEvent(noise, n) for noise, n in zip(menu, counts, strict=True)]
            costs[counts] = filtered.allows(events, target)
        return costs[counts]

    def run():
        counts, loss = (0, 0, 0), 0.0
        while True:
            which = 0 if loss > 0.4 else 1 if loss > 0.0 else 2
            asked = tuple(n + (i == which) for i, n in enumerate(counts))
            if not allowed(asked):
                return loss
            counts, noise = asked, menu[which]
            seen = 1.0 + noise * rng.standard_normal()
            loss += (seen - 0.5) / noise**2

    losses = np.array([run() for _ in range(4000)])
    excess = np.maximum(0.0, 1.0 - np.exp(target - losses)).mean()
    # Five standard errors: no term is above 1.
    assert excess < delta + norm.isf(3e-7) * math.sqrt(delta / len(losses))
    assert (losses > 0.5 * target).mean() > 0.05, "the adversary gets somewhere"


def test_deltas_are_paid_from_the_reserve_and_nothing_else():
    filtered = RdpFilter.planned([*PLANNED, ApproximateEvent(0.1, 1e-7, 4)], DELTA)
    assert 4e-7 < filtered.reserved_delta < 4.1e-7
    inside = [GaussianEvent(5.0), ApproximateEvent(0.1, 1e-7, 4)]
    assert filtered.epsilon([GaussianEvent(5.0)]) < filtered.epsilon(inside) < math.inf
    assert filtered.epsilon([GaussianEvent(5.0), ApproximateEvent(0.1, 1e-7, 5)]) == math.inf
    assert RdpFilter.planned(PLANNED, DELTA).reserved_delta == pytest.approx(0.1 * DELTA)
    with pytest.raises(ConfigError, match="delta"):
        RdpFilter.planned([ApproximateEvent(0.0, 1e-6)], DELTA)
    # (0, delta): costs delta only.
    only = RdpFilter(DELTA, (8.0,), (1.0,), 1e-7)
    assert only.epsilon([GaussianEvent(5.0), ApproximateEvent(0.0, 1e-7)]) == only.epsilon(
        [GaussianEvent(5.0)]
    )


def test_every_kind_has_a_cost_and_nothing_is_free():
    filtered = RdpFilter.planned(PLANNED, DELTA)
    assert filtered.epsilon([]) == 0.0
    assert filtered.epsilon([GaussianEvent(0.0)]) == math.inf
    for event in (
        LaplaceEvent(3.0, 20),
        TruncatedPoissonGaussianEvent(0.1, 1.0, 20, 40, 100),
        CyclicPoissonGaussianEvent(0.1, 1.0, 4, 90),
        CorrelatedGaussianEvent(2.0, Strategy("banded", (1.0, 0.5)), 4, 9),
    ):
        assert filtered.epsilon([event]) >= epsilon_of([event], DELTA, "rdp") > 0.0
        assert filtered.epsilon([event, event]) > filtered.epsilon([event])
    with pytest.raises(ConfigError, match="replace_one"):
        filtered.epsilon([FixedSizeGaussianEvent(100, 10, 2.0, 3)])


def test_another_relation_is_another_filter():
    replaced = RdpFilter.planned([GaussianEvent(4.0)], DELTA, "replace_one")
    halved = RdpFilter.planned([GaussianEvent(2.0)], DELTA)
    assert replaced.epsilon([GaussianEvent(4.0)]) == pytest.approx(halved.epsilon([GaussianEvent(2.0)]))
    with pytest.raises(ConfigError, match="sensitivity"):
        replaced.epsilon([PoissonGaussianEvent(0.1, 1.0, 1)])


def test_a_filter_survives_json_and_is_checked():
    filtered = RdpFilter.planned(PLANNED, DELTA)
    data = json.loads(json.dumps(filtered.to_dict(), allow_nan=False))
    assert RdpFilter.from_dict(data) == filtered
    assert math.fsum(filtered.weights) <= 1.0 and max(filtered.weights) == 0.9
    small = RdpFilter(1e-5, (2.0, 3.0), (0.5, 0.5)).to_dict()
    for change in (
        {"weights": [0.5, 0.6]},
        {"weights": [1.0, 0.0]},
        {"weights": [1.5, -0.5]},
        {"weights": [0.5]},
        {"weights": [0.5, math.nan]},
        {"weights": ["0.5", 0.5]},
        {"weights": 0.5},
        {"orders": [3.0, 2.0]},
        {"orders": [1.0, 2.0]},
        {"orders": [2.0, math.inf]},
        {"orders": [2.0, 10**400]},
        {"orders": [], "weights": []},
        {"delta": 0.0},
        {"delta": None},
        {"reserved_delta": 1e-5},
        {"reserved_delta": -1e-9},
        {"reserved_delta": "0"},
        {"relation": "swap"},
        {"module": "os"},
    ):
        with pytest.raises(ConfigError):
            RdpFilter.from_dict(small | change)
    for data in (None, [], {k: v for k, v in small.items() if k != "relation"}):
        with pytest.raises(ConfigError, match="known form"):
            RdpFilter.from_dict(data)
    with pytest.raises(ConfigError, match="epsilon"):
        filtered.allows([], 0.0)
