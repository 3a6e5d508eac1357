"""Every column of a table as small integer codes, on a grid that never looks at the records.

Numeric columns are cut into equal-width bins between the bounds that the schema declares, discrete columns
keep their declared levels, and each column has one more code, the last, for a missing value. Because the
grid comes from the schema alone, codes of two tables with one schema mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np

from synthward.engine.errors import DataError

NUMERIC_BINS = 20
"""Bins of a numeric column unless a caller asks for another number."""


@dataclass(frozen=True)
class BinnedTable:
    """Codes of the modelled columns of one table.

    Attributes:
        names: column names, in the order of the schema.
        cardinalities: number of codes per column, the missing code included.
        codes: per column int64 [N] in ``0 .. cardinality - 1``; the last code means missing.
        rows: N.
    """

    names: tuple[str, ...]
    cardinalities: tuple[int, ...]
    codes: tuple[np.ndarray, ...]
    rows: int

    def sample(self, rows: int, seed: int = 0) -> BinnedTable:
        """``rows`` rows drawn without replacement (all of them when there are not more)."""
        if rows >= self.rows:
            return self
        kept = np.sort(np.random.default_rng(seed).choice(self.rows, size=rows, replace=False))
        return BinnedTable(self.names, self.cardinalities, tuple(c[kept] for c in self.codes), rows)


def column_cardinality(column: Any, numeric_bins: int = NUMERIC_BINS) -> int:
    """Number of codes of a column, the missing code included."""
    return (len(column.levels) if column.is_discrete else _grid(column, numeric_bins)[2]) + 1


def _grid(column: Any, numeric_bins: int) -> tuple[float, float, int]:
    """Lower end, upper end and number of bins of a numeric column.

    Whole numbers that take no more values than there are bins get one bin each, which separates the same
    values as the finer grid would and can be read.
    """
    low, high = float(column.min), float(column.max)
    if column.is_integral and high - low + 1 <= numeric_bins:
        return low - 0.5, high + 0.5, int(high - low) + 1
    return low, high, numeric_bins


def bin_column(column: Any, values: np.ndarray, numeric_bins: int = NUMERIC_BINS) -> np.ndarray:
    """Codes of one column.

    Args:
        column: a schema column (``is_discrete``, ``levels``, ``min``, ``max``).
        values: int32 level indices with -1 for missing, or float64 with NaN for missing, [N].
        numeric_bins: equal-width bins between ``min`` and ``max``, fewer for whole numbers of fewer values;
            the upper bound belongs to the last bin and values outside the bounds to the bin at that end.

    Returns:
        int64 [N].

    Raises:
        DataError: a level index that the schema does not have.
    """
    if column.is_discrete:
        codes = values.astype(np.int64)
        levels = len(column.levels)
        if codes.size and (codes.max() >= levels or codes.min() < -1):
            raise DataError(
                f"column {column.name!r}: a level index lies outside its {levels} declared levels"
            )
        codes[codes < 0] = levels
        return codes
    low, high, bins = _grid(column, numeric_bins)
    width = (high - low) or 1.0
    missing = np.isnan(values)
    position = np.floor((np.where(missing, low, values) - low) / width * bins)
    codes = np.clip(position, 0, bins - 1).astype(np.int64)
    codes[missing] = bins
    return codes


def bin_records(records: Any, numeric_bins: int = NUMERIC_BINS) -> BinnedTable:
    """Codes of all modelled columns of ``records``.

    Raises:
        DataError: no rows, or no modelled column.
    """
    columns = records.schema.modelled
    if not columns:
        raise DataError("nothing to compare: the schema models no column")
    if records.num_rows == 0:
        raise DataError("nothing to compare: the table has no rows")
    return BinnedTable(
        tuple(c.name for c in columns),
        tuple(column_cardinality(c, numeric_bins) for c in columns),
        tuple(bin_column(c, records.columns[c.name], numeric_bins) for c in columns),
        records.num_rows,
    )


def code_labels(column: Any, numeric_bins: int = NUMERIC_BINS) -> list[str]:
    """What each code of a column means, for axes and tables."""
    if column.is_discrete:
        return [*(str(level) for level in column.levels), "missing"]
    low, high, bins = _grid(column, numeric_bins)
    single = low < float(column.min)
    edges = low + 0.5 + np.arange(bins) if single else np.linspace(low, high, bins + 1)
    if column.kind == "datetime":
        texts = [_date_text(edge, column) for edge in edges]
    else:
        texts = [f"{edge:.4g}" for edge in edges]
    if single:
        return [*texts, "missing"]
    return [*(f"{a} to {b}" for a, b in pairwise(texts)), "missing"]


def _date_text(value: float, column: Any) -> str:
    unit = "seconds" if getattr(column, "resolution", "day") == "second" else "days"
    return (datetime(1970, 1, 1) + timedelta(**{unit: int(value)})).date().isoformat()
