"""Total variation between the one-column and two-column marginals of two tables.

The total variation of two discrete distributions is half the sum of the absolute differences of their
probabilities: 0 for equal distributions, 1 for distributions without a common value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from synthward.evaluate.binning import NUMERIC_BINS, BinnedTable, bin_records

DENSE_CELLS = 1 << 20
"""Joint tables up to this many cells are counted densely, larger ones by sorting their keys."""

MAX_PAIRS = 5000
"""Above this many pairs a seeded sample of them is measured, and the result says so."""


@dataclass(frozen=True)
class PairTV:
    """Total variation of every (measured) pair of columns.

    Attributes:
        names: column names.
        matrix: float64 [D, D], symmetric, NaN on the diagonal and where a pair was not measured.
        pairs: int [M, 2] the measured pairs, first index below second.
        values: float64 [M] their total variation.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    pairs: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over the measured pairs; NaN when the table has one column."""
        return float(self.values.mean()) if self.values.size else float("nan")

    @property
    def median(self) -> float:
        """Median over the measured pairs; NaN when the table has one column."""
        return float(np.median(self.values)) if self.values.size else float("nan")

    @property
    def maximum(self) -> float:
        """Largest value over the measured pairs; NaN when the table has one column."""
        return float(self.values.max()) if self.values.size else float("nan")

    def worst(self, count: int = 10) -> list[tuple[str, str, float]]:
        """The ``count`` pairs of largest total variation, worst first."""
        order = np.argsort(-self.values, kind="stable")[:count]
        return [
            (self.names[self.pairs[k, 0]], self.names[self.pairs[k, 1]], float(self.values[k])) for k in order
        ]


def code_shares(codes: np.ndarray, cardinality: int) -> np.ndarray:
    """Share of the rows that have each code: float64 [cardinality]."""
    return np.bincount(codes, minlength=cardinality) / max(1, codes.size)


def binned_one_way(reference: BinnedTable, other: BinnedTable) -> dict[str, float]:
    """Total variation of each column between two binned tables."""
    result = {}
    for name, cardinality, left, right in zip(
        reference.names, reference.cardinalities, reference.codes, other.codes, strict=True
    ):
        result[name] = _half_l1(code_shares(left, cardinality), code_shares(right, cardinality))
    return result


def choose_pairs(columns: int, seed: int = 0, limit: int = MAX_PAIRS) -> np.ndarray:
    """All pairs of ``columns`` columns, or a seeded sample of ``limit`` of them: int64 [M, 2]."""
    pairs = np.array(list(combinations(range(columns), 2)), dtype=np.int64).reshape(-1, 2)
    if len(pairs) <= limit:
        return pairs
    kept = np.random.default_rng(seed).choice(len(pairs), size=limit, replace=False)
    return pairs[np.sort(kept)]


def binned_two_way(
    reference: BinnedTable,
    others: Sequence[BinnedTable],
    pairs: np.ndarray | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[PairTV]:
    """Total variation of each pair of columns between ``reference`` and each of ``others``.

    The reference is counted once per pair, whatever the number of other tables.

    Args:
        reference: the table that the others are measured against.
        others: tables binned on the same schema.
        pairs: int [M, 2] pairs to measure; all of them (see ``choose_pairs``) when None.
        progress: called with the fraction done.
    """
    if pairs is None:
        pairs = choose_pairs(len(reference.names))
    values = np.zeros((len(others), len(pairs)))
    for k, (i, j) in enumerate(pairs):
        cells = reference.cardinalities[i] * reference.cardinalities[j]
        if cells <= DENSE_CELLS:
            dense = _dense_shares(reference, i, j)
            values[:, k] = [_half_l1(dense, _dense_shares(other, i, j)) for other in others]
        else:
            sparse = _sparse_shares(reference, i, j)
            values[:, k] = [_sparse_distance(sparse, _sparse_shares(other, i, j)) for other in others]
        if progress is not None and k % 64 == 0:
            progress(k / len(pairs))
    return [_pair_table(reference.names, pairs, row) for row in values]


def one_way_tv(real: Any, synthetic: Any, numeric_bins: int = NUMERIC_BINS) -> dict[str, float]:
    """Total variation of each modelled column between two ``Records`` of one schema."""
    return binned_one_way(bin_records(real, numeric_bins), bin_records(synthetic, numeric_bins))


def two_way_tv(real: Any, synthetic: Any, numeric_bins: int = NUMERIC_BINS, seed: int = 0) -> PairTV:
    """Total variation of each pair of modelled columns between two ``Records`` of one schema.

    Tables with more than ``MAX_PAIRS`` pairs are measured on a sample of the pairs drawn with ``seed``.
    """
    left, right = bin_records(real, numeric_bins), bin_records(synthetic, numeric_bins)
    return binned_two_way(left, [right], choose_pairs(len(left.names), seed))[0]


def joint_counts(table: BinnedTable, i: int, j: int) -> np.ndarray:
    """Counts of the joint codes of columns ``i`` and ``j``: int64 [cardinality i, cardinality j]."""
    rows, columns = table.cardinalities[i], table.cardinalities[j]
    return np.bincount(_joint_keys(table, i, j), minlength=rows * columns).reshape(rows, columns)


def _joint_keys(table: BinnedTable, i: int, j: int) -> np.ndarray:
    keys: np.ndarray = table.codes[i] * table.cardinalities[j] + table.codes[j]
    return keys


def _dense_shares(table: BinnedTable, i: int, j: int) -> np.ndarray:
    cells = table.cardinalities[i] * table.cardinalities[j]
    return np.bincount(_joint_keys(table, i, j), minlength=cells) / table.rows


def _sparse_shares(table: BinnedTable, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    keys, counts = np.unique(_joint_keys(table, i, j), return_counts=True)
    return keys, counts / table.rows


def _half_l1(left: np.ndarray, right: np.ndarray) -> float:
    return float(0.5 * np.abs(left - right).sum())


def _sparse_distance(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> float:
    # Both sides sum to one, so half the L1 distance is one minus the overlap, which needs common keys only.
    _, at_left, at_right = np.intersect1d(left[0], right[0], assume_unique=True, return_indices=True)
    overlap = np.minimum(left[1][at_left], right[1][at_right]).sum()
    return float(max(0.0, 1.0 - overlap))


def _pair_table(names: tuple[str, ...], pairs: np.ndarray, values: np.ndarray) -> PairTV:
    matrix = np.full((len(names), len(names)), np.nan)
    matrix[pairs[:, 0], pairs[:, 1]] = values
    matrix[pairs[:, 1], pairs[:, 0]] = values
    return PairTV(names, matrix, pairs, values.copy())
