"""Noisy quantiles of a numeric column, all from one noisy cumulative histogram over public bins.

Noise on a histogram adds up in its cumulated counts, to the root of the number of bins. Instead the cumulation, the
lower-triangular matrix A of ones, is factored as A = B C, C x is released with noise, and B brings it to cumulated
counts (matrix mechanism, Li et al. 2010). C is the square root of A (Fichtenberger, Henzinger & Upadhyay 2023): the
noise of a cumulated count is then about 1 + ln(bins) / pi times that of one count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from synthward.engine.errors import ConfigError
from synthward.engine.queries.marginals import histogram
from synthward.engine.queries.mechanism import QueryMechanism
from synthward.engine.queries.units import Units

MAX_BINS = 4096
# Coefficients of C are multiples of 2^-16, so that C x is exact in int64 for fewer than MAX_ROWS rows.
_BITS = 16


@dataclass(frozen=True)
class Quantiles:
    """Values at the ``probabilities``, and how far their ranks may be off.

    ``total`` is the noisy number of units with a value, ``rank_std`` the standard deviation of the noise of a
    cumulated count, where it is largest (at ``total``).
    """

    probabilities: tuple[float, ...]
    values: tuple[float, ...]
    total: float
    rank_std: float
    bins: int
    _rounding: float = field(repr=False)

    def rank_error(self, failure: float = 0.05) -> float:
        """Units by which ranks may be off: with probability 1 - ``failure`` no cumulated count errs by more.

        Then, for N units with a value and each probability q, at most q N + 2 rank_error of them lie below the bin
        of the answer, and at least q N - 2 rank_error of them in or below it. (A unit with several rows counts by
        the share of its rows.)
        """
        if not 0.0 < failure < 1.0:
            raise ConfigError(f"failure: got {failure!r}; give a probability between 0 and 1")
        return self._rounding - self.rank_std * NormalDist().inv_cdf(failure / (2 * self.bins))


def find_quantiles(
    mechanism: QueryMechanism,
    units: Units,
    values: ArrayLike,
    probabilities: Sequence[float],
    *,
    edges: ArrayLike,
    noise_multiplier: float,
    where: ArrayLike | None = None,
    note: str = "quantiles of a column",
) -> Quantiles:
    """Quantiles of a numeric column at any number of probabilities, for the price of one. One Gaussian event.

    Args:
        values: numbers [rows]; below or above the edges they count in the outermost bins, infinities too; NaN is
            missing.
        probabilities: numbers from 0 to 1.
        edges: public, finite, rising, [bins + 1], 4,096 bins at the most. The more bins, the finer the answers, and
            the more noise, by a little.

    Sensitivity. The rows of a unit share a weight of 1: it adds a vector u of numbers of at least 0 that sum to at
    most 1. So C u is a mean of columns of C and of 0, and its norm at most that of C's longest column, the first. C
    x is rounded down to whole steps, each coordinate by less than one, which moves the difference of two such
    vectors by less than the root of the number of bins in norm. The sum of both is charged.

    Raises:
        ConfigError: probabilities or edges that are none.
        DataError: values that are no numbers, or not one for each row.
        BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
    """
    wanted = tuple(_probability(value) for value in probabilities)
    cuts = _edges(edges)
    column = units.column(values, "values", "fiu").astype(np.float64)
    weights = units.weights(units.counted(where) & ~np.isnan(column), None)
    size = len(cuts) - 1
    cells = np.searchsorted(cuts[1:-1], column, side="right").astype(np.int64)
    root, back = _factors(size)
    sums = np.convolve(root, histogram(cells, weights, size))[:size] >> _BITS
    norm = float(np.linalg.norm(root.astype(np.float64))) / (1 << _BITS)
    sensitivity = weights.most * norm + math.sqrt(size)
    noisy = mechanism.integer_vector(
        sums, l2_sensitivity=sensitivity, noise_multiplier=noise_multiplier, note=note
    )
    # All from here on is a function of the answer. Half a step: sums were rounded down.
    cumulated = np.convolve(back, (noisy + 0.5) / weights.parts)[:size]
    ranks = np.concatenate([[0.0], np.maximum(_rising(cumulated), 0.0)])
    total = float(ranks[-1])
    return Quantiles(
        wanted,
        tuple(float(np.interp(q * total, ranks, cuts)) for q in wanted),
        total,
        noise_multiplier * sensitivity / weights.parts * float(np.linalg.norm(back)),
        size,
        # Sums are off by half a step from rounding down, and the noise by half a step.
        float(np.abs(back).sum()) / weights.parts,
    )


@lru_cache(maxsize=8)
def _factors(size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """First columns of C (times 2^16, rounded down) and of B = A C^-1; both are lower-triangular Toeplitz matrices."""
    places = np.arange(1, size)
    exact = np.concatenate([[1.0], np.cumprod((2.0 * places - 1.0) / (2.0 * places))])
    root = np.floor(np.ldexp(exact, _BITS)).astype(np.int64)
    column = np.ldexp(root.astype(np.float64), -_BITS)
    inverse = np.zeros(size)
    inverse[0] = 1.0
    for n in range(1, size):
        inverse[n] = -column[1 : n + 1] @ inverse[:n][::-1]
    return root, np.cumsum(inverse)


def _rising(cumulated: NDArray[np.float64]) -> NDArray[np.float64]:
    """Halfway between the running maximum and the running minimum from behind: its largest error is not larger."""
    return (np.maximum.accumulate(cumulated) + np.minimum.accumulate(cumulated[::-1])[::-1]) / 2.0


def _probability(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"probabilities: got {value!r}; give numbers from 0 to 1")
    return float(value)


def _edges(edges: ArrayLike) -> NDArray[np.float64]:
    cuts = np.asarray(edges)
    if cuts.ndim != 1 or cuts.dtype.kind not in "fiu" or not 2 <= len(cuts) <= MAX_BINS + 1:
        raise ConfigError(f"edges: give 2 to {MAX_BINS + 1} numbers")
    cuts = cuts.astype(np.float64)
    if not (np.isfinite(cuts).all() and (np.diff(cuts) > 0.0).all()):
        raise ConfigError("edges: give finite numbers, each larger than the one before")
    return cuts
