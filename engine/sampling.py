"""Poisson sampling of privacy units, and static physical batches.

Every unit is drawn independently with probability q at each step by comparing a 64-bit cipher word with
floor(q 2^64): float32 thresholds sample 1.3 % too often at q = 1e-6, and the accountant would not know.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from synthward.engine.errors import ConfigError
from synthward.kernels import chacha20_words

_STREAM = 1


def threshold_of(sample_rate: float) -> int:
    """floor(q 2^64), exactly."""
    if not (isinstance(sample_rate, int | float) and 0.0 < sample_rate <= 1.0):
        raise ConfigError(f"sample_rate: got {sample_rate!r}; give a probability above 0 and at most 1")
    numerator, denominator = float(sample_rate).as_integer_ratio()
    return (numerator << 64) // denominator


class PoissonSampler:
    """Draws privacy units; a pure function of (key, step), the same on every rank.

    The number of units is private: it stays in this object and is in nothing that is written.
    """

    def __init__(self, num_units: int, sample_rate: float, key: bytes) -> None:
        if num_units < 0:
            raise ValueError(f"num_units: got {num_units}, expected at least 0")
        self._num_units = int(num_units)
        self._threshold = threshold_of(sample_rate)
        self.sample_rate = float(sample_rate)
        self._key = key

    def draw(self, step: int) -> NDArray[np.int64]:
        """Units of a logical step, int64, increasing; may be empty."""
        if self._threshold >> 64:
            return np.arange(self._num_units, dtype=np.int64)
        words = chacha20_words(self._key, stream=_STREAM, step=step, start=0, count=2 * self._num_units)
        drawn = words.view("<u8") < np.uint64(self._threshold)
        return np.flatnonzero(drawn).astype(np.int64)


def physical_batches(unit_indices: NDArray[np.int64], physical_batch_size: int) -> list[NDArray[np.int64]]:
    """Split a draw into batches of one static size, padded with -1; an empty draw is one padded batch."""
    if physical_batch_size < 1:
        raise ValueError(f"physical_batch_size: got {physical_batch_size}, expected at least 1")
    count = max(1, math.ceil(len(unit_indices) / physical_batch_size))
    padded = np.full(count * physical_batch_size, -1, dtype=np.int64)
    padded[: len(unit_indices)] = unit_indices
    return list(padded.reshape(count, physical_batch_size))
