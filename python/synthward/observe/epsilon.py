"""Epsilon so far, for people who watch: never less than what was spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from synthward.engine.accounting import Event, epsilon_of


class EpsilonSoFar:
    """Upper bound on the cost of a run after a number of its steps, exact at the last one.

    Accounting for each step would take longer than many a step. The cost is computed at the ends of stretches that grow
    with the number of steps, when they are reached; within a stretch that of its end is given.

    Args:
        charged: what the ledger held when this process began.
        event_of: (number of steps) to what steps of this process cost.
        first: steps that are in `charged`.
        steps: of the whole run.
        target: the run's budget, which the ledger keeps to.
    """

    _GROWTH = 1.1

    def __init__(
        self,
        charged: Sequence[Event],
        event_of: Callable[[int], Event],
        *,
        first: int,
        steps: int,
        stretch: int,
        target: float,
        delta: float,
        accountant: str,
        relation: str,
    ) -> None:
        self._charged, self._event_of = tuple(charged), event_of
        self._first, self._steps, self._stretch, self._target = first, steps, stretch, target
        self._settings = (delta, accountant, relation)
        self._end = first
        self._value = min(target, epsilon_of(self._charged, *self._settings)) if charged else 0.0

    def __call__(self, step: int) -> float:
        """Epsilon after `step` steps, which are no fewer than at the last call."""
        if step > self._end:
            self._end = min(self._steps, self._stretch_end(step))
            taken = self._event_of(self._end - self._first)
            self._value = min(self._target, epsilon_of([*self._charged, taken], *self._settings))
        return self._value

    def _stretch_end(self, step: int) -> int:
        """Stretches end at multiples of the shortest, so that they end with leases."""
        reach = max(step, math.floor(self._GROWTH * self._end))
        return self._stretch * math.ceil(reach / self._stretch)
