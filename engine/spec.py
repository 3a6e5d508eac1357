"""What a private step is, as frozen values: every field here changes epsilon or the released sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthward.engine.accounting.events import (
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    PoissonGaussianEvent,
    StepsEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import ConfigError
from synthward.engine.sampling import CyclicPoissonSampler, PoissonSampler, Sampler, TruncatedPoissonSampler

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


ARITHMETICS = ("float", "discrete")


@dataclass(frozen=True)
class NoiseSpec:
    """Gaussian noise on the released sums.

    Args:
        noise_multiplier: standard deviation over the sensitivity of one sum (0 = no noise). With a strategy, that of
            the white noise z.
        strategy: None for noise that is fresh in each step; a strategy matrix C for noise ``C^-1 z`` that is correlated
            over steps (matrix factorization).
        arithmetic: "float": fp32 sums and noise. "discrete": sums in fp64, rounded to an integer grid, and the noise
            an integer; the rounding is added to the sensitivity. What is released then has no trace of
            floating-point arithmetic; the step takes longer.
    """

    noise_multiplier: float
    strategy: Strategy | None = None
    arithmetic: str = "float"

    def __post_init__(self) -> None:
        if not _is_number(self.noise_multiplier) or not 0.0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"noise_multiplier: got {self.noise_multiplier!r}; give a finite number of at least 0"
            )
        if self.strategy is not None and not isinstance(self.strategy, Strategy):
            raise ConfigError(f"strategy: got {type(self.strategy).__name__}; give a Strategy or None")
        if self.arithmetic not in ARITHMETICS:
            raise ConfigError(f"arithmetic: got {self.arithmetic!r}; choose one of {', '.join(ARITHMETICS)}")
        if self.arithmetic == "discrete" and self.strategy is not None:
            raise ConfigError("arithmetic: 'discrete' goes with fresh noise only; leave the strategy out")

    def check(self, clip: ClipSpec) -> None:
        """`ConfigError` where noise and clipping rule do not go together."""
        if clip.clipping == "adaptive" and (self.strategy is not None or self.arithmetic == "discrete"):
            raise ConfigError(
                "clipping: 'adaptive' moves the sensitivity from step to step, which correlated and discrete noise "
                "do not allow; use flat, automatic, per-layer or grouped"
            )


KEEPS = ("full", "bf16", "recompute")
PRODUCTS = ("auto", "library", "own")
HALF_SUMS = ("auto", "exact", "rounded")
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
        half_sums: how the clipped sum of linear weights takes bfloat16 operands on the tensor cores, which multiply
            bfloat16. "exact": a clipped gradient keeps all its bits (three products for one, where units have few
            rows). "rounded": it is rounded to bfloat16 once (one product), and each unit's norm grows by 2^-8 of the
            sum of its rows' own norms, which covers that. "auto": on a GPU rounded where units have one row (a norm
            grows by 0.4 percent) and held in two bfloat16 elsewhere (2^-16); exact on a CPU. fp16 is never rounded.
    """

    keep: str = "full"
    method: str = "auto"
    materialise_bytes: int | None = None
    products: str = "auto"
    half_sums: str = "auto"

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise ConfigError(f"keep: got {self.keep!r}; choose one of {', '.join(KEEPS)}")
        if self.method not in METHODS:
            raise ConfigError(f"method: got {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.products not in PRODUCTS:
            raise ConfigError(f"products: got {self.products!r}; choose one of {', '.join(PRODUCTS)}")
        if self.half_sums not in HALF_SUMS:
            raise ConfigError(f"half_sums: got {self.half_sums!r}; choose one of {', '.join(HALF_SUMS)}")
        if self.materialise_bytes is not None and self.materialise_bytes < 0:
            raise ConfigError("materialise_bytes: give a number of bytes of at least 0")


@dataclass(frozen=True)
class SamplingSpec:
    """How privacy units are drawn; all numbers are public.

    Args:
        sample_rate: probability q of each unit in each step (of its group's steps, if ``period > 1``), above 0 and at
            most 1.
        expected_batch_size: public denominator of the mean, positive; never counted from the records.
        period: units fall into this many groups, each by a coin of its own, and step t draws from group
            ``t mod period``: no unit takes part twice within `period` steps (min-separation). 1: no groups.
        max_batch_size: a larger draw is cut to so many units, chosen at random (static shapes); the cost of that is
            accounted. Needs `max_units`.
        max_units: public upper bound of the number of units; more are refused.
    """

    sample_rate: float
    expected_batch_size: float
    period: int = 1
    max_batch_size: int | None = None
    max_units: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.sample_rate) or not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(
                f"sample_rate: got {self.sample_rate!r}; give a probability above 0 and at most 1"
            )
        check_positive(self.expected_batch_size, "expected_batch_size")
        _check_count(self.period, "period")
        if (self.max_batch_size is None) != (self.max_units is None):
            raise ConfigError(
                "max_batch_size, max_units: a cap on the batch needs both; give both or neither"
            )
        if self.max_batch_size is not None:
            _check_count(self.max_batch_size, "max_batch_size")
            _check_count(self.max_units, "max_units")
            if self.period > 1:
                raise ConfigError("max_batch_size: a cap does not go with groups (period > 1)")

    def event(self, noise: NoiseSpec, steps: int) -> StepsEvent:
        """What `steps` steps of this sampler with that noise cost.

        A banded strategy of at most `period` bands keeps the amplification of sampling (Choquette-Choo et al. 2023,
        theorem 4): a unit's steps are `period` apart, so that the columns it meets do not overlap, and each is one
        subsampled Gaussian mechanism. Every other strategy is accounted as if all units took part whenever it is their
        group's turn.
        """
        z, strategy = noise.noise_multiplier, noise.strategy
        if self.max_batch_size is not None and self.max_units is not None:
            if strategy is not None:
                raise ConfigError("strategy: correlated noise does not go with max_batch_size; leave one out")
            return TruncatedPoissonGaussianEvent(
                self.sample_rate, z, steps, self.max_batch_size, self.max_units
            )
        if strategy is None:
            if self.period == 1:
                return PoissonGaussianEvent(self.sample_rate, z, steps)
            return CyclicPoissonGaussianEvent(self.sample_rate, z, self.period, steps)
        bands = strategy.bands
        if (
            strategy.kind == "banded"
            and bands is not None
            and bands <= self.period
            and self.sample_rate < 1.0
        ):
            once = strategy.sensitivity(bands, bands)
            return CyclicPoissonGaussianEvent(self.sample_rate, z / once, self.period, steps)
        return CorrelatedGaussianEvent(z, strategy, self.period, steps)

    def sampler(self, num_units: int, key: bytes) -> Sampler:
        """The sampler that is accounted; ``draw(step)`` gives the units of a logical step, int64, increasing.

        Raises:
            ConfigError: more units than `max_units`.
        """
        if self.max_batch_size is not None and self.max_units is not None:
            return TruncatedPoissonSampler(
                num_units, self.sample_rate, key, max_batch_size=self.max_batch_size, max_units=self.max_units
            )
        if self.period > 1:
            return CyclicPoissonSampler(num_units, self.sample_rate, key, period=self.period)
        return PoissonSampler(num_units, self.sample_rate, key)


def check_positive(value: float, name: str) -> None:
    """`ConfigError` unless `value` is a finite positive number."""
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise ConfigError(f"{name}: got {value!r}; give a finite number above 0")


def _check_count(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: got {value!r}; give a whole number of at least 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
