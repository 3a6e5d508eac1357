"""Solving for noise, steps or sampling rate, on the safe side: the epsilon met is at most the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq

from synthward.engine.accounting.accountant import epsilon_of
from synthward.engine.accounting.events import (
    Event,
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
# RDP's epsilon may be twice that of PLD, or a little more; beyond this multiple no PLD is near the target.
_FAR = 4.0
_TOLERANCE = 1e-5


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    other_events: Sequence[Event] = (),
) -> float:
    """Least noise multiplier (to 1e-5, from 0.3 up) that meets the target together with the other events."""
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_sample_rate(sample_rate)
    check_steps(steps)
    if epsilon_of(other_events, delta, accountant) > target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon:g} is already spent by what comes before the training steps"
        )

    def epsilon(noise: float, kind: str) -> float:
        own = PoissonGaussianEvent(sample_rate, noise, steps)
        return epsilon_of([*other_events, own], delta, kind)

    # At rate 1 the steps are one Gaussian mechanism of noise / sqrt(steps).
    least = _LEAST_NOISE * math.sqrt(max(steps, 1)) if sample_rate == 1.0 else _LEAST_NOISE
    noise = _least_fit(epsilon, accountant, target_epsilon, max(1.0, least), least, _MOST_NOISE)
    if noise is None:
        raise ConfigError(
            f"epsilon {target_epsilon:g} at delta {delta:g} needs a noise multiplier above {_MOST_NOISE:g}"
        )
    return noise


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
        raise ConfigError(
            f"epsilon {target_epsilon:g} does not pay for a single step; raise the noise multiplier"
        )
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

    def epsilon(inverse_rate: float, kind: str) -> float:
        event = PoissonGaussianEvent(min(1.0, 1.0 / inverse_rate), noise_multiplier, steps)
        return epsilon_of([event], delta, kind)

    inverse = _least_fit(epsilon, accountant, target_epsilon, 1.0, 1.0, _MOST_INVERSE_RATE)
    if inverse is None:
        raise ConfigError(
            f"epsilon {target_epsilon:g} is out of reach at noise multiplier {noise_multiplier:g}; raise it"
        )
    return 1.0 / inverse


def _least_fit(
    epsilon: Callable[[float, str], float],
    accountant: str,
    target: float,
    start: float,
    least: float,
    most: float,
) -> float | None:
    """The least value in [least, most] (to the tolerance) whose epsilon is at most ``target``, from above; or
    None.

    ``epsilon(value, accountant)`` decreases in the value. RDP, which costs milliseconds, tells about where to
    look: a PLD far above the target takes minutes and gigabytes.
    """
    high = start
    while accountant == "pld" and high < most and epsilon(high, "rdp") > _FAR * target:
        high *= 2.0
    while epsilon(high, accountant) > target:
        high *= 2.0
        if high > most:
            return None
    low = max(least, high / 2.0)
    while epsilon(low, accountant) <= target:
        if low == least:
            return least
        low, high = max(least, low / 2.0), low
    return _root(lambda value: epsilon(value, accountant), target, low, high)


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
