"""The plan of a run: one frozen object from which both the mechanism and its accounting are read."""

from __future__ import annotations

from dataclasses import dataclass

from synthward.engine.accounting import PoissonGaussianEvent
from synthward.engine.errors import ConfigError
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

    Raises:
        ConfigError: a field that is no mechanism.
    """

    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    expected_batch_size: float
    clipping: str | ClipSpec = "flat"

    def __post_init__(self) -> None:
        _ = self.clip, self.noise, self.sampling
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ConfigError(f"steps: got {self.steps!r}; give a whole number of at least 0")

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
        return NoiseSpec(self.noise_multiplier)

    @property
    def sampling(self) -> SamplingSpec:
        """The sampler's rate and the public batch size."""
        return SamplingSpec(self.sample_rate, self.expected_batch_size)

    def event(self, steps: int | None = None) -> PoissonGaussianEvent:
        """What `steps` logical steps (all of the plan by default) cost."""
        return PoissonGaussianEvent(
            self.sample_rate, self.noise_multiplier, self.steps if steps is None else steps
        )
