"""Sampling of privacy units, and static physical batches.

Every unit is drawn independently with probability q at each step by comparing a 64-bit cipher word with
floor(q 2^64): float32 thresholds sample 1.3 % too often at q = 1e-6, and the accountant would not know.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from synthward.engine.errors import ConfigError
from synthward.kernels import chacha20_words

# Streams of the sampler's key: the coin of each unit, its rank where a draw is cut, its group.
_COINS, _RANKS, _GROUPS = 1, 2, 3


class Sampler(Protocol):
    """Draws privacy units; a pure function of (key, step), the same on every rank."""

    sample_rate: float

    @property
    def period(self) -> int:
        """Steps between two chances of one unit."""

    def draw(self, step: int) -> NDArray[np.int64]:
        """Units of a logical step, int64, increasing; may be empty."""


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

    period = 1

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
        drawn = self._words(_COINS, step) < np.uint64(self._threshold)
        return np.flatnonzero(drawn).astype(np.int64)

    def _words(self, stream: int, step: int) -> NDArray[np.uint64]:
        """A 64-bit word for each unit."""
        words = chacha20_words(self._key, stream=stream, step=step, start=0, count=2 * self._num_units)
        return words.view("<u8")


class TruncatedPoissonSampler(PoissonSampler):
    """Poisson draws that are cut to at most `max_batch_size` units, a random subset of the draw.

    Raises:
        ConfigError: more units than the public bound `max_units` that the accountant was given.
    """

    def __init__(
        self, num_units: int, sample_rate: float, key: bytes, *, max_batch_size: int, max_units: int
    ) -> None:
        super().__init__(num_units, sample_rate, key)
        if num_units > max_units:
            raise ConfigError(
                f"max_units: there are more units than the {max_units} that were declared; raise it (it is public), "
                "or leave max_batch_size out"
            )
        self.max_batch_size = int(max_batch_size)

    def draw(self, step: int) -> NDArray[np.int64]:
        """Units of a logical step, int64, increasing, at most `max_batch_size`."""
        drawn = super().draw(step)
        if len(drawn) <= self.max_batch_size:
            return drawn
        ranks = self._words(_RANKS, step)[drawn]
        return np.sort(drawn[np.argsort(ranks, kind="stable")[: self.max_batch_size]])


class CyclicPoissonSampler(PoissonSampler):
    """Poisson draws from one of `period` groups in turn: no unit takes part twice within `period` steps.

    A unit's group comes from a cipher word of its own, so that one unit, added or removed, moves no other.
    """

    def __init__(self, num_units: int, sample_rate: float, key: bytes, *, period: int) -> None:
        super().__init__(num_units, sample_rate, key)
        self.period = int(period)
        high = self._words(_GROUPS, 0) >> np.uint64(32)
        self._groups = ((high * np.uint64(period)) >> np.uint64(32)).astype(np.int64)

    def draw(self, step: int) -> NDArray[np.int64]:
        """Units of a logical step, int64, increasing; may be empty."""
        drawn = super().draw(step)
        chosen: NDArray[np.int64] = drawn[self._groups[drawn] == step % self.period]
        return chosen


def physical_batches(
    unit_indices: NDArray[np.int64],
    physical_batch_size: int,
    *,
    at_least: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[NDArray[np.int64]]:
    """Split a draw into batches of one static size, padded with -1; an empty draw is one padded batch.

    With several ranks each has a stretch of the draw (`rank_part`), in as many batches as all others.

    `at_least`: the number of batches where a cap on the draw makes it public (static shapes in every step).
    """
    if physical_batch_size < 1:
        raise ValueError(f"physical_batch_size: got {physical_batch_size}, expected at least 1")
    start, stop = rank_part(len(unit_indices), rank, world_size)
    longest = math.ceil(len(unit_indices) / world_size)
    count = max(1, at_least, math.ceil(longest / physical_batch_size))
    padded = np.full(count * physical_batch_size, -1, dtype=np.int64)
    padded[: stop - start] = unit_indices[start:stop]
    return list(padded.reshape(count, physical_batch_size))


def rank_part(units: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last (exclusive) place in a draw of `units` that is a rank's: stretches that differ by one at most,
    the first ones longer."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, expected 0 to {world_size - 1}")
    each, more = divmod(units, world_size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)
