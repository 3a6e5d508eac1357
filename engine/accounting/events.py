"""Privacy events: a closed set of kinds, so that reading one never runs code."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from synthward.engine.errors import ConfigError


@dataclass(frozen=True)
class PoissonGaussianEvent:
    """``steps`` Gaussian sums over Poisson samples of units; noise std / sensitivity is the multiplier."""

    kind: ClassVar[str] = "poisson_gaussian"
    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_sample_rate(self.sample_rate)
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.steps)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class GaussianEvent:
    """``count`` Gaussian mechanisms over all units; noise std / L2 sensitivity is the multiplier."""

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_steps(self.count)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


Event = PoissonGaussianEvent | GaussianEvent
_FIELDS: dict[str, dict[str, type]] = {
    PoissonGaussianEvent.kind: {"sample_rate": float, "noise_multiplier": float, "steps": int},
    GaussianEvent.kind: {"noise_multiplier": float, "count": int},
}


def event_from_dict(data: dict[str, Any]) -> Event:
    """An event from its dictionary; anything but the known kinds and fields is a `ConfigError`."""
    kind = data.get("kind") if isinstance(data, dict) else None
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None or set(data) != {"kind", *fields}:
        raise ConfigError(f"privacy event: {str(data)[:80]!r} is not of a known kind")
    values: dict[str, Any] = {}
    for name, expected in fields.items():
        value = data[name]
        good = isinstance(value, int) if expected is int else isinstance(value, int | float)
        if isinstance(value, bool) or not good:
            raise ConfigError(f"privacy event: field {name!r} is {value!r}, expected {expected.__name__}")
        values[name] = expected(value)
    return PoissonGaussianEvent(**values) if kind == PoissonGaussianEvent.kind else GaussianEvent(**values)


def check_sample_rate(value: float) -> None:
    if not (_is_number(value) and 0.0 < value <= 1.0):
        raise ConfigError(f"sample rate: got {value!r}; give a probability above 0 and at most 1")


def check_noise_multiplier(value: float) -> None:
    if not (_is_number(value) and value >= 0.0):
        raise ConfigError(f"noise multiplier: got {value!r}; give a finite number of at least 0")


def check_steps(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"steps: got {value!r}; give a whole number of at least 0")


def check_delta(value: float) -> None:
    if not (_is_number(value) and 0.0 < value < 1.0):
        raise ConfigError(f"delta: got {value!r}; give a number above 0 and below 1, well below 1 / units")


def check_epsilon(value: float) -> None:
    if not (_is_number(value) and value > 0.0):
        raise ConfigError(f"epsilon: got {value!r}; give a positive finite number, for example 3")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
