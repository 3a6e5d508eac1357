"""Epsilon of a mechanism that is not run, or the noise, rate or steps that a target epsilon allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from synthward.engine.accounting import (
    ADD_OR_REMOVE_ONE,
    CyclicPoissonGaussianEvent,
    Event,
    HeadRoom,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    calibrate_noise_of,
    calibrate_sample_rate_of,
    calibrate_steps_of,
    cost_of_cap,
    epsilon_of,
)
from synthward.engine.accounting.accountant import check_accountant
from synthward.engine.accounting.events import (
    check_count,
    check_delta,
    check_epsilon,
    check_noise_multiplier,
    check_relation,
    check_sample_rate,
    check_steps,
)
from synthward.engine.accounting.head_room import largest_rate, starting_cap
from synthward.engine.errors import ConfigError

SAMPLINGS = ("poisson", "truncated", "cyclic", "none")
# Share of epsilon that truncation may cost before the user is told to leave more room.
MOST_COST = 0.01
_MOST_DEVIATIONS = 60.0


@dataclass(frozen=True)
class _Question:
    """What was asked; None for what is solved for."""

    noise_multiplier: float | None
    sample_rate: float | None
    steps: int | None
    delta: float
    target_epsilon: float | None
    accountant: str
    relation: str
    sampling: str
    max_batch_size: int | None
    max_units: int | None
    period: int | None
    bands: int | None

    @property
    def groups(self) -> int | None:
        """Of cyclic sampling, by either name."""
        return self.bands if self.period is None else self.period


def account(
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    *,
    delta: float,
    target_epsilon: float | None = None,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
    sampling: str = "poisson",
    max_batch_size: int | None = None,
    max_units: int | None = None,
    period: int | None = None,
    bands: int | None = None,
) -> dict[str, Any]:
    """Account for DP-SGD.

    Args:
        noise_multiplier, sample_rate, steps: all three, or all but the one that is solved for; no rate without
            sampling.
        delta: failure probability.
        target_epsilon: solve for the missing one; what is found meets the target from below.
        accountant: "pld", "rdp" or "prv".
        relation: "add_or_remove_one" or "replace_one".
        sampling: "poisson"; "truncated": Poisson, cut to ``max_batch_size`` (chosen with head-room if not given) of at
            most ``max_units`` units; "cyclic": Poisson from one of ``period`` groups after the other, for noise of at
            most as many bands, which may be given in its place; "none": every unit may be in every step.

    Returns:
        epsilon, delta, noise_multiplier, sample_rate, steps, accountant, relation, sampling; with truncated sampling
        also max_batch_size, max_units and truncation_cost (share of epsilon), with cyclic sampling period.

    Raises:
        ConfigError: an option is missing, superfluous or no mechanism.
    """
    question = _Question(
        noise_multiplier,
        1.0 if sampling == "none" and sample_rate is None else sample_rate,
        steps,
        delta,
        target_epsilon,
        accountant,
        relation,
        sampling,
        max_batch_size,
        max_units,
        period,
        bands,
    )
    _check(question)
    if sampling == "none" and sample_rate is not None:
        raise ConfigError("--sample-rate: has no meaning with --sampling none; leave it out")
    if sampling != "truncated":
        return _answer(question, None)
    assert max_units is not None
    if max_batch_size is not None:
        return _answer(question, max_batch_size)
    if sample_rate is None:
        raise ConfigError(
            "--max-batch-size: is missing; it can not be chosen before the sample rate is known"
        )
    deviations = 4.5
    while True:
        answer = _answer(question, starting_cap(sample_rate, max_units, deviations))
        deviations += 0.5
        if answer["truncation_cost"] < MOST_COST or deviations > _MOST_DEVIATIONS:
            return answer


def head_room_line(answer: dict[str, Any]) -> str | None:
    """What cutting the batches costs, in words; None where they are not cut."""
    if "truncation_cost" not in answer:
        return None
    cap, cost = answer["max_batch_size"], answer["truncation_cost"]
    line = f"head-room: batches of at most {cap} units cost {100.0 * cost:.3g}% of epsilon"
    if cost < MOST_COST:
        return line
    more = starting_cap(answer["sample_rate"], answer["max_units"])
    return f"{line}; a --max-batch-size of {max(more, cap + 1)} or more costs less"


def _answer(question: _Question, cap: int | None) -> dict[str, Any]:
    """Solve for what is missing, and account for the whole."""
    event_of = _events(question, cap)
    noise, rate, steps = question.noise_multiplier, question.sample_rate, question.steps
    target, delta = question.target_epsilon, question.delta
    kind, relation = question.accountant, question.relation
    if noise is None:
        assert target is not None and rate is not None and steps is not None
        q, n = rate, steps
        noise = calibrate_noise_of(lambda z: event_of(q, z, n), target, delta, kind, (), relation)
    elif rate is None:
        assert target is not None and steps is not None
        most = 1.0 if cap is None or question.max_units is None else largest_rate(cap, question.max_units)
        z, n = noise, steps
        rate = calibrate_sample_rate_of(
            lambda q: event_of(q, z, n), target, delta, kind, (), relation, most=most
        )
    elif steps is None:
        assert target is not None
        q, z = rate, noise
        steps = calibrate_steps_of(lambda n: event_of(q, z, n), target, delta, kind, (), relation)
    event = event_of(rate, noise, steps)
    answer: dict[str, Any] = {
        "epsilon": epsilon_of([event], delta, kind, relation),
        "delta": delta,
        "noise_multiplier": noise,
        "sample_rate": rate,
        "steps": steps,
        "accountant": kind,
        "relation": relation,
        "sampling": question.sampling,
    }
    if isinstance(event, TruncatedPoissonGaussianEvent):
        cost: HeadRoom = cost_of_cap(event, delta, kind, relation)
        more = {"max_batch_size": cap, "max_units": event.max_units, "truncation_cost": cost.cost}
        return answer | more
    return answer | ({"period": question.groups} if question.sampling == "cyclic" else {})


def _events(question: _Question, cap: int | None) -> Callable[[float, float, int], Event]:
    """(sample rate, noise multiplier, steps) to the event of this way of sampling."""
    units, period = question.max_units, question.groups

    def event_of(rate: float, noise: float, steps: int) -> Event:
        if cap is not None and units is not None:
            return TruncatedPoissonGaussianEvent(rate, noise, steps, cap, units)
        if period is not None:
            return CyclicPoissonGaussianEvent(rate, noise, period, steps)
        return PoissonGaussianEvent(rate, noise, steps)

    return event_of


def _check(question: _Question) -> None:
    check_delta(question.delta)
    check_accountant(question.accountant)
    check_relation(question.relation)
    _check_sampling(question)
    if question.noise_multiplier is not None:
        check_noise_multiplier(question.noise_multiplier)
    if question.sample_rate is not None:
        check_sample_rate(question.sample_rate)
    if question.steps is not None:
        check_steps(question.steps)
    given = {
        "noise-multiplier": question.noise_multiplier,
        "sample-rate": question.sample_rate,
        "steps": question.steps,
    }
    missing = [name for name, value in given.items() if value is None]
    if question.target_epsilon is None:
        if missing:
            raise ConfigError(f"--{missing[0]}: is missing; give it, or --target-epsilon to solve for it")
        return
    check_epsilon(question.target_epsilon)
    if len(missing) != 1:
        what = ", ".join(f"--{name}" for name in missing) or "none"
        raise ConfigError(
            "--target-epsilon: solves for exactly one of --noise-multiplier, --sample-rate and --steps; "
            f"left out: {what}"
        )


def _check_sampling(question: _Question) -> None:
    """Each way of sampling has options of its own; others are refused, so that none is silently left out."""
    if question.sampling not in SAMPLINGS:
        raise ConfigError(
            f"--sampling: got {question.sampling!r}; choose one of {', '.join(SAMPLINGS)} (shuffled or fixed-size "
            "batches are not amplified: none)"
        )
    own = {"truncated": ("max-units", "max-batch-size"), "cyclic": ("period", "bands")}.get(
        question.sampling, ()
    )
    given = {
        "max-batch-size": question.max_batch_size,
        "max-units": question.max_units,
        "period": question.period,
        "bands": question.bands,
    }
    for name, value in given.items():
        if value is not None and name not in own:
            raise ConfigError(f"--{name}: has no meaning with --sampling {question.sampling}")
        if value is not None:
            check_count(f"--{name}", value)
    if question.sampling == "truncated" and question.max_units is None:
        raise ConfigError("--max-units: is missing; --sampling truncated needs it")
    if question.sampling == "cyclic" and question.groups is None:
        raise ConfigError("--period: is missing; --sampling cyclic needs it (or --bands)")
    if question.period is not None and question.bands is not None:
        raise ConfigError("--bands: is another name of --period; give one of the two")
