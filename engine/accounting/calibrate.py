"""Solving for noise, steps or sampling rate, on the safe side: the epsilon met is at most the target.

`least_fit` and `most_times` solve for any parameter in which epsilon is monotone, of events of any kind; the functions
below them do so for the parameters that users ask for. An event factory says what the parameter means: it is called
with a value and gives the event (or events) of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq

from synthward.engine.accounting.accountant import epsilon_of, simplified
from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    Event,
    GaussianEvent,
    PoissonGaussianEvent,
    check_delta,
    check_epsilon,
    check_noise_multiplier,
    check_sample_rate,
    check_steps,
)
from synthward.engine.errors import ConfigError

# Below this noise the PLD takes seconds to minutes and gigabytes; no useful epsilon lies there.
_LEAST_NOISE = 0.3
_MOST_NOISE = 1e5
_MOST_INVERSE_RATE = 1e7
_MOST_STEPS = 10**9
# RDP's epsilon may be twice that of PLD, or a little more; beyond this multiple no PLD is near the target.
_FAR = 4.0
_TOLERANCE = 1e-5

Events = Event | Sequence[Event]


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
    relation: str = ADD_OR_REMOVE_ONE,
) -> float:
    """Least noise multiplier (to 1e-5, from 0.3 up) that meets the target together with the other events."""
    check_sample_rate(sample_rate)
    check_steps(steps)
    return calibrate_noise_of(
        lambda noise: PoissonGaussianEvent(sample_rate, noise, steps),
        target_epsilon,
        delta,
        accountant,
        other_events,
        relation,
    )


def calibrate_noise_of(
    events: Callable[[float], Events],
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
    relation: str = ADD_OR_REMOVE_ONE,
) -> float:
    """Least noise multiplier (to 1e-5, from 0.3 up) of any kind of event.

    Args:
        events: what a noise multiplier costs; epsilon must not grow with it.
        other_events: what is charged beside it.

    Raises:
        ConfigError: the other events spend the target alone, or no noise is enough.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    if epsilon_of(other_events, delta, accountant, relation) > target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon:g} is already spent by what comes before the training steps"
        )
    # Without sampling, the steps are one Gaussian mechanism of the noise over their square root (or sensitivity).
    least = max(_LEAST_NOISE * _dilution(event) for event in as_list(events(1.0)))
    noise = least_fit(
        events,
        target_epsilon,
        delta,
        accountant,
        other_events,
        relation,
        start=max(1.0, least),
        least=least,
        most=_MOST_NOISE,
    )
    if noise is None:
        raise ConfigError(
            f"epsilon {target_epsilon:g} at delta {delta:g} needs a noise multiplier above {_MOST_NOISE:g}"
        )
    return noise


def calibrate_steps(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
) -> int:
    """Most steps within the target."""
    check_noise_multiplier(noise_multiplier)
    return calibrate_steps_of(
        lambda steps: PoissonGaussianEvent(sample_rate, noise_multiplier, steps),
        target_epsilon,
        delta,
        accountant,
        relation=relation,
    )


def calibrate_steps_of(
    events: Callable[[int], Events],
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
    relation: str = ADD_OR_REMOVE_ONE,
) -> int:
    """Most steps of any kind of event; epsilon must not fall with their number."""
    check_epsilon(target_epsilon)

    def fits(steps: int) -> bool:
        spent = [*other_events, *as_list(events(steps))]
        return epsilon_of(spent, delta, accountant, relation) <= target_epsilon

    if not fits(1):
        raise ConfigError(
            f"epsilon {target_epsilon:g} does not pay for a single step; raise the noise multiplier"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > _MOST_STEPS:
            raise ConfigError("steps: more than 10^9 fit the target; give a smaller noise multiplier")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def calibrate_sample_rate(
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
) -> float:
    """Largest sampling rate (to 1e-5, relative) within the target."""
    check_noise_multiplier(noise_multiplier)
    return calibrate_sample_rate_of(
        lambda rate: PoissonGaussianEvent(rate, noise_multiplier, steps),
        target_epsilon,
        delta,
        accountant,
        relation=relation,
    )


def calibrate_sample_rate_of(
    events: Callable[[float], Events],
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
    relation: str = ADD_OR_REMOVE_ONE,
    most: float = 1.0,
) -> float:
    """Largest sampling rate (to 1e-5, relative) of any kind of event; epsilon must not fall with it.

    Args:
        most: no rate above this one is tried.
    """
    check_epsilon(target_epsilon)
    inverse = least_fit(
        lambda value: events(min(most, 1.0 / value)),
        target_epsilon,
        delta,
        accountant,
        other_events,
        relation,
        start=1.0 / most,
        least=1.0 / most,
        most=_MOST_INVERSE_RATE,
    )
    if inverse is None:
        raise ConfigError(f"epsilon {target_epsilon:g} is out of reach with this noise multiplier; raise it")
    return min(most, 1.0 / inverse)


def least_fit(
    events: Callable[[float], Events],
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
    relation: str = ADD_OR_REMOVE_ONE,
    *,
    start: float,
    least: float,
    most: float,
) -> float | None:
    """The least value in [least, most] (to 1e-5, relative) whose epsilon is at most the target, from above.

    Epsilon must not grow with the value. RDP, which costs milliseconds, tells about where to look: a PLD far above the
    target takes minutes and gigabytes. (It is asked for add/remove, which costs no more than replacing a unit.)

    Returns:
        None where no value is enough.
    """

    def epsilon(value: float, kind: str = accountant, of: str = relation) -> float:
        return epsilon_of([*other_events, *as_list(events(value))], delta, kind, of)

    high = start
    while (
        accountant == "pld"
        and high < most
        and epsilon(high, "rdp", ADD_OR_REMOVE_ONE) > _FAR * target_epsilon
    ):
        high *= 2.0
    while epsilon(high) > target_epsilon:
        high *= 2.0
        if high > most:
            return None
    low = max(least, high / 2.0)
    while epsilon(low) <= target_epsilon:
        if low == least:
            return least
        low, high = max(least, low / 2.0), low
    return _root(epsilon, target_epsilon, low, high)


def _root(epsilon: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where ``epsilon`` passes ``target``, from the side that fits; ``high`` fits and ``low`` does not.

    Root finding on log epsilon over log value is nearly linear, so that it takes few evaluations.
    """
    seen: dict[float, float] = {}

    def excess(log_value: float) -> float:
        if log_value not in seen:
            # Epsilon may be exactly 0 (delta alone pays) or infinite; both only need the right sign.
            ratio = epsilon(math.exp(log_value)) / target
            seen[log_value] = math.log(min(max(ratio, 1e-6), 1e6))
        return seen[log_value]

    ends = (math.log(low), math.log(high))
    # exp(log(x)) may lie a rounding away from x: a bracket that is no bracket any more is as good as solved.
    if excess(ends[1]) >= 0.0 or excess(ends[0]) <= 0.0:
        return high
    root = float(brentq(excess, *ends, xtol=0.1 * _TOLERANCE, rtol=1e-12))
    step = 0.2 * _TOLERANCE
    while excess(root) > 0.0:
        root, step = root + step, 2.0 * step
    return min(math.exp(root), high)


def _dilution(event: Event) -> float:
    """By how much more noise an event of no sampling needs than one Gaussian mechanism alone."""
    event = simplified(event)
    if isinstance(event, PoissonGaussianEvent) and event.sample_rate == 1.0:
        return math.sqrt(max(event.steps, 1))
    if isinstance(event, GaussianEvent) and event.count:
        return math.sqrt(event.count) / event.noise_multiplier
    return 1.0


def as_list(events: Events) -> list[Event]:
    return list(events) if isinstance(events, Sequence) else [events]
