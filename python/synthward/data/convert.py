"""Typed conversion of one column of one Arrow batch; no Python loop over cells, only over distinct values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synthward.codes import icd9
from synthward.engine.errors import DataError
from synthward.schema import Column, Schema

_TRUE = frozenset({"true", "t", "yes", "y", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "0"})
_SECONDS_PER_DAY = 86400.0


@dataclass
class Counts:
    """What conversion did to one column so far."""

    clipped: int = 0
    other: int = 0
    missing: int = 0


class ColumnConverter:
    """Turns Arrow arrays of one column into its NumPy form, and counts what it changed.

    Errors are DataError lines that name source, column and data row (the first row is 1).
    """

    def __init__(self, column: Column, schema: Schema, source: str) -> None:
        self.column = column
        self.source = source
        self.counts = Counts()
        self._texts = frozenset({"", *schema.missing_values})
        self._tokens = pa.array(sorted(self._texts), pa.string())
        numbers = [_number(token) for token in schema.missing_values]
        self._number_tokens = [number for number in numbers if number is not None]
        self._known: dict[str, tuple[int, bool]] = {}  # text -> (level or -1, whether it fell into `other`)

    def convert(self, values: pa.Array, first_row: int) -> np.ndarray:
        """int32 or float64 [n] from n cells, whose first is data row `first_row` (1-based)."""
        if pa.types.is_dictionary(values.type) and not self.column.is_discrete:
            values = values.dictionary_decode()
        if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
            values = values.cast(pa.string())
        if self.column.is_discrete:
            out = self._discrete(values, first_row)
            absent = out < 0
        else:
            out = (
                self._datetime(values, first_row)
                if self.column.kind == "datetime"
                else self._number(values, first_row)
            )
            absent = np.isnan(out)
        missing = int(np.count_nonzero(absent))
        if missing and not self.column.missing:
            row = first_row + int(np.argmax(absent))
            raise self._error(row, "is missing: declare missing = true, or complete the record")
        self.counts.missing += missing
        return out

    def _error(self, row: int, message: str) -> DataError:
        return DataError(f"{self.source}: column '{self.column.name}', row {row}: {message}")

    def _discrete(self, values: pa.Array, first_row: int) -> np.ndarray:
        if not pa.types.is_dictionary(values.type):
            values = self._as_text(values).dictionary_encode()
        entries = self._as_text(values.dictionary).to_pylist()
        codes = values.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        # The entry after the last stands for null cells; a null entry of the dictionary means the same.
        table = np.full(len(entries) + 1, -1, dtype=np.int32)
        unknown: list[int] = []
        others: list[int] = []
        for index, text in enumerate(entries):
            if text is None:
                continue
            level, is_other = self._level_of(text)
            table[index] = level
            if level == -2:
                unknown.append(index)
            elif is_other:
                others.append(index)
        out = table[codes]
        if unknown:
            # A dictionary may hold entries that no cell uses.
            bad = np.flatnonzero(out == -2)
            if len(bad):
                self._unknown(entries[codes[bad[0]]], first_row + int(bad[0]))
        if others:
            self.counts.other += int(np.count_nonzero(np.isin(codes, others)))
        return out

    def _as_text(self, values: pa.Array) -> pa.Array:
        if pa.types.is_string(values.type):
            return values
        if pa.types.is_floating(values.type):
            # Whole numbers arrive as floats where a column has nulls: 3.0 is the category "3".
            filled = values.fill_null(0.0).to_numpy(zero_copy_only=False)
            if np.all(np.isfinite(filled)) and np.all(filled == np.floor(filled)):
                values = values.cast(pa.int64())
        try:
            return values.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(
                f"{self.source}: column '{self.column.name}': has type {values.type}, "
                f"which cannot be read as kind '{self.column.kind}'"
            ) from None

    def _level_of(self, text: str) -> tuple[int, bool]:
        """(level, False), (-1, False) for missing, (other's level, True), or (-2, False) for unknown."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = self._look_up(text)
        return found

    def _look_up(self, text: str) -> tuple[int, bool]:
        column = self.column
        for form in (text, text.strip()):
            if form in column.level_index:
                return column.level_index[form], False
            if form in self._texts:
                return -1, False
        text = text.strip()
        if column.kind == "boolean" and column.categories is None:
            word = text.lower()
            if word in _TRUE or word in _FALSE:
                return int(word in _TRUE), False
        if column.system == "icd9":
            category = icd9.category_of(text)
            if category is not None and column.level == "chapter":
                return icd9.chapter_of(category), False
            if category is not None:
                return column.level_index[category], False
        if column.other is not None:
            return column.level_index[column.other], True
        return -2, False

    def _unknown(self, text: str, row: int) -> None:
        if self.column.system is not None:
            raise self._error(
                row, f'{short(text)} is not an ICD-9 code: declare other = "...", or correct it'
            )
        if self.column.kind == "boolean":
            wanted = "/".join(self.column.levels)
            raise self._error(
                row, f"{short(text)} is not one of {wanted}: declare the two categories, or correct it"
            )
        raise self._error(
            row, f'{short(text)} is not a declared category: add it to categories, or declare other = "..."'
        )

    def _number(self, values: pa.Array, first_row: int) -> np.ndarray:
        kind = values.type
        if pa.types.is_string(kind):
            values = self._parse(self._blank_tokens(values), first_row)
        elif pa.types.is_null(kind):
            return np.full(len(values), np.nan)
        elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise self._wrong_type(kind)
        absent = values.is_null().to_numpy(zero_copy_only=False)
        out = self._floats(values)
        for token in self._number_tokens if not pa.types.is_string(kind) else ():
            absent |= np.isnan(out) if math.isnan(token) else out == token
        bad = ~np.isfinite(out) & ~absent
        if bad.any():
            at = int(np.argmax(bad))
            raise self._error(
                first_row + at,
                f"is {out[at]}, not a finite number: correct it, or add it to missing_values",
            )
        out[absent] = np.nan
        if self.column.is_integral:
            with np.errstate(invalid="ignore"):
                bad = ~absent & (out != np.floor(out))
            if bad.any():
                at = int(np.argmax(bad))
                raise self._error(
                    first_row + at, f'{float(out[at])!r} is not a whole number: declare kind = "continuous"'
                )
        return self._clip(out)

    def _floats(self, values: pa.Array) -> np.ndarray:
        """float64 [n], writable; what nulls become does not matter."""
        if not pa.types.is_float64(values.type):
            values = values.cast(pa.float64(), safe=False)
        if values.null_count:
            values = values.fill_null(0.0)
        return np.array(values.to_numpy(zero_copy_only=False), dtype=np.float64)

    def _blank_tokens(self, values: pa.Array) -> pa.Array:
        """Text with blanks trimmed, and missing values made null."""
        values = pc.utf8_trim_whitespace(values)
        return pc.if_else(pc.is_in(values, value_set=self._tokens), pa.scalar(None, pa.string()), values)

    def _parse(self, values: pa.Array, first_row: int) -> pa.Array:
        try:
            return values.cast(pa.float64())
        except pa.ArrowInvalid:
            at = first_failure(values, lambda part: part.cast(pa.float64()))
            raise self._error(
                first_row + at, f"{short(values[at].as_py())} is not a number (kind '{self.column.kind}')"
            ) from None

    def _clip(self, values: np.ndarray) -> np.ndarray:
        column = self.column
        with np.errstate(invalid="ignore"):
            outside = (values < column.min) | (values > column.max)
        self.counts.clipped += int(np.count_nonzero(outside))
        return np.clip(values, column.min, column.max, out=values)

    def _wrong_type(self, kind: pa.DataType) -> DataError:
        return DataError(
            f"{self.source}: column '{self.column.name}': has type {kind}, "
            f"which cannot be read as kind '{self.column.kind}'"
        )

    def _datetime(self, values: pa.Array, first_row: int) -> np.ndarray:
        kind = values.type
        if pa.types.is_string(kind):
            values = self._parse_moments(self._blank_tokens(values), first_row)
        elif pa.types.is_null(kind):
            return np.full(len(values), np.nan)
        elif not (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
            raise self._wrong_type(kind)
        absent = values.is_null().to_numpy(zero_copy_only=False)
        # A zone-aware timestamp holds UTC already; microseconds hold every year that a record can name.
        values = values.cast(pa.timestamp("us", getattr(values.type, "tz", None)), safe=False)
        seconds = np.floor(self._floats(values.cast(pa.int64())) / 1e6)
        out = np.floor(seconds / _SECONDS_PER_DAY) if self.column.resolution == "day" else seconds
        out[absent] = np.nan
        return self._clip(out)

    def _parse_moments(self, values: pa.Array, first_row: int) -> pa.Array:
        wanted = self.column.format

        def parse(part: pa.Array) -> pa.Array:
            if wanted is not None:
                return pc.strptime(part, format=wanted, unit="us")
            return part.cast(pa.timestamp("us"))

        try:
            return parse(values)
        except pa.ArrowInvalid:
            at = first_failure(values, parse)
            form = (
                f"the format {wanted!r}"
                if wanted is not None
                else "a date such as 2024-01-31: declare its format"
            )
            raise self._error(first_row + at, f"{short(values[at].as_py())} does not match {form}") from None


def first_failure(values: pa.Array, parse: Callable[[pa.Array], object]) -> int:
    """Index of the first cell that `parse` refuses, by halving."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            parse(values.slice(low, middle - low))
        except pa.ArrowInvalid:
            high = middle
        else:
            low = middle
    return low


def short(value: object) -> str:
    """A value for an error line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:36] + "...'"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
