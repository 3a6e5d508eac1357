"""Epsilon of a list of events: what all accountants share, and the choice among them.

Neighbours differ by one unit added or removed ("add_or_remove_one"), or by one unit replaced by another
("replace_one"); noise multipliers are over the bound C of one unit in both. Whatever an accountant can not answer is
refused by name; no accountant answers with a negative number or with none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    Event,
    PoissonGaussianEvent,
    SelectionEvent,
    StepsEvent,
    check_delta,
    check_relation,
    has_no_noise,
    is_event,
)
from synthward.engine.accounting.pld import pld_epsilon
from synthward.engine.accounting.prv import prv_epsilon
from synthward.engine.accounting.rdp import rdp_epsilon
from synthward.engine.errors import ConfigError

ACCOUNTANTS = ("pld", "rdp", "prv")
_ANSWERS = {"pld": pld_epsilon, "rdp": rdp_epsilon, "prv": prv_epsilon}


class Accountant:
    """Composes events and says epsilon.

    Args:
        kind: "pld" (default), "rdp", or "prv" (needs the prv-accountant package).
        relation: "add_or_remove_one" (default) or "replace_one".
    """

    def __init__(self, kind: str = "pld", relation: str = ADD_OR_REMOVE_ONE) -> None:
        check_accountant(kind)
        check_relation(relation)
        self.kind, self.relation = kind, relation
        self._events: list[Event] = []

    @property
    def events(self) -> tuple[Event, ...]:
        """What was composed so far."""
        return tuple(self._events)

    def compose(self, event: Event, count: int = 1) -> None:
        """Add an event, ``count`` times; equal mechanisms are merged."""
        if not is_event(event):
            raise TypeError(f"event: got {type(event).__name__}, expected a privacy event")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"count: got {count!r}; give a whole number of at least 0")
        self._events = merge_events([*self._events, *[event] * count])

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta``; infinite when some event has no noise, zero when nothing was spent."""
        return epsilon_of(self._events, delta, self.kind, self.relation)


def epsilon_of(
    events: Iterable[Event], delta: float, accountant: str = "pld", relation: str = ADD_OR_REMOVE_ONE
) -> float:
    """Epsilon of the composition of ``events`` at ``delta``.

    Returns:
        Infinite when some event has no noise (or delta does not pay for the deltas of approximate events), zero
        when nothing was spent.

    Raises:
        ConfigError: an event that this accountant does not answer for under this relation.
    """
    check_delta(delta)
    check_accountant(accountant)
    check_relation(relation)
    merged = merge_events(simplified(event) for event in events)
    if any(has_no_noise(event) for event in merged):
        return math.inf
    return _epsilon(tuple(merged), delta, accountant, relation) if merged else 0.0


@lru_cache(maxsize=512)
def _epsilon(events: tuple[Event, ...], delta: float, accountant: str, relation: str) -> float:
    epsilon = _ANSWERS[accountant](events, delta, relation)
    if math.isnan(epsilon) or epsilon < 0.0:
        raise ConfigError(f"accountant {accountant!r}: has no answer here (it found {epsilon}); use another")
    return epsilon


def epsilon_curve(
    events: Sequence[Event],
    delta: float,
    points: int = 20,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
) -> list[tuple[int, float]]:
    """(step, epsilon) at about ``points`` steps, the queries charged at step 0."""
    queries = [event for event in events if not isinstance(event, StepsEvent)]
    trained = [event for event in events if isinstance(event, StepsEvent)]
    total = sum(event.steps for event in trained)
    marks = sorted({round(total * i / max(points - 1, 1)) for i in range(points)} | {0, total})
    curve = []
    for mark in marks:
        left, taken = mark, list[Event](queries)
        for event in trained:
            steps = min(left, event.steps)
            left -= steps
            if steps:
                taken.append(event.with_steps(steps))
        curve.append((mark, epsilon_of(taken, delta, accountant, relation)))
    return curve


def merge_events(events: Iterable[Event]) -> list[Event]:
    """Equal mechanisms together, empty ones gone, queries first: composition does not depend on order.

    Events that are one mechanism each stay apart: their cost is not a sum over steps.
    """
    merged: dict[object, Event] = {}
    for at, event in enumerate(events):
        mechanism, times = _without_times(event)
        if times:
            key: object = at if mechanism is None else mechanism
            before = merged.get(key)
            merged[key] = event if before is None else _with_times(event, times + _without_times(before)[1])
    return sorted(merged.values(), key=lambda event: isinstance(event, StepsEvent))


def simplified(event: Event) -> Event:
    """What an event costs as one of fewer kinds: cyclic steps as their rounds, correlated noise as one Gaussian."""
    if isinstance(event, CyclicPoissonGaussianEvent):
        return PoissonGaussianEvent(event.sample_rate, event.noise_multiplier, event.rounds)
    if isinstance(event, CorrelatedGaussianEvent):
        return event.gaussian
    if isinstance(event, SelectionEvent):
        return replace(event, inner=tuple(simplified(inner) for inner in event.inner))
    return event


def check_accountant(kind: str) -> None:
    if kind not in ACCOUNTANTS:
        raise ConfigError(f"accountant: got {kind!r}; choose one of {', '.join(ACCOUNTANTS)}")


def _without_times(event: Event) -> tuple[Event | None, int]:
    """What a mechanism is, apart from how often it runs, and how often; None for one that adds up to no other."""
    if isinstance(event, SelectionEvent):
        return None, 1
    if isinstance(event, StepsEvent):
        return None if event.is_one_mechanism else event.with_steps(0), event.steps
    return replace(event, count=0), event.count


def _with_times(event: Event, times: int) -> Event:
    if isinstance(event, SelectionEvent):
        return event
    return event.with_steps(times) if isinstance(event, StepsEvent) else replace(event, count=times)
