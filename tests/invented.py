"""Invented records whose columns depend on one hidden severity, for tests of evaluation and report."""

from __future__ import annotations

from typing import Any

import numpy as np

from synthward.data import IngestReport, Records
from synthward.schema import Schema
from synthward.schema.load import schema_from_dict

COLUMNS: dict[str, Any] = {
    "sex": {"kind": "categorical", "categories": ["female", "male"]},
    "stage": {"kind": "ordinal", "categories": ["I", "II", "III", "IV"], "missing": True},
    "code": {"kind": "code", "categories": [f"C{k:03d}" for k in range(300)]},
    "beds": {"kind": "integer", "min": 1, "max": 6},
    "sodium": {"kind": "continuous", "min": 100.0, "max": 180.0, "missing": True},
    "seen": {"kind": "datetime", "min": "2020-01-01", "max": "2023-12-31"},
    "died": {"kind": "boolean"},
}


def make_schema(columns: dict[str, Any] | None = None, **top: Any) -> Schema:
    """A schema of these columns; by default those above, with a unit and a label."""
    declared = {"patient": {"kind": "id"}, **(COLUMNS if columns is None else columns)}
    settings = {"unit": "patient"} | top
    if columns is None:
        settings = {"label": "died", "label_positive": "true"} | settings
    return schema_from_dict({"version": 1, "name": "invented", "columns": declared, **settings})


def as_records(schema: Schema, columns: dict[str, Any], report: IngestReport | None = None) -> Records:
    """Records of these columns, two rows per unit."""
    arrays = {
        c.name: np.asarray(columns[c.name], dtype=np.int32 if c.is_discrete else np.float64)
        for c in schema.modelled
    }
    rows = len(next(iter(arrays.values())))
    offsets = np.unique(np.r_[np.arange(0, rows, 2), rows]).astype(np.int64)
    keys = np.array([f"p{k}" for k in range(len(offsets) - 1)], dtype=str)
    return Records(schema, arrays, offsets, keys, report or IngestReport(rows))


def make_records(schema: Schema, rows: int, seed: int, *, link: float = 2.0) -> Records:
    """Rows whose columns follow a hidden severity; ``link`` is how strongly the label does."""
    rng = np.random.default_rng(seed)
    severity = rng.normal(size=rows)
    columns: dict[str, np.ndarray] = {}
    for column in schema.modelled:
        draw = 1.0 / (1.0 + np.exp(-severity - 0.5 * rng.normal(size=rows)))
        if column.name == "died":
            columns[column.name] = rng.random(rows) < 1.0 / (1.0 + np.exp(1.0 - link * severity))
        elif column.is_discrete:
            columns[column.name] = np.minimum(draw * len(column.levels), len(column.levels) - 1).astype(int)
        else:
            value = column.min + draw * (column.max - column.min)
            columns[column.name] = np.round(value) if column.is_integral else value
        if column.missing:
            gap = -1 if column.is_discrete else np.nan
            columns[column.name] = np.where(rng.random(rows) < 0.1, gap, columns[column.name])
    counts = IngestReport(rows, clipped={"sodium": 731}, other={}, missing={"stage": 913})
    return as_records(schema, columns, counts)
