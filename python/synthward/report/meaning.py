"""What a guarantee bounds for an attacker, as numbers.

An (epsilon, delta) pair bounds the true positive rate of every test at a given false positive rate (Wasserman & Zhou
2010; Kairouz et al. 2015), and a mechanism satisfies a whole curve of pairs. The bound here is the least over a few
pairs of the accountant's own curve, so it holds for every accountant and every kind of event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from synthward.engine.accounting import Event, epsilon_of
from synthward.engine.errors import ConfigError
from synthward.report.documents import Guarantee, Interpretation, Rate

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05, 0.1)
# Where the best pair lies depends on the mechanism; denser where it lies for epsilons between 0.1 and 10.
DELTAS = (1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 7e-2, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6)
# e^709 is the largest double; beyond, no number is worth printing.
_LARGEST = 700.0


def interpret(guarantee: Guarantee, events: Sequence[Event] = ()) -> Interpretation:
    """Bounds on an attacker from a guarantee and, where the ledger gives them, from the events behind it."""
    ratio = math.exp(min(guarantee.epsilon, _LARGEST))
    pairs = [(guarantee.epsilon, guarantee.delta), *privacy_curve(guarantee, events)]
    return Interpretation(
        likelihood_ratio=ratio,
        correct_guess=min(1.0, (ratio + guarantee.delta) / (1.0 + ratio)),
        rates=tuple(
            Rate(
                false_positive_rate=rate,
                true_positive_rate=min(true_positive_rate(rate, *pair) for pair in pairs),
            )
            for rate in FALSE_POSITIVE_RATES
        ),
        two_units=group_guarantee(guarantee, 2),
    )


def privacy_curve(guarantee: Guarantee, events: Sequence[Event]) -> list[tuple[float, float]]:
    """(epsilon, delta) pairs that the events satisfy, at larger deltas than the guarantee's."""
    if not events:
        return []
    try:
        return [
            (epsilon_of(events, delta, guarantee.accountant, guarantee.relation), delta)
            for delta in DELTAS
            if delta > guarantee.delta
        ]
    except ConfigError:
        # An accountant that has no answer at some delta; the guarantee's own pair bounds the attacker too.
        return []


def true_positive_rate(false_positive_rate: float, epsilon: float, delta: float) -> float:
    """Largest true positive rate of a test between neighbours of an (epsilon, delta)-private mechanism."""
    forward = math.exp(min(epsilon, _LARGEST)) * false_positive_rate + delta
    backward = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_positive_rate)
    return min(1.0, forward, max(backward, false_positive_rate))


def group_guarantee(guarantee: Guarantee, units: int) -> Guarantee | None:
    """The guarantee for ``units`` units at once (Vadhan 2017, lemma 2.2); None where delta reaches 1."""
    epsilon, delta = guarantee.epsilon, guarantee.delta
    whole = delta * sum(math.exp(min(epsilon * k, _LARGEST)) for k in range(units))
    if whole >= 1.0:
        return None
    return guarantee.model_copy(update={"epsilon": units * epsilon, "delta": whole})
