"""Statistical gates at a fixed false-alarm rate of 1e-9: six sigma, no reruns."""

from __future__ import annotations

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-9
SIX_SIGMA = 6.11  # two-sided normal quantile of 1e-9


def assert_gaussian(values: np.ndarray, std: float) -> None:
    """Fails unless `values` look like independent N(0, std^2): mean, variance, kurtosis, Kolmogorov-
    Smirnov, lag 1.

    With 1e6 values the variance gate is 0.9% wide either side: a standard deviation 1% off does not pass.
    """
    scaled = np.asarray(values, dtype=np.float64) / std
    count = len(scaled)
    assert np.isfinite(scaled).all()
    assert abs(scaled.mean()) < SIX_SIGMA / count**0.5
    assert abs((scaled**2).mean() - 1) < SIX_SIGMA * (2 / count) ** 0.5
    assert abs((scaled**4).mean() - 3) < 8.0 * (96 / count) ** 0.5  # wider: its own tails are heavy
    assert stats.kstest(scaled, "norm").pvalue > FALSE_ALARM
    assert_uncorrelated(scaled[1:], scaled[:-1])


def assert_uncorrelated(first: np.ndarray, second: np.ndarray) -> None:
    """Fails when the sample correlation of two noise vectors is beyond what independence allows."""
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < SIX_SIGMA / len(first) ** 0.5
    assert (first == second).mean() < 1e-3, "two noise vectors share values"
