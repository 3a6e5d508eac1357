"""Epsilon by privacy random variables, from the prv-accountant package (Gopi et al. 2021), where it is installed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    Event,
    GaussianEvent,
    PoissonGaussianEvent,
)
from synthward.engine.accounting.rdp import rdp_epsilon
from synthward.engine.errors import ConfigError

_EPSILON_ERROR = 0.01
# Over delta.
_DELTA_ERROR = 1e-4
# Of the package's grid: beyond, it takes minutes and gigabytes for an epsilon of hundreds.
_MOST_POINTS = 2e7


def prv_epsilon(events: Sequence[Event], delta: float, relation: str = ADD_OR_REMOVE_ONE) -> float:
    """The proven upper bound of `prv_bounds`."""
    return prv_bounds(events, delta, relation)[2]


def prv_bounds(
    events: Sequence[Event], delta: float, relation: str = ADD_OR_REMOVE_ONE
) -> tuple[float, float, float]:
    """Proven lower bound, estimate and proven upper bound of epsilon, about 0.01 to either side.

    Raises:
        ConfigError: the package is missing, or does not answer for these events.
    """
    if relation != ADD_OR_REMOVE_ONE:
        raise ConfigError(f"accountant 'prv': does not know the relation {relation!r}; use 'pld'")
    try:
        import prv_accountant
    except ImportError:
        raise ConfigError(
            "accountant 'prv' needs the package prv-accountant; install it, or use 'pld' (the default)"
        ) from None
    mechanisms = [_mechanism(event) for event in events]
    prvs = [
        prv_accountant.GaussianMechanism(noise_multiplier=noise)
        if rate == 1.0
        else prv_accountant.PoissonSubsampledGaussianMechanism(
            noise_multiplier=noise, sampling_probability=rate
        )
        for rate, noise, _ in mechanisms
    ]
    counts = [count for _, _, count in mechanisms]
    _check_size(events, counts, delta)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            built = prv_accountant.PRVAccountant(
                prvs=prvs,
                max_self_compositions=counts,
                eps_error=_EPSILON_ERROR,
                delta_error=delta * _DELTA_ERROR,
            )
            found = built.compute_epsilon(delta=delta, num_self_compositions=counts)
        low, estimate, high = map(float, found)
        if not (low <= estimate <= high < math.inf and high >= 0.0):
            raise ValueError(f"its bounds are {low:g}, {estimate:g} and {high:g}")
    except (RuntimeError, ValueError, FloatingPointError, OverflowError) as error:
        raise ConfigError(
            f"accountant 'prv' can not answer here ({error}); use 'pld' (the default)"
        ) from None
    return max(0.0, low), max(0.0, estimate), high


def _check_size(events: Sequence[Event], counts: Sequence[int], delta: float) -> None:
    """The package's grid, estimated as it does: as wide as epsilon by RDP, its mesh by theorem 5.5 of the paper."""
    error = delta * _DELTA_ERROR
    width = rdp_epsilon(events, error / 4.0) + 3.0
    mesh = _EPSILON_ERROR / math.sqrt(sum(counts) / 2.0 * math.log(12.0 / error))
    if 2.0 * width / mesh > _MOST_POINTS:
        raise ConfigError(
            "accountant 'prv' can not answer here: epsilon or steps are too many for its grid; use 'pld'"
        )


def _mechanism(event: Event) -> tuple[float, float, int]:
    """(sampling rate, noise multiplier, how often)."""
    if isinstance(event, PoissonGaussianEvent):
        return event.sample_rate, event.noise_multiplier, event.steps
    if isinstance(event, GaussianEvent):
        return 1.0, event.noise_multiplier, event.count
    raise ConfigError(f"accountant 'prv': can not answer for {event.kind!r} events; use 'pld'")
