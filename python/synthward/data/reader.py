"""Reads declared records from CSV or Parquet into memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synthward.data.constraints import check_constraints
from synthward.data.convert import ColumnConverter
from synthward.data.records import IngestReport, Records, row_digests
from synthward.data.source import Source
from synthward.engine.errors import DataError
from synthward.schema import Schema


def read_records(
    path: Path | str, schema: Schema, *, progress: Callable[[int], None] | None = None
) -> Records:
    """Reads a table that holds exactly the declared columns, in any order.

    Args:
        path: .csv, .csv.gz, .parquet, or a folder of .parquet parts of one table.
        schema: what the columns may hold. Values outside declared bounds are clipped and counted, unknown
            categories go to a declared `other` and are counted; both are in the result's report.
        progress: called after each batch with the number of rows read so far.

    Returns:
        Records, rows ordered so that each privacy unit's are together (within a unit, in file order).

    Raises:
        DataError: one line naming file, column and row (the first data row is 1): a column missing or not
            declared, a wrong type, an unknown category, a missing value or id that may not be, NaN or Inf, no
            rows.
    """
    source = Source(path)
    _check_names(source, schema)
    reader = _Reader(source, schema)
    for batch in source.batches(reader.names):
        reader.add(batch)
        if progress is not None:
            progress(reader.rows)
    return reader.finish()


def _check_names(source: Source, schema: Schema) -> None:
    for name in schema.columns:
        if name not in source.names:
            raise DataError(f"{source.path}: column '{name}' is declared but not in the file")
    for name in source.names:
        if name not in schema.columns:
            raise DataError(
                f"{source.path}: column '{name}' is not declared: add [columns.{name}] to the schema "
                "(exclude = true leaves it out of the cohort)"
            )


class _Reader:
    """Collects converted batches, then orders the rows by unit."""

    def __init__(self, source: Source, schema: Schema) -> None:
        self.schema = schema
        self.rows = 0
        self._source = str(source.path)
        self._converters = {
            column.name: ColumnConverter(column, schema, self._source) for column in schema.modelled
        }
        self._chunks: dict[str, list[np.ndarray]] = {name: [] for name in self._converters}
        self._keys: list[pa.Array] = []
        self._missing = pa.array(sorted({"", *schema.missing_values}), pa.string())
        self.names = [*self._converters, *(() if schema.unit is None else (schema.unit,))]

    def add(self, batch: pa.RecordBatch) -> None:
        first_row = self.rows + 1
        for name, converter in self._converters.items():
            self._chunks[name].append(converter.convert(batch.column(name), first_row))
        if self.schema.unit is not None:
            self._keys.append(self._unit_keys(batch.column(self.schema.unit), first_row))
        self.rows += batch.num_rows

    def _unit_keys(self, values: pa.Array, first_row: int) -> pa.Array:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_floating(values.type):
            # Whole ids arrive as floats where a column once had nulls: 3.0 is the id "3".
            values = _whole(values)
        try:
            keys = pc.utf8_trim_whitespace(values.cast(pa.string()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(
                f"{self._source}: column '{self.schema.unit}': has type {values.type}, which cannot be an id"
            ) from None
        absent = pc.or_(pc.fill_null(pc.is_in(keys, value_set=self._missing), True), pc.is_null(keys))
        if pc.any(absent).as_py():
            row = first_row + pc.index(absent, True).as_py()
            raise DataError(
                f"{self._source}: column '{self.schema.unit}', row {row}: the privacy unit's id is missing"
            )
        return keys

    def finish(self) -> Records:
        if self.rows == 0:
            raise DataError(f"{self._source}: the file has no rows")
        order, offsets, keys = self._units()
        columns: dict[str, np.ndarray] = {}
        for name in self._converters:
            # Chunks are dropped as columns are joined, so that memory never holds the table twice.
            values = np.concatenate(self._chunks.pop(name))
            columns[name] = values if order is None else values[order]
        if keys is None:
            keys = row_digests(columns, self.rows)
        counts = {name: converter.counts for name, converter in self._converters.items()}
        report = IngestReport(
            rows=self.rows,
            clipped={name: count.clipped for name, count in counts.items()},
            other={name: count.other for name, count in counts.items()},
            missing={name: count.missing for name, count in counts.items()},
            violations=check_constraints(self.schema, columns),
            source=self._source,
        )
        return Records(self.schema, columns, offsets, keys, report)

    def _units(self) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
        """(row order or None, unit offsets, unit keys or None): units in the order of their first row."""
        if self.schema.unit is None:
            return None, np.arange(self.rows + 1, dtype=np.int64), None
        encoded = pa.chunked_array(self._keys).combine_chunks().dictionary_encode()
        self._keys.clear()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes, minlength=len(encoded.dictionary))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        keys = np.array(encoded.dictionary.to_pylist(), dtype=np.str_)
        return (None if np.all(order[1:] > order[:-1]) else order), offsets, keys


def _whole(values: pa.Array) -> pa.Array:
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values
