"""What a private step is, as frozen values: every field here changes epsilon or the released sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthward.engine.errors import ConfigError

CLIPPINGS = ("flat", "per-layer", "grouped", "automatic", "adaptive")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class ClipSpec:
    """How one unit's contribution is bounded.

    Args:
        max_grad_norm: L2 bound C of the contribution of one privacy unit, finite and positive. For "adaptive" it is
            where the bound starts.
        clipping: the rule. Each bounds a unit's contribution to the released sum by C (L2):

            - "flat": one factor over all parameters, ``min(1, C / norm)``.
            - "automatic": ``C / (norm + gamma)``: every unit is normalised (AUTO-S; Bu et al. 2023).
            - "per-layer": each module that holds parameters is clipped on its own to ``C / sqrt(number of
              modules)``, so that all together stay within C; a layer is finished inside its own backward and
              nothing is kept.
            - "grouped": the same for the groups named by `groups`.
            - "adaptive": flat, and C follows a quantile of the norms that a noisy count measures in each step
              (Andrew et al. 2021); the count is paid for out of `noise_multiplier`.
        groups: for "grouped": prefixes of parameter names (``("encoder.", "decoder.")``); a parameter belongs to
            the first that fits, and what fits none forms a last group.
        gamma: for "automatic", above 0.
        target_quantile: for "adaptive": the share of units that should not be clipped, between 0 and 1.
        quantile_rate: for "adaptive": how fast C moves, ``C *= exp(-rate * (share - target_quantile))``.
        count_noise: for "adaptive": standard deviation of the noise on the count of unclipped units, in units; by
            default a twentieth of the expected batch.
    """

    max_grad_norm: float
    clipping: str = "flat"
    groups: tuple[str, ...] = ()
    gamma: float = 0.01
    target_quantile: float = 0.5
    quantile_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        check_positive(self.max_grad_norm, "max_grad_norm")
        # Smaller bounds would meet the underflow of squared norms in fp32.
        if self.max_grad_norm < 1e-12:
            raise ConfigError(f"max_grad_norm: got {self.max_grad_norm!r}; give at least 1e-12")
        if self.clipping not in CLIPPINGS:
            raise ConfigError(f"clipping: got {self.clipping!r}; choose one of {', '.join(CLIPPINGS)}")
        if (self.clipping == "grouped") != bool(self.groups):
            raise ConfigError(
                "groups: prefixes of parameter names go with clipping='grouped', and only with it"
            )
        check_positive(self.gamma, "gamma")
        check_positive(self.quantile_rate, "quantile_rate")
        if not 0.0 < self.target_quantile < 1.0:
            raise ConfigError(f"target_quantile: got {self.target_quantile!r}; give a number between 0 and 1")
        if self.count_noise is not None:
            check_positive(self.count_noise, "count_noise")

    @property
    def is_single_pass(self) -> bool:
        """Whether a group is clipped and summed inside the backward pass, as soon as its last use is there."""
        return self.clipping in ("per-layer", "grouped")

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


KEEPS = ("full", "bf16", "recompute")
PRODUCTS = ("auto", "library", "own")
METHODS = ("auto", "rank-1", "gram", "tile", "materialise")


@dataclass(frozen=True)
class PerfSpec:
    """How the step is computed; nothing here changes epsilon.

    Args:
        keep: what waits for the clip factors. "full": activations and output gradients as they are. "bf16":
            rounded to bfloat16, and the norms are those of the rounded values, so that the bound holds exactly;
            half the memory, about three digits. "recompute": nothing; a second backward pass forms the sums
            (`PrivateTrainer` only).
        method: how norms of linear weights and convolutions are taken; "auto" chooses by the cost model.
        materialise_bytes: memory for per-unit gradients that are kept for the clip; None: a tenth of what the
            forward pass keeps. A number of bytes is met or not by the batch's size, so that a unit more may change
            how norms are taken, and with it all clip factors by their rounding bounds (1e-5 and less).
        products: who multiplies in the forward pass and for input gradients of linear layers on a CPU: "library"
            (torch's), "own" (the compiled kernel), or "auto", the one that was measured to be faster.
    """

    keep: str = "full"
    method: str = "auto"
    materialise_bytes: int | None = None
    products: str = "auto"

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise ConfigError(f"keep: got {self.keep!r}; choose one of {', '.join(KEEPS)}")
        if self.method not in METHODS:
            raise ConfigError(f"method: got {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.products not in PRODUCTS:
            raise ConfigError(f"products: got {self.products!r}; choose one of {', '.join(PRODUCTS)}")
        if self.materialise_bytes is not None and self.materialise_bytes < 0:
            raise ConfigError("materialise_bytes: give a number of bytes of at least 0")


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
