"""The charged mechanisms of a ledger in words; each sentence is made from the event's own fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from synthward.engine.accounting import (
    ApproximateEvent,
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    Event,
    FixedSizeGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.report.documents import Mechanism, Unit
from synthward.report.numbers import exact

TRAINING = (
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    CyclicPoissonGaussianEvent,
    CorrelatedGaussianEvent,
    FixedSizeGaussianEvent,
)
SAMPLED = (PoissonGaussianEvent, TruncatedPoissonGaussianEvent, CyclicPoissonGaussianEvent)
QUERIES = (GaussianEvent, LaplaceEvent, ApproximateEvent)


def describe_events(events: Iterable[Event], unit: Unit) -> tuple[Mechanism, ...]:
    """One `Mechanism` per event, in the order given."""
    return tuple(describe_event(event, unit) for event in events)


def describe_event(event: Event, unit: Unit) -> Mechanism:
    """An event in words; raises KeyError for a kind that this page does not know."""
    title, write = _WORDS[event.kind]
    parameters = {name: value for name, value in event.to_dict().items() if name != "kind"}
    return Mechanism(kind=event.kind, title=title, text=write(event, unit.noun), parameters=_json(parameters))


def flatten(events: Iterable[Event]) -> list[Event]:
    """The events, with those of a selection's trials in its place."""
    flat: list[Event] = []
    for event in events:
        flat += event.inner if isinstance(event, SelectionEvent) else (event,)
    return flat


def _noise(event: Any) -> str:
    if event.noise_multiplier == 0.0:
        return "No noise is added"
    return f"Gaussian noise of {exact(event.noise_multiplier)} times that bound is added to their sum"


def _poisson(event: Any, noun: str) -> str:
    return (
        f"{event.steps:,} training steps. In each, every {noun} is drawn independently with probability "
        f"{exact(event.sample_rate)} (Poisson sampling), the contribution of each drawn {noun} is bounded, and "
        f"{_small(_noise(event))}."
    )


def _truncated(event: Any, noun: str) -> str:
    return (
        f"{_poisson(event, noun)} A draw of more than {event.max_batch_size:,} {noun}s is cut to a random part of "
        f"that size; what this adds is charged for at most {event.max_units:,} {noun}s, a public upper bound."
    )


def _cyclic(event: Any, noun: str) -> str:
    return (
        f"{event.steps:,} training steps. Every {noun} belongs, by a random draw of its own, to one of "
        f"{event.period:,} groups that take turns; in its group's turn it is drawn independently with probability "
        f"{exact(event.sample_rate)}, so it can take part at most {event.rounds:,} times. The contribution of each "
        f"drawn {noun} is bounded, and {_small(_noise(event))}; the noise of successive steps may be correlated "
        "(banded matrix factorization)."
    )


def _correlated(event: Any, noun: str) -> str:
    return (
        f"{event.steps:,} training steps whose noise is correlated by a strategy matrix ({event.strategy.kind}). "
        f"Every {noun} takes part at most once in any {event.period:,} steps in a row. Its contribution is bounded, "
        f"and {_small(_noise(event))} before the correlation. All steps together are accounted as one Gaussian "
        f"mechanism of multiplier {exact(event.gaussian.noise_multiplier)}; sampling is not claimed to add privacy."
    )


def _fixed_size(event: Any, noun: str) -> str:
    return (
        f"{event.steps:,} training steps. Each draws {event.batch_size:,} of {event.num_units:,} {noun}s without "
        f"replacement; the number of {noun}s is public here. The contribution of each drawn {noun} is bounded, and "
        f"{_small(_noise(event))}."
    )


def _gaussian(event: Any, noun: str) -> str:
    return (
        f"{_times(event.count, 'query')} over all {noun}s. Gaussian noise of {exact(event.noise_multiplier)} times "
        f"the most that one {noun} can move the whole answer (L2 norm) is added."
    )


def _laplace(event: Any, noun: str) -> str:
    return (
        f"{_times(event.count, 'query')} over all {noun}s. Laplace noise with a scale of "
        f"{exact(event.noise_multiplier)} times the most that one {noun} can move the whole answer (L1 norm) is "
        "added."
    )


def _approximate(event: Any, noun: str) -> str:
    return (
        f"{_times(event.count, 'mechanism')} over all {noun}s of which nothing is used but that each is "
        f"({exact(event.epsilon)}, {exact(event.delta)})-differentially private."
    )


def _selection(event: Any, noun: str) -> str:
    law = {0.0: "logarithmic", 1.0: "geometric", math.inf: "Poisson"}.get(event.shape)
    law = law or f"truncated negative binomial, shape {exact(event.shape)}"
    inner = " ".join(f"{_WORDS[e.kind][0]}: {_WORDS[e.kind][1](e, noun)}" for e in event.inner)
    return (
        f"The best of a random number of trials ({law} distribution, {exact(event.mean_trials)} on average); the "
        f"others are not released. Each trial consists of: {inner}"
    )


_WORDS: dict[str, tuple[str, Callable[[Any, str], str]]] = {
    PoissonGaussianEvent.kind: ("Training with Poisson sampling", _poisson),
    TruncatedPoissonGaussianEvent.kind: ("Training with truncated Poisson sampling", _truncated),
    CyclicPoissonGaussianEvent.kind: ("Training with groups that take turns", _cyclic),
    CorrelatedGaussianEvent.kind: ("Training with correlated noise", _correlated),
    FixedSizeGaussianEvent.kind: ("Training with batches of fixed size", _fixed_size),
    GaussianEvent.kind: ("Queries with Gaussian noise", _gaussian),
    LaplaceEvent.kind: ("Queries with Laplace noise", _laplace),
    ApproximateEvent.kind: ("Mechanisms known by their guarantee", _approximate),
    SelectionEvent.kind: ("Selection among trials", _selection),
}


def _small(text: str) -> str:
    # "Gaussian" keeps its capital; only a sentence's first word loses it.
    return text if text.startswith("Gaussian") else text[0].lower() + text[1:]


def _times(count: int, thing: str) -> str:
    many = {"query": "queries"}.get(thing, f"{thing}s")
    return f"One {thing}" if count == 1 else f"{count:,} {many}"


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, (list, tuple)) else value
