"""Privacy events: a closed set of kinds, so that reading one never runs code.

An event says what was released, in public numbers only. The noise multiplier is the noise's standard deviation (or
Laplace's scale) over the bound C of one unit's contribution, in every neighbouring relation; the accountant knows
that replacing a unit may move a sum by 2 C. An event of steps has `with_steps`. Where its class says
`is_one_mechanism`, consecutive steps under one key are one mechanism, whose cost is not a sum over steps: they are
charged as one event with their steps added up.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self, cast

from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import ConfigError

# Neighbours: one unit more or less, or one unit replaced by another.
ADD_OR_REMOVE_ONE = "add_or_remove_one"
REPLACE_ONE = "replace_one"
RELATIONS = (ADD_OR_REMOVE_ONE, REPLACE_ONE)
# Whole numbers up to here are exact in float64, which the accountants compute in.
MOST_COUNT = 10**15


class _Event:
    """What all events have."""

    kind: ClassVar[str]
    # Whether leases in a row under one key are prefixes of one mechanism, charged with their steps added up.
    is_one_mechanism: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries; `event_from_dict` gives an equal event back."""
        return {"kind": self.kind, **asdict(cast(Any, self))}


class _StepsEvent(_Event):
    """What events of training steps have."""

    def with_steps(self, steps: int) -> Self:
        """The same mechanism for another number of steps."""
        return cast(Self, replace(cast(Any, self), steps=steps))


@dataclass(frozen=True)
class PoissonGaussianEvent(_StepsEvent):
    """``steps`` Gaussian sums over Poisson samples of units; noise std / sensitivity is the multiplier."""

    kind: ClassVar[str] = "poisson_gaussian"
    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_sample_rate(self.sample_rate)
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.steps)


@dataclass(frozen=True)
class TruncatedPoissonGaussianEvent(_StepsEvent):
    """As `PoissonGaussianEvent`, but a draw of more than ``max_batch_size`` units is cut to a uniform part of it.

    ``max_units`` is a public upper bound of the number of units, never their number.
    """

    kind: ClassVar[str] = "truncated_poisson_gaussian"
    sample_rate: float
    noise_multiplier: float
    steps: int
    max_batch_size: int
    max_units: int

    def __post_init__(self) -> None:
        check_sample_rate(self.sample_rate)
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.steps)
        check_count("max batch size", self.max_batch_size)
        check_count("max units", self.max_units)


@dataclass(frozen=True)
class CyclicPoissonGaussianEvent(_StepsEvent):
    """Steps over Poisson samples of one group of units after the other.

    Each unit is in one of ``period`` groups, drawn independently and at random; step t draws from group t mod
    ``period`` with probability ``sample_rate``. The noise may be correlated by a strategy of at most ``period`` bands
    whose columns have norm 1: this costs ceil(steps / period) rounds of the Poisson-sampled Gaussian
    (Choquette-Choo et al. 2023, theorem 4).
    """

    kind: ClassVar[str] = "cyclic_poisson_gaussian"
    is_one_mechanism: ClassVar[bool] = True
    sample_rate: float
    noise_multiplier: float
    period: int
    steps: int

    def __post_init__(self) -> None:
        check_sample_rate(self.sample_rate)
        check_noise_multiplier(self.noise_multiplier)
        check_count("period", self.period)
        check_steps(self.steps)

    @property
    def rounds(self) -> int:
        """How often one unit can take part."""
        return -(-self.steps // self.period)


@dataclass(frozen=True)
class CorrelatedGaussianEvent(_StepsEvent):
    """Steps whose noise is correlated by a strategy matrix; no amplification by sampling is claimed.

    Each unit takes part at most once in any ``period`` steps in a row. All steps together are one Gaussian mechanism.
    The multiplier is the standard deviation of the white noise over the bound C of one step's contribution.
    """

    kind: ClassVar[str] = "correlated_gaussian"
    is_one_mechanism: ClassVar[bool] = True
    noise_multiplier: float
    strategy: Strategy
    period: int
    steps: int

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(f"strategy: got {type(self.strategy).__name__}, expected a Strategy")
        check_count("period", self.period)
        check_steps(self.steps)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "noise_multiplier": self.noise_multiplier,
            "strategy": self.strategy.to_dict(),
            "period": self.period,
            "steps": self.steps,
        }

    @property
    def gaussian(self) -> GaussianEvent:
        """The one Gaussian mechanism that all steps together are."""
        if self.steps == 0:
            return GaussianEvent(self.noise_multiplier, 0)
        return GaussianEvent(self.noise_multiplier / self.strategy.sensitivity(self.steps, self.period), 1)


@dataclass(frozen=True)
class FixedSizeGaussianEvent(_StepsEvent):
    """Gaussian sums over ``batch_size`` of ``num_units`` units, drawn without replacement in each step.

    Only for neighbours that replace a unit: the number of units is public here.
    """

    kind: ClassVar[str] = "fixed_size_gaussian"
    num_units: int
    batch_size: int
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_count("number of units", self.num_units)
        check_count("batch size", self.batch_size)
        if self.batch_size > self.num_units:
            raise ConfigError(
                f"batch size: got {self.batch_size}, more than the {self.num_units} units that there are"
            )
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.steps)


@dataclass(frozen=True)
class GaussianEvent(_Event):
    """``count`` Gaussian mechanisms over all units; noise std / L2 sensitivity is the multiplier."""

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.count, "count")


@dataclass(frozen=True)
class LaplaceEvent(_Event):
    """``count`` Laplace mechanisms over all units; scale / L1 sensitivity is the multiplier."""

    kind: ClassVar[str] = "laplace"
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.count, "count")


@dataclass(frozen=True)
class ApproximateEvent(_Event):
    """``count`` mechanisms of which nothing is known but that each is (epsilon, delta)-private.

    For neighbours that differ by one unit added or removed.
    """

    kind: ClassVar[str] = "approximate"
    epsilon: float
    delta: float
    count: int = 1

    def __post_init__(self) -> None:
        if not (_is_number(self.epsilon) and self.epsilon >= 0.0):
            raise ConfigError(f"epsilon: got {self.epsilon!r}; give a finite number of at least 0")
        if not (_is_number(self.delta) and 0.0 <= self.delta < 1.0):
            raise ConfigError(f"delta: got {self.delta!r}; give a number of at least 0 and below 1")
        check_steps(self.count, "count")


@dataclass(frozen=True)
class SelectionEvent(_Event):
    """The best of a random number of trials, each of them the composition of the ``inner`` events.

    Only the best trial's output is released. The number of trials is drawn from the truncated negative binomial
    distribution of this mean and shape: 0 logarithmic, 1 geometric, infinity Poisson (Papernot & Steinke 2022).
    """

    kind: ClassVar[str] = "selection"
    inner: tuple[Event, ...]
    mean_trials: float
    shape: float

    def __post_init__(self) -> None:
        if not isinstance(self.inner, tuple) or not self.inner:
            raise ConfigError("selection: give the events of one trial, at least one")
        for event in self.inner:
            if not is_event(event) or isinstance(event, SelectionEvent):
                raise ConfigError(
                    f"selection: a trial can not hold {str(event)[:80]!r}; give events of other kinds"
                )
        if not (_is_number(self.mean_trials) and self.mean_trials >= 1.0):
            raise ConfigError(f"mean trials: got {self.mean_trials!r}; give a finite number of at least 1")
        if self.shape != math.inf and not (_is_number(self.shape) and self.shape >= 0.0):
            raise ConfigError(
                f"shape: got {self.shape!r}; give a number of at least 0, or infinity for Poisson"
            )

    def to_dict(self) -> dict[str, Any]:
        # JSON has no infinity.
        return {
            "kind": self.kind,
            "inner": [event.to_dict() for event in self.inner],
            "mean_trials": self.mean_trials,
            "shape": "poisson" if self.shape == math.inf else self.shape,
        }


StepsEvent = (
    PoissonGaussianEvent
    | TruncatedPoissonGaussianEvent
    | CyclicPoissonGaussianEvent
    | CorrelatedGaussianEvent
    | FixedSizeGaussianEvent
)
Event = StepsEvent | GaussianEvent | LaplaceEvent | ApproximateEvent | SelectionEvent
_KINDS: dict[str, type[Event]] = {event.kind: event for event in Event.__args__}
# Beside numbers: what else a field may hold.
_FIELDS: dict[str, dict[str, type]] = {
    PoissonGaussianEvent.kind: {"sample_rate": float, "noise_multiplier": float, "steps": int},
    TruncatedPoissonGaussianEvent.kind: {
        "sample_rate": float,
        "noise_multiplier": float,
        "steps": int,
        "max_batch_size": int,
        "max_units": int,
    },
    CyclicPoissonGaussianEvent.kind: {
        "sample_rate": float,
        "noise_multiplier": float,
        "period": int,
        "steps": int,
    },
    CorrelatedGaussianEvent.kind: {"noise_multiplier": float, "strategy": dict, "period": int, "steps": int},
    FixedSizeGaussianEvent.kind: {
        "num_units": int,
        "batch_size": int,
        "noise_multiplier": float,
        "steps": int,
    },
    GaussianEvent.kind: {"noise_multiplier": float, "count": int},
    LaplaceEvent.kind: {"noise_multiplier": float, "count": int},
    ApproximateEvent.kind: {"epsilon": float, "delta": float, "count": int},
    SelectionEvent.kind: {"inner": list, "mean_trials": float, "shape": float},
}


def event_from_dict(data: dict[str, Any]) -> Event:
    """An event from its dictionary; anything but the known kinds and fields is a `ConfigError`."""
    kind = data.get("kind") if isinstance(data, dict) else None
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if kind is None or fields is None or set(data) != {"kind", *fields}:
        raise ConfigError(f"privacy event: {str(data)[:80]!r} is not of a known kind")
    values = {name: _field(name, data[name], expected) for name, expected in fields.items()}
    return _KINDS[kind](**values)


def _field(name: str, value: Any, expected: type) -> Any:
    """One field of an event, of exactly the type that it should have."""
    if expected is dict and isinstance(value, dict):
        return Strategy.from_dict(value)
    if expected is list and isinstance(value, list):
        # A selection holds no other: checked here too, so that a nested text can not exhaust the stack.
        if any(isinstance(item, dict) and item.get("kind") == SelectionEvent.kind for item in value):
            raise ConfigError("privacy event: a selection inside a selection")
        return tuple(event_from_dict(item) for item in value)
    if name == "shape" and value == "poisson":
        return math.inf
    good = expected in (int, float) and isinstance(value, int if expected is int else int | float)
    if isinstance(value, bool) or not good:
        raise ConfigError(
            f"privacy event: field {name!r} is {str(value)[:80]!r}, expected {expected.__name__}"
        )
    try:
        return expected(value)
    except OverflowError:
        raise ConfigError(f"privacy event: field {name!r} is too large a number") from None


def is_event(value: object) -> bool:
    """Whether this is one of the known events."""
    return isinstance(value, Event)


def has_no_noise(event: Event) -> bool:
    """Whether the event releases what it measures as it is."""
    if isinstance(event, SelectionEvent):
        return any(has_no_noise(inner) for inner in event.inner)
    return not isinstance(event, ApproximateEvent) and event.noise_multiplier == 0.0


def check_relation(value: str) -> None:
    if value not in RELATIONS:
        raise ConfigError(f"neighbouring relation: got {value!r}; choose one of {', '.join(RELATIONS)}")


def check_sample_rate(value: float) -> None:
    if not (_is_number(value) and 0.0 < value <= 1.0):
        raise ConfigError(f"sample rate: got {value!r}; give a probability above 0 and at most 1")


def check_noise_multiplier(value: float) -> None:
    # Beyond that its square is no number any more, which accountants take.
    if not (_is_number(value) and 0.0 <= value <= 1e100):
        raise ConfigError(f"noise multiplier: got {value!r}; give a finite number of at least 0")


def check_steps(value: int, name: str = "steps") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_COUNT:
        raise ConfigError(
            f"{name}: got {str(value)[:80]}; give a whole number of at least 0 and at most 10^15"
        )


def check_delta(value: float) -> None:
    if not (_is_number(value) and 0.0 < value < 1.0):
        raise ConfigError(f"delta: got {value!r}; give a number above 0 and below 1, well below 1 / units")


def check_epsilon(value: float) -> None:
    if not (_is_number(value) and value > 0.0):
        raise ConfigError(f"epsilon: got {value!r}; give a positive finite number, for example 3")


def check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNT:
        raise ConfigError(
            f"{name}: got {str(value)[:80]}; give a whole number of at least 1 and at most 10^15"
        )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
