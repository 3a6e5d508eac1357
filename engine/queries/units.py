"""Which privacy unit a row belongs to, and how much of a unit each of its rows may be.

Everything here acts unit by unit: what is said of a unit's rows follows from that unit's rows and their order alone, so
that one unit, added or removed, changes no other's part in a sum. No record raises an error for what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from synthward.engine.errors import ConfigError, DataError

# A unit's rows share this many whole parts. Sums of them are exact in int64, for fewer than MAX_ROWS rows.
PARTS = 1 << 12
MAX_ROWS = 1 << 31


@dataclass(frozen=True)
class Weights:
    """How much each row counts, int64 [rows], in whole parts of which ``parts`` make one.

    ``most`` bounds the sum over any unit's rows, in parts; all are at least 0.
    """

    rows: NDArray[np.int64]
    parts: int
    most: int


class Units:
    """The privacy units (patients) of a table's rows. Neighbouring tables differ by one unit with all its rows."""

    def __init__(self, owner: NDArray[np.int64], num_units: int) -> None:
        if len(owner) >= MAX_ROWS:
            raise DataError(f"units: got {len(owner)} rows; fewer than 2^31 can be counted")
        self._owner = owner
        self.num_units = num_units

    @classmethod
    def from_ids(cls, ids: ArrayLike) -> Units:
        """Units from one id per row, whole numbers or text [rows], in any order."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.dtype.kind not in "iuUS" and array.size):
            raise DataError(
                f"unit ids: got {_said(array)}; give one whole number or text per row (text as a NumPy string array)"
            )
        named, owner = np.unique(array, return_inverse=True)
        return cls(owner.astype(np.int64), len(named))

    @classmethod
    def from_offsets(cls, offsets: ArrayLike) -> Units:
        """Units from offsets, whole numbers [units + 1]: unit u owns rows ``offsets[u]:offsets[u + 1]``."""
        array = np.asarray(offsets)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            raise DataError(
                f"unit offsets: got {_said(array)}; give whole numbers, one more than there are units"
            )
        bounds = array.astype(np.int64)
        sizes = bounds[1:] - bounds[:-1]
        if bounds[0] != 0 or (sizes < 0).any():
            raise DataError("unit offsets: they start at 0 and never go down; these do not")
        return cls(np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    @classmethod
    def of_rows(cls, count: int) -> Units:
        """Every row a unit of its own."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"rows: got {count!r}; give a whole number of at least 0")
        return cls(np.arange(count), count)

    @property
    def owner(self) -> NDArray[np.int64]:
        """Number of each row's unit, int64 [rows]."""
        return self._owner

    @property
    def num_rows(self) -> int:
        return len(self._owner)

    def places(self, counted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each counted row (in the order of ``flatnonzero``): which of its unit's counted rows it is, from 0,
        and how many of them there are."""
        owner = self._owner[counted]
        order = np.argsort(owner, kind="stable")
        sizes = np.bincount(owner, minlength=self.num_units)
        starts = np.cumsum(sizes) - sizes
        place = np.empty(len(owner), dtype=np.int64)
        place[order] = np.arange(len(owner)) - starts[owner[order]]
        return place, sizes[owner]

    def weights(self, counted: NDArray[np.bool_], max_rows: int | None) -> Weights:
        """Weights of the counted rows; the others weigh 0.

        Args:
            counted: bool [rows].
            max_rows: None: a unit's counted rows share a weight of exactly 1, as evenly as whole parts allow.
                Otherwise the first ``max_rows`` of them weigh 1 each, and the rest 0.
        """
        rows = np.zeros(self.num_rows, dtype=np.int64)
        place, size = self.places(counted)
        if max_rows is None:
            # Differences of floor(place * PARTS / size) add up to PARTS, whatever the size.
            rows[counted] = (place + 1) * PARTS // size - place * PARTS // size
            return Weights(rows, PARTS, PARTS)
        rows[counted] = place < max_rows
        return Weights(rows, 1, max_rows)

    def counted(self, where: ArrayLike | None) -> NDArray[np.bool_]:
        """The rows that a query looks at: all, or those where a mask bool [rows] is true."""
        if where is None:
            return np.ones(self.num_rows, dtype=np.bool_)
        return self.column(where, "where", "b").astype(np.bool_)

    def column(self, values: ArrayLike, name: str, kinds: str) -> NDArray[Any]:
        """``values`` as an array with one entry per row, of one of NumPy's kinds.

        Raises:
            DataError: naming the column, what was expected and what was got.
        """
        array = np.asarray(values)
        if array.ndim != 1 or len(array) != self.num_rows:
            raise DataError(
                f"{name}: got {_said(array)}; expected one entry for each of the rows of the units"
            )
        if array.dtype.kind not in kinds and array.size:
            expected = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
            raise DataError(f"{name}: got {_said(array)}; expected {expected}")
        return array


_KINDS = {"b": "true or false", "i": "whole numbers", "f": "floating-point numbers", "U": "text"}


def _said(array: NDArray[Any]) -> str:
    """Kind and number of axes of an array: its length is the records' own."""
    return f"an array of {array.dtype.name} with {array.ndim} axes"


def check_max_rows(value: int | None, name: str = "max_rows_per_unit") -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= PARTS:
        raise ConfigError(f"{name}: got {value!r}; give a whole number from 1 to {PARTS}")
