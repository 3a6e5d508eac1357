"""Head-room of truncated Poisson sampling: how large the static batch has to be, and what cutting to it costs.

A cap at the expected batch would cut every second draw, and cost many times the epsilon of no cap; 4.5 standard
deviations above it cutting is so rare that it costs little, and the rest is checked by the accountant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthward.engine.accounting.accountant import epsilon_of
from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    check_sample_rate,
)
from synthward.engine.errors import ConfigError

_DEVIATIONS = 4.5
# Each deviation more divides the chance of a cut by orders of magnitude.
_MOST_DEVIATIONS = 60.0


@dataclass(frozen=True)
class HeadRoom:
    """A cap and what it costs.

    Attributes:
        max_batch_size: the cap.
        epsilon: with it.
        uncut_epsilon: of the same steps without a cap.
    """

    max_batch_size: int
    epsilon: float
    uncut_epsilon: float

    @property
    def cost(self) -> float:
        """Share of epsilon that cutting adds."""
        return relative_cost(self.epsilon, self.uncut_epsilon)

    def __str__(self) -> str:
        return (
            f"batches of at most {self.max_batch_size} units cost {100.0 * self.cost:.3g}% of epsilon: "
            f"{self.epsilon:.6g} instead of {self.uncut_epsilon:.6g}"
        )


def head_room(
    sample_rate: float,
    max_units: int,
    noise_multiplier: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
    most_cost: float = 0.01,
) -> HeadRoom:
    """The least cap of a few tried, from 4.5 deviations above the expected batch on, that costs under ``most_cost``.

    Args:
        max_units: public upper bound of the number of units; the expected batch is ``sample_rate * max_units``.
        most_cost: share of epsilon.

    Returns:
        The cap, at most ``max_units``, and both epsilons.
    """
    check_sample_rate(sample_rate)
    if not most_cost > 0.0:
        raise ConfigError(f"most cost: got {most_cost!r}; give a share above 0, for example 0.01")
    deviations = _DEVIATIONS
    while deviations < _MOST_DEVIATIONS:
        cap = starting_cap(sample_rate, max_units, deviations)
        found = cost_of_cap(
            TruncatedPoissonGaussianEvent(sample_rate, noise_multiplier, steps, cap, max_units),
            delta,
            accountant,
            relation,
        )
        if found.cost < most_cost:
            return found
        deviations += 0.5
    raise ConfigError("max batch size: no cap costs as little; give a larger share, or no cap")


def starting_cap(sample_rate: float, max_units: int, deviations: float = _DEVIATIONS) -> int:
    """The expected batch and so many of its standard deviations, at most ``max_units``."""
    mean = sample_rate * max_units
    return min(max_units, math.ceil(mean + deviations * math.sqrt(mean)))


def largest_rate(max_batch_size: int, max_units: int) -> float:
    """The largest rate at which this cap has the least room that the accountant takes, one standard deviation."""
    if max_batch_size >= max_units:
        return 1.0
    root = math.sqrt(max_batch_size + 0.25) - 0.5
    return min(1.0, (1.0 - 1e-9) * root * root / max_units)


def cost_of_cap(
    event: TruncatedPoissonGaussianEvent,
    delta: float,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
) -> HeadRoom:
    """What the cap of this event costs; a `ConfigError` where it leaves no room at all."""
    uncut = PoissonGaussianEvent(event.sample_rate, event.noise_multiplier, event.steps)
    return HeadRoom(
        event.max_batch_size,
        epsilon_of([event], delta, accountant, relation),
        epsilon_of([uncut], delta, accountant, relation),
    )


def relative_cost(epsilon: float, uncut: float) -> float:
    """(epsilon - uncut) / uncut, and 0 where both are the same, whatever they are."""
    if epsilon == uncut:
        return 0.0
    return math.inf if uncut == 0.0 else epsilon / uncut - 1.0
