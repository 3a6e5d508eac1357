"""Noisy bounds of a numeric column whose range nobody has declared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from synthward.engine.errors import ConfigError
from synthward.engine.queries.marginals import histogram
from synthward.engine.queries.mechanism import QueryMechanism, check_some_noise
from synthward.engine.queries.units import Units

# Powers of two that float64 holds as normal numbers.
_LEAST, _LARGEST = -1022, 1023


@dataclass(frozen=True)
class Bounds:
    """Where a column's values lie; both None where no bin passed the threshold.

    A bin passes where its noisy count is at least ``threshold`` units; ``noise_std`` is the noise of a count. Values
    beyond the bounds remain: fewer units' worth of them than about ``threshold`` in any bin.
    """

    lower: float | None
    upper: float | None
    threshold: float
    noise_std: float


def find_bounds(
    mechanism: QueryMechanism,
    units: Units,
    values: ArrayLike,
    *,
    noise_multiplier: float,
    smallest_exponent: int = -20,
    largest_exponent: int = 40,
    false_alarm: float = 1e-6,
    where: ArrayLike | None = None,
    note: str = "bounds of a column",
) -> Bounds:
    """Bounds of a numeric column, powers of two, from one noisy histogram over public bins. One Gaussian event.

    The bins are [2^k, 2^(k+1)) for k from ``smallest_exponent`` to ``largest_exponent`` - 1, the same below zero, and
    one for what is nearer to zero than 2^smallest_exponent. Larger values count in the outermost bins, infinities too;
    NaN is missing. The rows of a unit that count share a weight of 1, so that one unit moves the histogram by at most
    1 in L1 and so in L2. The bounds are the outer edges of the lowest and the highest bin whose noisy count passes
    a threshold that an empty bin passes anywhere with probability ``false_alarm``.

    Args:
        values: numbers [rows].

    Raises:
        ConfigError: exponents out of order or out of range, no noise, or a ``false_alarm`` that is no probability.
        DataError: values that are no numbers, or not one for each row.
        BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
    """
    _check(smallest_exponent, largest_exponent, false_alarm, noise_multiplier)
    column = units.column(values, "values", "fiu").astype(np.float64)
    weights = units.weights(units.counted(where) & ~np.isnan(column), None)
    span = largest_exponent - smallest_exponent
    size = 2 * span + 1
    noise_std = noise_multiplier * weights.most
    # Noise is rounded to whole steps: half a step more, and no empty bin passes more often than this says.
    threshold = math.ceil(-noise_std * NormalDist().inv_cdf(false_alarm / size) + 0.5)
    noisy = mechanism.integer_vector(
        histogram(_bins(column, smallest_exponent, span), weights, size),
        l2_sensitivity=weights.most,
        noise_multiplier=noise_multiplier,
        note=note,
    )
    passing = np.flatnonzero(noisy >= threshold)
    stated = threshold / weights.parts, noise_std / weights.parts
    if not len(passing):
        return Bounds(None, None, *stated)
    lowest, highest = int(passing[0]) - span, int(passing[-1]) - span
    lower = -_edge(-lowest, smallest_exponent) if lowest <= 0 else _edge(lowest - 1, smallest_exponent)
    upper = _edge(highest, smallest_exponent) if highest >= 0 else -_edge(-highest - 1, smallest_exponent)
    return Bounds(lower, upper, *stated)


def _edge(steps: int, smallest_exponent: int) -> float:
    return math.ldexp(1.0, smallest_exponent + steps)


def _bins(column: NDArray[np.float64], smallest: int, span: int) -> NDArray[np.int64]:
    """Bin of each value, 0 .. 2 span; ``span`` is the one around zero. Missing values get any."""
    size = np.nan_to_num(np.abs(column), nan=0.0, posinf=np.finfo(np.float64).max)
    # frexp: size = m 2^e with 1/2 <= m < 1, exactly; a size of zero is near zero.
    exponent = np.where(size > 0.0, np.frexp(size)[1].astype(np.int64) - 1, _LEAST * 2)
    place = np.clip(exponent - smallest + 1, 0, span)
    return np.asarray(span + np.where(column < 0.0, -place, place), dtype=np.int64)


def _check(smallest: int, largest: int, false_alarm: float, noise_multiplier: float) -> None:
    for value in (smallest, largest):
        if isinstance(value, bool) or not isinstance(value, int) or not _LEAST <= value <= _LARGEST:
            raise ConfigError(f"exponents: got {value!r}; give whole numbers from {_LEAST} to {_LARGEST}")
    if not smallest < largest:
        raise ConfigError(f"exponents: the smallest, {smallest}, must be below the largest, {largest}")
    if isinstance(false_alarm, bool) or not isinstance(false_alarm, float) or not 1e-15 <= false_alarm < 1.0:
        raise ConfigError(f"false_alarm: got {false_alarm!r}; give a probability from 1e-15 to below 1")
    check_some_noise(noise_multiplier)
