"""Epsilon by privacy loss distributions, from the dp-accounting library.

On the library's default grid (1e-4), pessimistic (connect-the-dots, Doroshenko et al. 2022), composed as its
PLDAccountant does: Gaussians in closed form, sampled ones by self-composition. Under replace-one the library answers
for the Gaussian, sampled or not; Laplace's sensitivity doubles there, and a mechanism of which only epsilon and delta
are known is taken twice (group privacy of two).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    ApproximateEvent,
    Event,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.engine.errors import ConfigError

# The library's own default; results are pinned to it.
_GRID = 1e-4
# A PLD's size grows with 1 / noise^2: below this it takes minutes and gigabytes, for an epsilon of hundreds.
_LEAST_NOISE = 0.05
# The same for a mechanism of which only epsilon is known: its exponential overflows.
_MOST_EPSILON = 500.0


def pld_epsilon(events: Sequence[Event], delta: float, relation: str = ADD_OR_REMOVE_ONE) -> float:
    """Epsilon of at least one event, each of them with noise, at ``delta``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole: Any = None
        for event in events:
            part = _distribution(event, relation)
            whole = part if whole is None else whole.compose(part)
        return float(whole.get_epsilon_for_delta(delta))


def _distribution(event: Event, relation: str) -> Any:
    """PLD of one event, all its repetitions composed."""
    if isinstance(event, GaussianEvent):
        return _gaussian(1.0, event.noise_multiplier / math.sqrt(event.count), relation)
    if isinstance(event, PoissonGaussianEvent):
        one = _gaussian(event.sample_rate, event.noise_multiplier, relation)
        return one.self_compose(event.steps)
    if isinstance(event, TruncatedPoissonGaussianEvent):
        return _truncated(event.with_steps(1), relation).self_compose(event.steps)
    if isinstance(event, LaplaceEvent):
        return _laplace(event.noise_multiplier, relation).self_compose(event.count)
    if isinstance(event, ApproximateEvent):
        return _approximate(event.epsilon, event.delta, relation).self_compose(event.count)
    raise ConfigError(
        f"accountant 'pld': can not answer for {event.kind!r} events; only the accountant 'rdp' does"
    )


@lru_cache(maxsize=8)
def _gaussian(sample_rate: float, noise: float, relation: str) -> Any:
    """PLD of one Poisson-sampled Gaussian: the slow part, the same for every number of steps."""
    _check_noise(noise if relation == ADD_OR_REMOVE_ONE else noise / 2.0)
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=_GRID,
        sampling_prob=sample_rate,
        neighboring_relation=_library_relation(relation),
    )


@lru_cache(maxsize=8)
def _truncated(event: TruncatedPoissonGaussianEvent, relation: str) -> Any:
    """PLD of one step over a truncated Poisson sample (arXiv:2508.15089), at the largest number of units.

    Let n be the number of units, the one that is added included, and B the largest batch. When fewer than B of the
    others are drawn, nothing is cut and the step is the Poisson-sampled Gaussian. Otherwise (probability p) a unit that
    stays in the cut sample has taken the place of another: it moves the sum by up to 2 C, and stays with probability
    q' = q E[B / (k + 1)] over the number k >= B of others drawn. The library mixes the two.

    With n, p grows by orders of magnitude and q' falls by a share of about 1 / B, so that epsilon grows: the answer at
    the largest n covers all smaller ones (tests/accounting/test_truncated.py compares epsilon over n). It stops growing
    where about every second draw is cut, and a batch with less than one standard deviation of room is refused well
    before that.
    """
    mean = event.sample_rate * event.max_units
    if event.max_batch_size < min(mean + math.sqrt(mean), event.max_units):
        raise ConfigError(
            f"max batch size: {event.max_batch_size} is too near to the expected batch of {event.max_units} units "
            f"(sample rate * units = {mean:.6g}); give at least {math.ceil(mean + 4.5 * math.sqrt(mean))}"
        )
    _check_noise(event.noise_multiplier / 4.0)
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=event.max_units,
        sampling_probability=event.sample_rate,
        truncated_batch_size=event.max_batch_size,
        noise_multiplier=event.noise_multiplier,
        value_discretization_interval=_GRID,
        neighboring_relation=_library_relation(relation),
    )


@lru_cache(maxsize=8)
def _laplace(scale: float, relation: str) -> Any:
    own = scale if relation == ADD_OR_REMOVE_ONE else scale / 2.0
    _check_noise(own)
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_laplace_mechanism(
        parameter=own, value_discretization_interval=_GRID
    )


@lru_cache(maxsize=8)
def _approximate(epsilon: float, delta: float, relation: str) -> Any:
    if relation != ADD_OR_REMOVE_ONE:
        # The mechanism under a removal and an addition: (2 epsilon, (1 + e^epsilon) delta).
        delta = min(1.0, (1.0 + math.exp(min(epsilon, _MOST_EPSILON))) * delta)
        epsilon = 2.0 * epsilon
    if epsilon > _MOST_EPSILON:
        raise ConfigError(f"epsilon: {epsilon:g} of one mechanism is too much for the accountant 'pld'")
    from dp_accounting.pld import common, privacy_loss_distribution

    return privacy_loss_distribution.from_privacy_parameters(
        common.DifferentialPrivacyParameters(epsilon, delta), value_discretization_interval=_GRID
    )


def _library_relation(relation: str) -> Any:
    import dp_accounting

    known = dp_accounting.NeighboringRelation
    return known.ADD_OR_REMOVE_ONE if relation == ADD_OR_REMOVE_ONE else known.REPLACE_ONE


def _check_noise(noise: float) -> None:
    if noise < _LEAST_NOISE:
        raise ConfigError(
            f"noise multiplier: {noise:g} in all is too little for the accountant 'pld' (least "
            f"{_LEAST_NOISE:g}); give more noise, or the accountant 'rdp'"
        )
