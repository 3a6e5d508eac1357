"""A privacy filter: what may still be released when noise, rates and queries are chosen from earlier releases.

The sum of a PLD accountant holds for mechanisms that are fixed in advance; for adaptively chosen ones it is no bound.
RDP at one order does add up (Feldman & Zrnic 2021, theorem 3.1; Lecuyer 2021, theorem 1; Whitehouse et al. 2023 for
approximate mechanisms), and this filter uses several orders, which are fixed, with their weights, before the run.

Why it holds. Let order a have weight w_a, the weights sum to at most 1, delta = d + d' with d' reserved for the deltas
of approximate mechanisms, and let b_a be the largest RDP at order a that converts to (target epsilon, w_a d). A release
goes ahead when, itself included, some order's sum is within its b_a and the deltas' sum is within d'.

1. Deltas. Given what was released before, an approximate mechanism is a pure one with probability 1 - delta_i and
   arbitrary otherwise, under both neighbours (Kairouz, Oh & Viswanath 2015). Some mechanism is "otherwise" with
   probability at most d', the bound on the sum of the delta_i. On the rest, both neighbours' densities are those of an
   interaction with the pure parts, times the same product of 1 - delta_i <= 1: a bound (epsilon, d) of that
   interaction carries over, and the whole is (epsilon, d + d').
2. One order. The interaction A_a that is stopped before the sum at order a would pass b_a is (a, b_a)-RDP: each term
   of the sum is known before its release, and the sum never passes b_a (the theorems named above). So A_a is (target
   epsilon, w_a d)-private.
3. Union. This filter stops last of all A_a. Let I be the order whose A_a stopped last, ties broken by the smaller
   order: a function of the transcript, on which the filter's output is that of A_I. So P(E) = sum_a P(A_a in E, I = a)
   <= sum_a (e^epsilon P'(A_a in E, I = a) + w_a d) <= e^epsilon P'(E) + d.

The guarantee is for the target that was fixed before. `epsilon` of what was spent so far is what is compared with it;
it is a statement of its own where nothing was chosen from releases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthward.engine.accounting.accountant import merge_events, simplified
from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    ApproximateEvent,
    Event,
    check_delta,
    check_epsilon,
    check_relation,
    has_no_noise,
)
from synthward.engine.accounting.rdp import ORDERS, as_seen, rdp_curve
from synthward.engine.errors import ConfigError

# What the order that suits the plan gets; the rest is shared by all others.
_MOST_WEIGHT = 0.9
# Of delta, for thresholds and other tools' releases that were not planned.
_RESERVED = 0.1
_MOST_ORDERS = 1024


@dataclass(frozen=True)
class RdpFilter:
    """Fixed orders, their weights, and the split of delta; the same object decides and reports.

    Args:
        delta: failure probability of the whole.
        orders: increasing, above 1.01 (the conversion to epsilon is not stable below).
        weights: positive, one for each order, at most 1 in all.
        reserved_delta: the part of delta that pays for the deltas of approximate events.
        relation: who is a neighbour.

    Raises:
        ConfigError: weights that add up to more than 1, or numbers that are no orders or deltas.
    """

    delta: float
    orders: tuple[float, ...]
    weights: tuple[float, ...]
    reserved_delta: float = 0.0
    relation: str = ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        check_delta(self.delta)
        check_relation(self.relation)
        for name in ("orders", "weights"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        object.__setattr__(self, "reserved_delta", _numbers("reserved delta", (self.reserved_delta,))[0])
        orders, weights = self.orders, self.weights
        if not orders or len(orders) != len(weights):
            raise ConfigError("filter: give one weight for each order, at least one")
        if orders[0] <= 1.01 or any(b <= a for a, b in pairwise(orders)):
            raise ConfigError("filter: orders: give increasing numbers above 1.01")
        if min(weights) <= 0.0 or math.fsum(weights) > 1.0:
            raise ConfigError("filter: weights: give positive numbers that add up to at most 1")
        if not 0.0 <= self.reserved_delta < self.delta:
            raise ConfigError("filter: reserved delta: give a number of at least 0 and below delta")

    @classmethod
    def planned(cls, events: Iterable[Event], delta: float, relation: str = ADD_OR_REMOVE_ONE) -> RdpFilter:
        """Most of the weight on the order that suits these events, which need not be what is then run."""
        check_delta(delta)
        planned = [simplified(event) for event in events]
        reserved = max(_RESERVED * delta, 1.01 * _deltas(planned, relation))
        if reserved >= delta:
            raise ConfigError(
                f"delta: {delta:g} does not pay for the deltas of the planned approximate events"
            )
        orders = tuple(order for order in ORDERS if order > 1.01)
        cost = _converted(
            rdp_curve(planned, orders, relation), orders, np.full(len(orders), delta - reserved)
        )
        best = int(np.argmin(cost))
        # Rounded down, so that their sum is not above 1.
        weights = [math.nextafter((1.0 - _MOST_WEIGHT) / (len(orders) - 1), 0.0)] * len(orders)
        weights[best] = _MOST_WEIGHT
        return cls(delta, orders, tuple(weights), reserved, relation)

    def epsilon(self, events: Iterable[Event]) -> float:
        """What the events cost under this filter; infinite without noise, or when their deltas pass the reserve.

        Raises:
            ConfigError: an event whose RDP is not known under the relation.
        """
        spent = merge_events(simplified(event) for event in events)
        if any(has_no_noise(event) for event in spent) or _deltas(spent, self.relation) > self.reserved_delta:
            return math.inf
        if not spent:
            return 0.0
        deltas = (self.delta - self.reserved_delta) * np.asarray(self.weights)
        return float(np.min(_converted(rdp_curve(spent, self.orders, self.relation), self.orders, deltas)))

    def allows(self, events: Iterable[Event], target_epsilon: float) -> bool:
        """Whether these events, all that was released and what comes next, stay within the target.

        The target has to be the same throughout. Asked before each release, the next one may be chosen in any way
        from the earlier ones.
        """
        check_epsilon(target_epsilon)
        return self.epsilon(events) <= target_epsilon

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; `from_dict` gives an equal filter back."""
        return {
            "delta": self.delta,
            "orders": list(self.orders),
            "weights": list(self.weights),
            "reserved_delta": self.reserved_delta,
            "relation": self.relation,
        }

    @classmethod
    def from_dict(cls, data: object) -> RdpFilter:
        """A filter from its dictionary; anything but the known fields is a `ConfigError`."""
        if not isinstance(data, dict) or set(data) != set(cls.__dataclass_fields__):
            raise ConfigError(f"filter: {str(data)[:80]!r} is not of a known form")
        if not (isinstance(data["orders"], list) and isinstance(data["weights"], list)):
            raise ConfigError("filter: orders and weights have to be lists")
        lists = {name: tuple(data[name]) for name in ("orders", "weights")}
        return cls(**{**data, **lists})


def _converted(
    curve: NDArray[np.float64], orders: Sequence[float], deltas: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Epsilon at each order by itself (Canonne, Kamath & Steinke 2020, proposition 12)."""
    at = np.asarray(orders)
    return np.asarray(np.maximum(0.0, curve + np.log1p(-1.0 / at) - np.log(deltas * at) / (at - 1.0)))


def _deltas(events: Sequence[Event], relation: str) -> float:
    """The deltas of approximate events, added up."""
    seen = [as_seen(event, relation) for event in events if isinstance(event, ApproximateEvent)]
    return math.fsum(event.count * event.delta for event in seen)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_ORDERS:
        raise ConfigError(f"filter: {name}: give a tuple of at most {_MOST_ORDERS} numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"filter: {name}: {str(value)[:80]!r} is not a number")
    try:
        numbers = tuple(float(value) for value in values)
    except OverflowError:
        raise ConfigError(f"filter: {name}: too large a number") from None
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"filter: {name}: give finite numbers")
    return numbers
