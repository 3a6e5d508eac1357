"""The mechanism of a run's training steps: sampling, correlation of the noise, arithmetic. All of it is public."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from synthward.engine import PrivacyPlan
from synthward.engine.accounting import calibrate_noise
from synthward.engine.accounting.events import StepsEvent, TruncatedPoissonGaussianEvent, check_count
from synthward.engine.accounting.head_room import HeadRoom, cost_of_cap, head_room
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.correlation import banded_inverse_strategy, banded_strategy, blt_strategy
from synthward.engine.errors import CheckpointError, ConfigError
from synthward.engine.spec import NoiseSpec, SamplingSpec

NOISES = ("independent", "banded", "blt", "banded-inverse")
_BANDS = 8
# Buffers of a buffered linear Toeplitz strategy; more gain less than a percent.
_BUFFERS = 3


@dataclass(frozen=True)
class Mechanism:
    """What of a `PrivacyPlan` is fixed before the records are read (see there for the fields)."""

    sample_rate: float
    period: int = 1
    strategy: Strategy | None = None
    max_batch_size: int | None = None
    max_units: int | None = None
    arithmetic: str = "float"

    @classmethod
    def choose(
        cls,
        sample_rate: float,
        steps: int,
        *,
        epsilon: float,
        delta: float,
        accountant: str = "pld",
        noise: str = "independent",
        bands: int | None = None,
        max_units: int | None = None,
        arithmetic: str = "float",
    ) -> Mechanism:
        """The mechanism of user's options; batches are of the size that `sample_rate` would give without groups.

        Args:
            noise: "independent", or a strategy that correlates it over steps. "banded" keeps the amplification of
                sampling, each group being drawn from every `bands` steps; for the others each unit takes part once in
                about ``1 / sample_rate`` steps and nothing is claimed of sampling.
            bands: of "banded" and "banded-inverse"; None is 8, or as many as there are steps.
            max_units: public bound on the number of units: draws are then cut to a static size, chosen so that it costs
                less than 1 % of epsilon.
        """
        if noise not in NOISES:
            raise ConfigError(f"noise: got {noise!r}; choose one of {', '.join(NOISES)}")
        NoiseSpec(1.0, None, arithmetic)
        if max_units is not None:
            check_count("max units", max_units)
        if noise == "independent":
            cap = None
            if max_units is not None:
                uncut = calibrate_noise(epsilon, delta, sample_rate, steps, accountant)
                cap = head_room(sample_rate, max_units, uncut, steps, delta, accountant).max_batch_size
            return cls(sample_rate, max_batch_size=cap, max_units=max_units, arithmetic=arithmetic)
        if max_units is not None or arithmetic != "float":
            raise ConfigError(
                f"noise: {noise!r} goes with float arithmetic and without --max-units; leave these out, or use "
                "independent noise"
            )
        bands = min(_BANDS, steps) if bands is None else bands
        check_count("bands", bands)
        if noise == "banded":
            if isinstance(bands, bool) or not isinstance(bands, int) or not 1 <= bands <= steps:
                raise ConfigError(f"bands: got {bands!r}; give a whole number from 1 to the number of steps")
            return cls(min(1.0, sample_rate * bands), bands, banded_strategy(steps, bands))
        period = max(1, min(steps, math.floor(1.0 / sample_rate)))
        if noise == "blt":
            return cls(1.0, period, blt_strategy(steps, _BUFFERS, period))
        return cls(1.0, period, banded_inverse_strategy(steps, min(bands, steps)))

    def check_units(self, units: int) -> None:
        """`ConfigError`, before anything is spent, for more units than were declared. For the custodian alone."""
        if self.max_units is not None and units > self.max_units:
            raise ConfigError(
                f"max_units: there are more units than the {self.max_units} that were declared; raise --max-units "
                "(it is public), or leave it out"
            )

    def event(self, noise_multiplier: float, steps: int) -> StepsEvent:
        """What `steps` steps cost."""
        sampling = SamplingSpec(self.sample_rate, 1.0, self.period, self.max_batch_size, self.max_units)
        return sampling.event(NoiseSpec(noise_multiplier, self.strategy, self.arithmetic), steps)

    def head_room(
        self, noise_multiplier: float, steps: int, delta: float, accountant: str
    ) -> HeadRoom | None:
        """What the cap on a draw costs, or None without one."""
        event = self.event(noise_multiplier, steps)
        return (
            cost_of_cap(event, delta, accountant)
            if isinstance(event, TruncatedPoissonGaussianEvent)
            else None
        )

    def plan(self, noise_multiplier: float, max_grad_norm: float, steps: int, units: float) -> PrivacyPlan:
        """The plan for about `units` units (a noisy number)."""
        return PrivacyPlan(
            sample_rate=self.sample_rate,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            steps=steps,
            expected_batch_size=max(self.sample_rate * units / self.period, 1.0),
            strategy=self.strategy,
            period=self.period,
            max_batch_size=self.max_batch_size,
            max_units=self.max_units,
            arithmetic=self.arithmetic,
        )

    def to_dict(self) -> dict[str, Any]:
        strategy = None if self.strategy is None else self.strategy.to_dict()
        return {**asdict(self), "strategy": strategy}

    @classmethod
    def from_info(cls, info: dict[str, Any]) -> Mechanism:
        """The mechanism of a run.json; one of before there were several is plain Poisson sampling."""
        data = info.get("mechanism")
        if data is None:
            return cls(info["sample_rate"])
        try:
            strategy = None if data["strategy"] is None else Strategy.from_dict(data["strategy"])
            return cls(**{**data, "strategy": strategy})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"run.json: its mechanism can not be read ({error})") from None
