"""What a private step is, as frozen values: every field here changes epsilon or the released sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthward.engine.errors import ConfigError

CLIPPINGS = ("flat",)
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class ClipSpec:
    """How one unit's contribution is bounded.

    Args:
        max_grad_norm: L2 bound C of the contribution of one privacy unit, finite and positive.
        clipping: "flat": one bound over all parameters, factor ``min(1, C / norm)``.
    """

    max_grad_norm: float
    clipping: str = "flat"

    def __post_init__(self) -> None:
        check_positive(self.max_grad_norm, "max_grad_norm")
        # Smaller bounds would meet the underflow of squared norms in fp32.
        if self.max_grad_norm < 1e-12:
            raise ConfigError(f"max_grad_norm: got {self.max_grad_norm!r}; give at least 1e-12")
        if self.clipping not in CLIPPINGS:
            raise ConfigError(f"clipping: got {self.clipping!r}; this version offers {', '.join(CLIPPINGS)}")

    def sensitivity(self) -> float:
        """L2 change of the summed gradient when one unit is added or removed."""
        return self.max_grad_norm


@dataclass(frozen=True)
class NoiseSpec:
    """Gaussian noise; `noise_multiplier` is its standard deviation over the sensitivity (0 = no noise)."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        if not _is_number(self.noise_multiplier) or not 0.0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"noise_multiplier: got {self.noise_multiplier!r}; give a finite number of at least 0"
            )

    def noise_std(self, clip: ClipSpec) -> float:
        """Standard deviation of the noise on each coordinate of the summed gradient."""
        return self.noise_multiplier * clip.sensitivity()


@dataclass(frozen=True)
class SamplingSpec:
    """Poisson sampling of privacy units; both numbers are public.

    Args:
        sample_rate: probability q of each unit in each step, above 0 and at most 1.
        expected_batch_size: public denominator of the mean, positive; never counted from the records.
    """

    sample_rate: float
    expected_batch_size: float

    def __post_init__(self) -> None:
        if not _is_number(self.sample_rate) or not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(
                f"sample_rate: got {self.sample_rate!r}; give a probability above 0 and at most 1"
            )
        check_positive(self.expected_batch_size, "expected_batch_size")


def check_positive(value: float, name: str) -> None:
    """`ConfigError` unless `value` is a finite positive number."""
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise ConfigError(f"{name}: got {value!r}; give a finite number above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
