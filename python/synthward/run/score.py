"""The score of a trial: how far its samples are from the records, as one charged query.

A table is a pair of columns on a grid that the schema fixes. Let w_u be the distribution of unit u's rows over its
cells: all rows of a unit weigh the same, and together 1. With n units, c = sum_u w_u, and s for the samples likewise,

    d = 1/2 || c - n s ||_1 = n TV(c / n, s),

and the score is the mean of d over the tables: n times the mean total variation distance; less is better.

Sensitivity. The samples do not depend on the records but through what the trial has paid for, so s is a constant. One
unit u more (or less) moves c - n s by w_u - s. By the triangle inequality d moves by at most 1/2 || w_u - s ||_1, which
is at most 1/2 (|| w_u ||_1 + || s ||_1) = 1, whatever the unit, the other units and the samples; so does a mean of d.

Everything is a whole number here: rows weigh whole parts of a unit (`Units.weights`), samples are counted. The query is
asked for the sum of || m c' - N s' ||_1 over T tables, where c' counts in parts (W of which make a unit), N is the sum
of c', and s' the counts of m samples; one unit moves it by at most 2 T W m.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from synthward.data import Records
from synthward.engine import QueryMechanism
from synthward.engine.queries.units import PARTS, Units
from synthward.evaluate.binning import bin_column
from synthward.schema import Column, Schema

#: Samples that a trial is judged by.
SAMPLES = 4096
# Cells of a table are few enough for the samples to fill them.
_NUMERIC_BINS = 10
_MOST_LEVELS = 24
# Tables of one score; with more columns, those with the label and some of the others.
_MOST_TABLES = 256
# Below the largest int64; a value cut off there moves by no more than it did before.
_LARGEST = 1 << 62

Samples = Mapping[str, NDArray[np.generic]]


class Score:
    """The score query of one data set; one trial after the other asks it.

    Args:
        records: the training units.
    """

    def __init__(self, records: Records) -> None:
        self._schema = records.schema
        self.tables = tables_of(records.schema)
        units = Units.from_offsets(records.unit_offsets)
        self._weights = units.weights(np.ones(records.num_rows, dtype=np.bool_), None).rows
        self._total = int(self._weights.sum())
        self._counts = self._count(records.columns, self._weights)

    @property
    def sensitivity(self) -> int:
        """How far one unit, added or removed, can move `distance`: 2 T W m."""
        return 2 * len(self.tables) * PARTS * SAMPLES

    def distance(self, samples: Samples | None) -> int:
        """The sum over tables, before noise. Private: `ask` is what pays for it.

        Args:
            samples: columns of `SAMPLES` rows, as `Records` holds them; None: no sample at all.
        """
        none = [np.zeros_like(counts) for counts in self._counts]
        sampled = none if samples is None else self._count(samples, np.ones(SAMPLES, dtype=np.int64))
        found = 0
        for mine, theirs in zip(self._counts, sampled, strict=True):
            found += int(np.abs(mine * SAMPLES - theirs * self._total).sum())
        return min(found, _LARGEST)

    def ask(self, samples: Samples | None, mechanism: QueryMechanism, noise_multiplier: float) -> float:
        """The noisy score in units: n times the mean total variation distance, and noise of `noise_multiplier`."""
        noisy = mechanism.integer_vector(
            np.array([self.distance(samples)], dtype=np.int64),
            l2_sensitivity=float(self.sensitivity),
            noise_multiplier=noise_multiplier,
            note=f"score of a trial: distance in {len(self.tables)} tables",
        )
        return float(noisy[0]) / self.sensitivity

    def _count(self, columns: Samples, weights: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Weight of each cell of each table, int64; exact, as sums stay below 2^53."""
        codes = {c.name: _codes(c, columns[c.name]) for c in self._schema.modelled}
        sizes = {c.name: _size(c) for c in self._schema.modelled}
        found = []
        for first, second in self.tables:
            cells = codes[first] * sizes[second] + codes[second]
            size = sizes[first] * sizes[second]
            found.append(np.bincount(cells, weights=weights, minlength=size).astype(np.int64))
        return found


def tables_of(schema: Schema) -> list[tuple[str, str]]:
    """The pairs of columns that are compared, a function of the schema; of a single column, it with itself."""
    names = [column.name for column in schema.modelled]
    pairs = list(combinations(names, 2)) or [(names[0], names[0])]
    if len(pairs) <= _MOST_TABLES:
        return pairs
    labelled = [pair for pair in pairs if schema.label in pair][:_MOST_TABLES]
    others = [pair for pair in pairs if schema.label not in pair]
    wanted = _MOST_TABLES - len(labelled)
    return labelled + [others[i * len(others) // wanted] for i in range(wanted)]


def _codes(column: Column, values: NDArray[np.generic]) -> NDArray[np.int64]:
    """Code of each row, int64, in 0 .. size - 1; the last one is missing."""
    codes = bin_column(column, values, _NUMERIC_BINS)
    groups = _groups(column)
    return codes if groups is None else groups[codes]


def _size(column: Column) -> int:
    groups = _groups(column)
    return int(groups.max()) + 1 if groups is not None else _NUMERIC_BINS + 1


def _groups(column: Column) -> NDArray[np.int64] | None:
    """Of a discrete column, which code each level, and missing behind them, has; public. None for numbers."""
    if not column.is_discrete:
        return None
    levels = np.arange(len(column.levels), dtype=np.int64)
    declared = column.level_groups
    groups = levels if declared is None else np.unique(declared, return_inverse=True)[1].astype(np.int64)
    many = int(groups.max()) + 1
    if many > _MOST_LEVELS:
        groups = groups * _MOST_LEVELS // many
    return np.append(groups, groups.max() + 1)
