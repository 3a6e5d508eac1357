"""The plan of a run: one frozen object from which both the mechanism and its accounting are read."""

from __future__ import annotations

from dataclasses import dataclass

from synthward.engine.accounting.events import StepsEvent
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import ConfigError
from synthward.engine.sampling import Sampler
from synthward.engine.spec import ClipSpec, NoiseSpec, SamplingSpec


@dataclass(frozen=True)
class PrivacyPlan:
    """Sampler, clipping, noise and number of steps of a training run.

    Args:
        sample_rate: Poisson probability of each privacy unit in each step.
        noise_multiplier: noise standard deviation over `max_grad_norm`; 0 means epsilon = infinity.
        max_grad_norm: L2 bound of one unit's contribution.
        steps: logical steps that are paid for; the trainer refuses to go beyond them.
        expected_batch_size: public denominator of the mean gradient.
        clipping: the rule, by name (`ClipSpec`), or a whole `ClipSpec` (its bound must be `max_grad_norm`).
        strategy: None, or the strategy matrix of noise that is correlated over steps (`NoiseSpec`).
        period: groups of units that take turns (`SamplingSpec`).
        max_batch_size, max_units: cap on a draw, and the public bound on the number of units that its cost needs.
        arithmetic: "float" or "discrete" (`NoiseSpec`).

    Raises:
        ConfigError: a field that is no mechanism.
    """

    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    expected_batch_size: float
    clipping: str | ClipSpec = "flat"
    strategy: Strategy | None = None
    period: int = 1
    max_batch_size: int | None = None
    max_units: int | None = None
    arithmetic: str = "float"

    def __post_init__(self) -> None:
        self.noise.check(self.clip)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ConfigError(f"steps: got {self.steps!r}; give a whole number of at least 0")
        self.event(1)

    @property
    def clip(self) -> ClipSpec:
        """The bound on one unit."""
        if isinstance(self.clipping, ClipSpec):
            if self.clipping.max_grad_norm != self.max_grad_norm:
                raise ConfigError(
                    "clipping: its max_grad_norm is not the plan's; give the same number to both"
                )
            return self.clipping
        return ClipSpec(self.max_grad_norm, self.clipping)

    @property
    def noise(self) -> NoiseSpec:
        """The noise on the sum."""
        return NoiseSpec(self.noise_multiplier, self.strategy, self.arithmetic)

    @property
    def sampling(self) -> SamplingSpec:
        """How units are drawn, and the public batch size."""
        return SamplingSpec(
            self.sample_rate, self.expected_batch_size, self.period, self.max_batch_size, self.max_units
        )

    def event(self, steps: int | None = None) -> StepsEvent:
        """What `steps` logical steps (all of the plan by default) cost."""
        return self.sampling.event(self.noise, self.steps if steps is None else steps)

    def sampler(self, num_units: int, key: bytes) -> Sampler:
        """The sampler whose draws `event` accounts for."""
        return self.sampling.sampler(num_units, key)
