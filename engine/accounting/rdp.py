"""Renyi-differential privacy of events: curves over orders, and epsilon from them.

The curves are the dp-accounting library's where it is right. Under replace-one it ignores that the sensitivity doubles
(its issue 378): there the pure Gaussian and Laplace mechanisms are taken with half of their noise, which is exact, and
so are fixed-size samples without replacement; Poisson-sampled ones are refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    ApproximateEvent,
    Event,
    FixedSizeGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.engine.accounting.selection import selection_curve
from synthward.engine.errors import ConfigError

Curve = NDArray[np.float64]

# Those of the library, which are good for Gaussians in the regime of interest.
ORDERS: tuple[float, ...] = (
    *(1.0 + x / 10.0 for x in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    *(128.0, 256.0, 512.0, 1024.0),
)


def rdp_epsilon(events: Sequence[Event], delta: float, relation: str = ADD_OR_REMOVE_ONE) -> float:
    """Least epsilon over the library's orders, at ``delta``.

    An approximate mechanism is, with probability 1 - its delta, a pure one (Kairouz, Oh & Viswanath 2015, theorem 3.1):
    the curves are of those, and what the deltas leave of ``delta`` pays for them.
    """
    from dp_accounting import rdp

    kept = 1.0
    for event in events:
        if isinstance(event, ApproximateEvent):
            kept *= (1.0 - as_seen(event, relation).delta) ** event.count
    left = (delta - (1.0 - kept)) / kept if kept > 0.0 else 0.0
    if left <= 0.0:
        return math.inf
    curve = rdp_curve(events, ORDERS, relation)
    with _quiet():
        return float(rdp.compute_epsilon(ORDERS, curve, left)[0])


def rdp_curve(events: Sequence[Event], orders: Sequence[float], relation: str = ADD_OR_REMOVE_ONE) -> Curve:
    """RDP of the composition at each order; the deltas of approximate events are not in it.

    Args:
        events: simplified events (`accountant.simplified`).
        orders: above 1.

    Returns:
        float64 [orders]; infinite where an order did not converge.
    """
    total = np.zeros(len(orders))
    with _quiet():
        for event in events:
            total += _curve(event, orders, relation)
    # Round-off of the library at extreme settings; an order that is left out only loosens the bound.
    return np.where(np.isnan(total) | (total < 0.0), np.inf, total)


def _curve(event: Event, orders: Sequence[float], relation: str) -> Curve:
    if isinstance(event, SelectionEvent):
        if any(isinstance(inner, ApproximateEvent) and inner.delta > 0.0 for inner in event.inner):
            raise ConfigError("accountant 'rdp': can not answer for approximate events inside a selection")
        trial = rdp_curve(event.inner, orders, relation)
        return selection_curve(orders, trial, event.mean_trials, event.shape)
    if isinstance(event, TruncatedPoissonGaussianEvent):
        _refuse_replaced(event, relation)
        return event.steps * _truncated_curve(event, orders)
    if isinstance(event, ApproximateEvent):
        epsilon = as_seen(event, relation).epsilon
        # Bun & Steinke 2016, proposition 3.3.
        return event.count * np.minimum(epsilon, 0.5 * epsilon * epsilon * np.asarray(orders))
    return _library_curve(event, orders, relation)


def _library_curve(event: Event, orders: Sequence[float], relation: str) -> Curve:
    """By the library's accountant, with the noise that the relation leaves."""
    import dp_accounting

    halved = 1.0 if relation == ADD_OR_REMOVE_ONE else 0.5
    if isinstance(event, GaussianEvent):
        return _composed(dp_accounting.GaussianDpEvent(halved * event.noise_multiplier), event.count, orders)
    if isinstance(event, LaplaceEvent):
        return _composed(dp_accounting.LaplaceDpEvent(halved * event.noise_multiplier), event.count, orders)
    if isinstance(event, PoissonGaussianEvent):
        if event.sample_rate == 1.0:
            return _library_curve(GaussianEvent(event.noise_multiplier, event.steps), orders, relation)
        _refuse_replaced(event, relation)
        return event.steps * _poisson_curve(event.sample_rate, event.noise_multiplier, orders)
    if isinstance(event, FixedSizeGaussianEvent):
        if relation == ADD_OR_REMOVE_ONE:
            raise ConfigError(
                "fixed-size batches without replacement: are private only between neighbours that replace a "
                "unit; give the relation 'replace_one' and the accountant 'rdp', or sample by Poisson"
            )
        gaussian = dp_accounting.GaussianDpEvent(halved * event.noise_multiplier)
        sampled = dp_accounting.SampledWithoutReplacementDpEvent(event.num_units, event.batch_size, gaussian)
        return _composed(sampled, event.steps, orders, dp_accounting.NeighboringRelation.REPLACE_ONE)
    raise ConfigError(f"accountant 'rdp': can not answer for {event.kind!r} events")


def _poisson_curve(sample_rate: float, noise: float, orders: Sequence[float]) -> Curve:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(noise)
    return _composed(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), 1, orders)


def _composed(event: Any, count: int, orders: Sequence[float], relation: Any = None) -> Curve:
    import dp_accounting
    from dp_accounting import rdp

    known = relation or dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    built = rdp.RdpAccountant(orders=orders, neighboring_relation=known)
    return np.asarray(built.compose(event, count).rdp, dtype=np.float64)


def _truncated_curve(event: TruncatedPoissonGaussianEvent, orders: Sequence[float]) -> Curve:
    """RDP of one step over a truncated Poisson sample, for any number of units up to the largest.

    As in `pld._truncated`, whether B of the others are drawn does not depend on the unit. Given that they are
    (probability at most p, that of the largest number of units), the sample without the unit is a uniform part S of
    size B, and with it, with probability q' <= q B / (B + 1), S with one member y in exchange for the unit. Over the
    same (S, y) the pair is the Poisson-sampled Gaussian of rate q' with a shift of at most 2 C. exp((a - 1) D_a) of a
    mixture is at most the mixture of those (joint convexity), and that grows with p and q' when the part of the cut
    samples is not below the other.
    """
    noise, cap = event.noise_multiplier, event.max_batch_size
    whole = _poisson_curve(event.sample_rate, noise, orders)
    cut = float(binom.sf(cap - 1, event.max_units - 1, event.sample_rate))
    if cut == 0.0:
        return whole
    crowded = _poisson_curve(event.sample_rate * cap / (cap + 1), noise / 2.0, orders)
    above = np.asarray(orders) - 1.0
    free = math.log1p(-cut) if cut < 1.0 else -math.inf
    return np.asarray(
        np.logaddexp(free + above * whole, math.log(cut) + above * np.maximum(crowded, whole)) / above
    )


def as_seen(event: ApproximateEvent, relation: str) -> ApproximateEvent:
    """An approximate mechanism for this relation: replacing is a removal and an addition."""
    if relation == ADD_OR_REMOVE_ONE:
        return event
    grown = (1.0 + math.exp(min(event.epsilon, 700.0))) * event.delta
    if grown >= 1.0:
        raise ConfigError(
            "approximate event: its epsilon and delta say nothing about neighbours that replace a unit"
        )
    return ApproximateEvent(2.0 * event.epsilon, grown, event.count)


def _refuse_replaced(event: Event, relation: str) -> None:
    if relation != ADD_OR_REMOVE_ONE:
        raise ConfigError(
            f"accountant 'rdp': can not answer for {event.kind!r} events under the relation {relation!r}, where "
            "the library ignores the doubled sensitivity; use 'pld'"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The library drops orders that do not converge (the bound stays valid) and warns once for each."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            yield
    finally:
        logger.setLevel(level)
