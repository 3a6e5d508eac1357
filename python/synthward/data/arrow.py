"""Columns of a cohort as Arrow batches."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from synthward.engine.errors import DataError
from synthward.schema import Column, Schema


def arrow_schema(schema: Schema) -> pa.Schema:
    """The Arrow schema of a cohort: the modelled columns in order. Ids and excluded columns are not in it."""
    return pa.schema(
        [pa.field(column.name, arrow_type(column), column.missing) for column in schema.modelled]
    )


def arrow_type(column: Column) -> pa.DataType:
    """int64, float64, date32, timestamp[ms], bool (a boolean without declared categories), else dictionary
    text."""
    if column.kind == "integer":
        return pa.int64()
    if column.kind == "continuous":
        return pa.float64()
    if column.kind == "datetime":
        return pa.date32() if column.resolution == "day" else pa.timestamp("ms")
    if _is_plain_boolean(column):
        return pa.bool_()
    return pa.dictionary(pa.int32(), pa.string())


def _is_plain_boolean(column: Column) -> bool:
    return column.kind == "boolean" and column.categories is None


def to_arrow(schema: Schema, columns: dict[str, np.ndarray]) -> pa.RecordBatch:
    """One batch from columns as `Records` holds them (level indices with -1, floats with NaN).

    Whole-number columns are rounded to the nearest integer. Raises DataError where a column is absent, a
    level index is out of range, a number is infinite, or a value is missing in a column that may not be
    missing.
    """
    fields = arrow_schema(schema)
    lengths = {len(columns[column.name]) for column in schema.modelled if column.name in columns}
    if len(lengths) != 1:
        raise DataError(f"the columns of a batch have unequal lengths: {sorted(lengths)}")
    arrays = [_array(column, columns) for column in schema.modelled]
    return pa.RecordBatch.from_arrays(arrays, schema=fields)


def _array(column: Column, columns: dict[str, np.ndarray]) -> pa.Array:
    if column.name not in columns:
        raise DataError(f"column '{column.name}' is not in the batch")
    values = np.asarray(columns[column.name])
    absent = values < 0 if column.is_discrete else np.isnan(values)
    if not column.missing and absent.any():
        raise DataError(f"column '{column.name}', row {int(np.argmax(absent)) + 1} of the batch: is missing")
    mask = absent if absent.any() else None
    if column.is_discrete:
        if len(values) and (values.min() < -1 or values.max() >= len(column.levels)):
            raise DataError(f"column '{column.name}': a level index is outside -1..{len(column.levels) - 1}")
        if _is_plain_boolean(column):
            return pa.array(values == 1, mask=mask)
        indices = pa.array(values.astype(np.int32, copy=False), mask=mask)
        return pa.DictionaryArray.from_arrays(indices, pa.array(column.levels, pa.string()))
    if np.isinf(values).any():
        raise DataError(f"column '{column.name}': a value is infinite")
    if column.kind == "continuous":
        return pa.array(values.astype(np.float64, copy=False), mask=mask)
    whole = np.rint(np.where(absent, 0.0, values)).astype(np.int64)
    if column.kind == "integer":
        return pa.array(whole, mask=mask)
    if column.resolution == "day":
        return pa.array(whole.astype(np.int32), mask=mask).cast(pa.date32())
    return pa.array(whole * 1000, mask=mask).cast(pa.timestamp("ms"))
