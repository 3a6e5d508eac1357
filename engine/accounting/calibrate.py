"""Solving for noise, steps or sampling rate, always on the safe side: the epsilon met is at most the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq

from synthward.engine.accounting.accountant import epsilon_of
from synthward.engine.accounting.events import (
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
_TOLERANCE = 1e-5


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
) -> float:
    """Least noise multiplier (to 1e-5) of ``steps`` at ``sample_rate`` that, with the other events, meets the target."""
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_sample_rate(sample_rate)
    check_steps(steps)
    if epsilon_of(other_events, delta, accountant) > target_epsilon:
        raise ConfigError(f"epsilon {target_epsilon:g} is already spent by what comes before the training steps")

    def epsilon(noise: float) -> float:
        own: Event = (
            GaussianEvent(noise, steps) if sample_rate == 1.0 else PoissonGaussianEvent(sample_rate, noise, steps)
        )
        return epsilon_of([*other_events, own], delta, accountant)

    low, high = _LEAST_NOISE, 1.0
    while epsilon(high) > target_epsilon:
        low, high = high, 2.0 * high
        if high > _MOST_NOISE:
            raise ConfigError(f"epsilon {target_epsilon:g} at delta {delta:g} needs a noise multiplier above {_MOST_NOISE:g}")
    if low == _LEAST_NOISE and epsilon(low) <= target_epsilon:
        return low
    return _least_fit(epsilon, target_epsilon, low, high)


def calibrate_steps(
    target_epsilon: float, delta: float, sample_rate: float, noise_multiplier: float, accountant: str = "pld"
) -> int:
    """Most steps within the target."""
    check_epsilon(target_epsilon)
    check_noise_multiplier(noise_multiplier)

    def fits(steps: int) -> bool:
        event = PoissonGaussianEvent(sample_rate, noise_multiplier, steps)
        return epsilon_of([event], delta, accountant) <= target_epsilon

    if not fits(1):
        raise ConfigError(f"epsilon {target_epsilon:g} does not pay for a single step; raise the noise multiplier")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 10**9:
            raise ConfigError("steps: more than 10^9 fit the target; give a smaller noise multiplier")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def calibrate_sample_rate(
    target_epsilon: float, delta: float, noise_multiplier: float, steps: int, accountant: str = "pld"
) -> float:
    """Largest sampling rate (to 1e-5, relative) within the target."""
    check_epsilon(target_epsilon)
    check_noise_multiplier(noise_multiplier)

    def epsilon(inverse_rate: float) -> float:
        event = PoissonGaussianEvent(min(1.0, 1.0 / inverse_rate), noise_multiplier, steps)
        return epsilon_of([event], delta, accountant)

    if epsilon(1.0) <= target_epsilon:
        return 1.0
    most = 1e7
    if epsilon(most) > target_epsilon:
        raise ConfigError(f"epsilon {target_epsilon:g} is out of reach at noise multiplier {noise_multiplier:g}")
    return 1.0 / _least_fit(epsilon, target_epsilon, 1.0, most)


def _least_fit(epsilon: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The least value (to the tolerance) whose epsilon is at most ``target``, from above.

    ``epsilon`` decreases; ``high`` fits and ``low`` does not. Root finding on log epsilon over log value is nearly
    linear, so that it takes few evaluations, each of which may cost seconds.
    """
    seen: dict[float, float] = {}

    def excess(log_value: float) -> float:
        if log_value not in seen:
            seen[log_value] = math.log(epsilon(math.exp(log_value)) / target)
        return seen[log_value]

    ends = (math.log(low), math.log(high))
    if excess(ends[1]) == 0.0:
        return high
    root = float(brentq(excess, *ends, xtol=0.1 * _TOLERANCE, rtol=1e-12))
    step = 0.2 * _TOLERANCE
    while excess(root) > 0.0:
        root, step = root + step, 2.0 * step
    return math.exp(root)
