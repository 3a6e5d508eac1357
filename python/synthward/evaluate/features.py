"""Features of the utility classifiers: fitted on each one's training table, never on the test table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

MAX_LEVELS = 255
"""Categories per column that the boosted trees accept."""


@dataclass(frozen=True)
class _DiscreteFeature:
    name: str
    ordered: bool
    mapping: np.ndarray  # int64 [levels]: level index -> feature code
    size: int  # number of feature codes


@dataclass(frozen=True)
class _NumericFeature:
    name: str
    mean: float
    scale: float


class FeatureEncoder:
    """Turns the columns of ``Records`` into matrices for the two classifiers.

    Codes with more levels than the trees accept are reduced to their public groups (``level_groups``); where
    there are no groups, to the most frequent levels of the table that the classifier is trained on.

    Args:
        schema: the schema of all tables.
        records: the table that the classifier is trained on.
        rows: int64 indices of its rows in use.
        exclude: column that is not a feature (the label).
    """

    def __init__(self, schema: Any, records: Any, rows: np.ndarray, exclude: str) -> None:
        self._features: list[_DiscreteFeature | _NumericFeature] = []
        for column in schema.modelled:
            if column.name == exclude:
                continue
            values = records.columns[column.name][rows]
            fit = _fit_discrete if column.is_discrete else _fit_numeric
            self._features.append(fit(column, values))

    def categorical_mask(self) -> np.ndarray:
        """Which columns of ``ordinal`` hold unordered categories: bool [F]."""
        return np.array([isinstance(f, _DiscreteFeature) and not f.ordered for f in self._features])

    def ordinal(self, records: Any, rows: np.ndarray) -> np.ndarray:
        """One column per feature, categories as codes, NaN for missing: float64 [N, F]."""
        matrix = np.empty((len(rows), len(self._features)))
        for k, feature in enumerate(self._features):
            values = records.columns[feature.name][rows]
            if isinstance(feature, _NumericFeature):
                matrix[:, k] = values
            else:
                matrix[:, k] = np.where(values < 0, np.nan, feature.mapping[values])
        return matrix

    def one_hot(self, records: Any, rows: np.ndarray) -> sparse.csr_matrix:
        """Categories one-hot (missing is a category), numbers scaled and with a missing flag: [N, W]."""
        indices, data, width = [], [], 0
        for feature in self._features:
            values = records.columns[feature.name][rows]
            if isinstance(feature, _NumericFeature):
                missing = np.isnan(values)
                scaled = np.where(missing, 0.0, (values - feature.mean) / feature.scale)
                indices += [np.full(len(rows), width), np.full(len(rows), width + 1)]
                data += [scaled, missing.astype(np.float64)]
                width += 2
            else:
                indices.append(width + np.where(values < 0, feature.size, feature.mapping[values]))
                data.append(np.ones(len(rows)))
                width += feature.size + 1
        if not indices:
            return sparse.csr_matrix((len(rows), 0))
        starts = np.arange(len(rows) + 1) * len(indices)
        flat = (np.stack(data, axis=1).ravel(), np.stack(indices, axis=1).ravel(), starts)
        return sparse.csr_matrix(flat, shape=(len(rows), width))

    def __len__(self) -> int:
        return len(self._features)


def _fit_discrete(column: Any, values: np.ndarray) -> _DiscreteFeature:
    levels = len(column.levels)
    mapping = np.arange(max(1, levels), dtype=np.int64)
    groups = getattr(column, "level_groups", None)
    if levels > MAX_LEVELS and groups is not None:
        mapping = np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
    if mapping.max() >= MAX_LEVELS:
        present = values[values >= 0]
        frequency = np.bincount(mapping[present], minlength=int(mapping.max()) + 1)
        kept = np.argsort(-frequency, kind="stable")[: MAX_LEVELS - 1]
        reduced = np.full(len(frequency), MAX_LEVELS - 1, dtype=np.int64)  # the last code is "any other"
        reduced[kept] = np.arange(len(kept))
        mapping = reduced[mapping]
    return _DiscreteFeature(column.name, column.kind == "ordinal", mapping, int(mapping.max()) + 1)


def _fit_numeric(column: Any, values: np.ndarray) -> _NumericFeature:
    present = values[~np.isnan(values)]
    if present.size == 0:
        return _NumericFeature(column.name, 0.0, 1.0)
    return _NumericFeature(column.name, float(present.mean()), float(present.std()) or 1.0)
