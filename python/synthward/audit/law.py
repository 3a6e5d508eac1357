"""The law of the noise, tested directly: what a step releases when all gradients are zero is noise and nothing else.

The strongest test of the noise, and of the division by the public batch size: a standard deviation that is off by 1 %
does not pass. It sees nothing of clipping, which the canaries are for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from synthward.audit.canaries import AuditedStep, whiten
from synthward.engine import KeySchedule, PrivacyPlan

#: Coordinates of each step; the standard deviation of a million Gaussians is known to 0.07 %.
COORDINATES = 1_000_000
STEPS = 2
# How far the standard deviation may lie from its claim, in its own standard deviations, and the least p-value of the
# other tests: together they fail a sound engine less than once in ten thousand audits.
DEVIATIONS = 4.0
LEAST_P = 1e-6


@dataclass(frozen=True)
class LawTest:
    """What was found of the noise, over what was claimed.

    Attributes:
        std_ratio: standard deviation over its claim; `std_tolerance` is what may lie between it and 1.
        p_values: of the mean, the shape (Kolmogorov-Smirnov), the kurtosis, the correlation of neighbours, of the two
            halves of a step, and of steps.
    """

    std_ratio: float
    std_tolerance: float
    p_values: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the noise is what the plan says."""
        is_close = abs(self.std_ratio - 1.0) <= self.std_tolerance
        return is_close and min(self.p_values.values()) >= LEAST_P

    @property
    def noise_ratio(self) -> float:
        """A lower bound on the noise over its claim, at the level of the test."""
        return self.std_ratio / (1.0 + self.std_tolerance)


def run_law_test(plan: PrivacyPlan, keys: KeySchedule, coordinates: int = COORDINATES) -> LawTest:
    """Release steps without gradients and test what comes out against the plan's noise.

    The units that are present are of another number than expected, so that a division by their number shows.
    """
    units = np.arange(3 if plan.expected_batch_size >= 6.0 else 12, dtype=np.int64)
    audited = AuditedStep(replace(plan, sample_rate=1.0, steps=STEPS), keys, coordinates // 2, scale=0.0)
    released = np.stack([audited.step(units).ravel() for _ in range(STEPS)])
    return examine(whiten(plan, released) / sum_noise(plan))


def sum_noise(plan: PrivacyPlan) -> float:
    """Noise multiplier of the sum alone: of adaptive clipping, what is left after the count has had its share."""
    clip, noise = plan.clip, plan.noise_multiplier
    if clip.clipping != "adaptive":
        return noise
    count = plan.expected_batch_size / 20.0 if clip.count_noise is None else clip.count_noise
    return float((noise**-2 - (2.0 * count) ** -2) ** -0.5)


def examine(values: NDArray[np.float64]) -> LawTest:
    """Test values [steps, n] that should be independent N(0, 1)."""
    flat = values.ravel()
    count = flat.size
    half = values.shape[1] // 2
    pairs = {
        "neighbours": (values[:, 1:], values[:, :-1]),
        "halves": (values[:, :half], values[:, half : 2 * half]),
        "steps": (values[1:], values[:-1]),
    }
    p_values = {
        "mean": _p_value(float(flat.mean()) * math.sqrt(count)),
        "shape": float(stats.kstest(flat / flat.std() if flat.any() else flat, "norm").pvalue),
        "kurtosis": _p_value(_kurtosis(flat) * math.sqrt(count / 24.0)),
    }
    for name, (one, two) in pairs.items():
        p_values[name] = _p_value(_correlation(one.ravel(), two.ravel()) * math.sqrt(one.size))
    return LawTest(
        std_ratio=float(np.sqrt((flat**2).mean())),
        std_tolerance=DEVIATIONS / math.sqrt(2.0 * count),
        p_values=p_values,
    )


def _kurtosis(values: NDArray[np.float64]) -> float:
    """Excess kurtosis; infinite for values without variance."""
    square = float((values**2).mean())
    return math.inf if square == 0.0 else float((values**4).mean()) / square**2 - 3.0


def _correlation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    scale = math.sqrt(float(one @ one) * float(two @ two))
    return 1.0 if scale == 0.0 else float(one @ two) / scale


def _p_value(deviations: float) -> float:
    """Two-sided, of a standard normal."""
    return float(2.0 * special.ndtr(-abs(deviations)))
