"""Epsilon of a list of events, by the dp-accounting library.

Neighbours differ by one unit added or removed. The PLD accountant runs on the library's default grid (1e-4),
pessimistic (connect-the-dots, Doroshenko et al. 2022). RDP under replace-one is not offered: the library's
answer there ignores the doubled sensitivity.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from synthward.engine.accounting.events import (
    Event,
    GaussianEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    StepsEvent,
    check_delta,
    is_event,
)
from synthward.engine.errors import ConfigError

ACCOUNTANTS = ("pld", "rdp", "prv")
RELATION = "add_or_remove_one"
# The library's own default; results are pinned to it.
_GRID = 1e-4
# A PLD's size grows with 1 / noise^2: below this it takes minutes and gigabytes, for an epsilon of hundreds.
_LEAST_PLD_NOISE = 0.05


class Accountant:
    """Composes events and says epsilon.

    Args:
        kind: "pld" (default), "rdp", or "prv" (needs the prv-accountant package).
        relation: only "add_or_remove_one" is offered here.
    """

    def __init__(self, kind: str = "pld", relation: str = RELATION) -> None:
        if kind not in ACCOUNTANTS:
            raise ConfigError(f"accountant: got {kind!r}; choose one of {', '.join(ACCOUNTANTS)}")
        if relation != RELATION:
            raise ConfigError(f"neighbouring relation: got {relation!r}; only {RELATION!r} is offered")
        self.kind, self.relation = kind, relation
        self._events: list[Event] = []

    @property
    def events(self) -> tuple[Event, ...]:
        """What was composed so far."""
        return tuple(self._events)

    def compose(self, event: Event) -> None:
        """Add an event; like events in a row are merged."""
        if not is_event(event):
            raise TypeError(f"event: got {type(event).__name__}, expected a privacy event")
        self._events = merge_events([*self._events, event])

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta``; infinite when some event has no noise, zero when nothing was spent."""
        return epsilon_of(self._events, delta, self.kind)


def epsilon_of(events: Iterable[Event], delta: float, accountant: str = "pld") -> float:
    """Epsilon of the composition of ``events`` at ``delta``."""
    check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise ConfigError(f"accountant: got {accountant!r}; choose one of {', '.join(ACCOUNTANTS)}")
    merged = merge_events(events)
    for event in merged:
        if not isinstance(event, PoissonGaussianEvent | GaussianEvent):
            raise ConfigError(f"accountant: can not answer for {event.kind!r} events")
    if any(event.noise_multiplier == 0.0 for event in merged):
        return math.inf
    if not merged:
        return 0.0
    return _epsilon(tuple(merged), delta, accountant)


@lru_cache(maxsize=512)
def _epsilon(events: tuple[Event, ...], delta: float, accountant: str) -> float:
    if accountant == "prv":
        return _prv_epsilon(events, delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return _pld_epsilon(events, delta) if accountant == "pld" else _rdp_epsilon(events, delta)


def epsilon_curve(
    events: Sequence[Event], delta: float, points: int = 20, accountant: str = "pld"
) -> list[tuple[int, float]]:
    """(step, epsilon) at about ``points`` steps, the queries charged at step 0."""
    queries = [e for e in events if isinstance(e, GaussianEvent)]
    trained = [e for e in events if isinstance(e, PoissonGaussianEvent)]
    total = sum(e.steps for e in trained)
    marks = sorted({round(total * i / max(points - 1, 1)) for i in range(points)} | {0, total})
    curve = []
    for mark in marks:
        left, taken = mark, list[Event](queries)
        for event in trained:
            steps = min(left, event.steps)
            left -= steps
            if steps:
                taken.append(PoissonGaussianEvent(event.sample_rate, event.noise_multiplier, steps))
        curve.append((mark, epsilon_of(taken, delta, accountant)))
    return curve


def merge_events(events: Iterable[Event]) -> list[Event]:
    """Equal mechanisms together, empty ones gone, queries first: composition does not depend on order.

    Events that are one mechanism each stay apart: their cost is not a sum over steps.
    """
    merged: dict[object, Event] = {}
    for at, event in enumerate(events):
        key, times = _without_times(event)
        if times == 0:
            continue
        kept = merged.get(key if key is not None else at)
        if key is None or kept is None:
            merged[at if key is None else key] = event
        else:
            merged[key] = _with_times(event, times + _without_times(kept)[1])
    return sorted(merged.values(), key=lambda event: isinstance(event, StepsEvent))


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


@lru_cache(maxsize=8)
def _pld(sample_rate: float, noise: float) -> Any:
    """PLD of one Poisson-sampled Gaussian: the slow part, the same for every number of steps."""
    if noise < _LEAST_PLD_NOISE:
        raise ConfigError(
            f"noise multiplier: {noise:g} in all is too little for the accountant 'pld' (least "
            f"{_LEAST_PLD_NOISE:g}); give more noise, or the accountant 'rdp'"
        )
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=_GRID,
        sampling_prob=sample_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _pld_epsilon(events: Sequence[Event], delta: float) -> float:
    """As the library's PLDAccountant composes: Gaussians in closed form, sampled ones by self-composition."""
    whole: Any = None
    for event in events:
        if isinstance(event, GaussianEvent):
            part = _pld(1.0, event.noise_multiplier / math.sqrt(event.count))
        else:
            part = _pld(event.sample_rate, event.noise_multiplier).self_compose(event.steps)
        whole = part if whole is None else whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


def _rdp_epsilon(events: Sequence[Event], delta: float) -> float:
    import dp_accounting
    from dp_accounting import rdp

    built = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    # The library drops orders that do not converge (the bound stays valid) and warns once for each.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for event in events:
            gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            if isinstance(event, GaussianEvent):
                built.compose(gaussian, event.count)
            else:
                built.compose(dp_accounting.PoissonSampledDpEvent(event.sample_rate, gaussian), event.steps)
        return float(built.get_epsilon(delta))
    finally:
        logger.setLevel(level)


def _prv_epsilon(events: Sequence[Event], delta: float) -> float:
    """Proven upper bound of the PRV accountant (Gopi et al. 2021)."""
    try:
        import prv_accountant
    except ImportError:
        raise ConfigError(
            "accountant 'prv' needs the package prv-accountant; install it, or use 'pld' (the default)"
        ) from None
    sampled = [
        (e.sample_rate, e.noise_multiplier, e.steps)
        if isinstance(e, PoissonGaussianEvent)
        else (1.0, e.noise_multiplier, e.count)
        for e in events
    ]
    prvs = [
        prv_accountant.GaussianMechanism(noise_multiplier=noise)
        if rate == 1.0
        else prv_accountant.PoissonSubsampledGaussianMechanism(
            noise_multiplier=noise, sampling_probability=rate
        )
        for rate, noise, _ in sampled
    ]
    counts = [n for _, _, n in sampled]
    try:
        built = prv_accountant.PRVAccountant(
            prvs=prvs, max_self_compositions=counts, eps_error=0.01, delta_error=delta * 1e-4
        )
        return float(built.compute_epsilon(delta=delta, num_self_compositions=counts)[2])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"accountant 'prv' can not answer here ({error}); use 'pld' (the default)"
        ) from None
