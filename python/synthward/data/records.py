"""Records held in memory, column by column, with the rows of each privacy unit together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from synthward.engine.errors import DataError
from synthward.schema import Schema


@dataclass(frozen=True)
class IngestReport:
    """What reading did to the records. These counts are private: they are for the custodian's eyes only."""

    rows: int
    clipped: dict[str, int] = field(default_factory=dict)  # values moved to the nearest declared bound
    other: dict[str, int] = field(default_factory=dict)  # values put into the declared `other` category
    missing: dict[str, int] = field(default_factory=dict)
    violations: dict[str, int] = field(default_factory=dict)  # rows that break each declared constraint
    source: str = "records"  # what errors call the file


@dataclass(frozen=True)
class Records:
    """A table of records.

    Attributes:
        schema: the declared schema.
        columns: one array [N] for each modelled column, in schema order. Discrete: int32 level index, -1
            where missing. Numeric and datetime: float64, NaN where missing.
        unit_offsets: int64 [U + 1]; unit u owns rows unit_offsets[u] : unit_offsets[u + 1].
        unit_keys: [U]; the unit column's text, or, where the schema names no unit and every row is its own, a
            uint64 digest of the row's content.
        report: what reading did.
    """

    schema: Schema
    columns: dict[str, np.ndarray]
    unit_offsets: np.ndarray
    unit_keys: np.ndarray
    report: IngestReport

    @property
    def num_rows(self) -> int:
        """Number of rows N. Private: not to be released without paying for it."""
        return int(self.unit_offsets[-1])

    @property
    def num_units(self) -> int:
        """Number of privacy units U. Private, as `num_rows`."""
        return len(self.unit_offsets) - 1

    def row_unit(self) -> np.ndarray:
        """int64 [N]: the unit of each row."""
        return np.repeat(np.arange(self.num_units, dtype=np.int64), np.diff(self.unit_offsets))

    def select_units(self, mask: np.ndarray) -> Records:
        """The records of the units where `mask` (bool [U]) is true. The report is that of the whole
        reading."""
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (self.num_units,):
            raise ValueError(f"mask must be bool [{self.num_units}], got {mask.dtype} {list(mask.shape)}")
        counts = np.diff(self.unit_offsets)
        rows = np.repeat(mask, counts)
        offsets = np.concatenate([[0], np.cumsum(counts[mask])]).astype(np.int64)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Records(self.schema, columns, offsets, self.unit_keys[mask], self.report)


def split_records(records: Records, *, holdout_fraction: float, salt: str) -> tuple[Records, Records]:
    """Splits units into (train, holdout) by a keyed hash of each unit's key.

    A unit's side depends on its own key and the salt alone, never on the other units, so that adding or
    removing a unit moves no other one: the split costs nothing in privacy. Where rows are their own units the
    key is a digest of the row's content, for the same reason; equal rows fall on the same side.

    Raises DataError where one side would be empty; holdout_fraction 0 gives an empty holdout.
    """
    if not 0.0 <= holdout_fraction < 1.0:
        raise ValueError(f"holdout_fraction must be in [0, 1), got {holdout_fraction}")
    threshold = int(holdout_fraction * 2.0**64)
    holdout = _salted_hash(records.unit_keys, salt) < np.uint64(threshold)
    if holdout_fraction > 0 and (holdout.all() or not holdout.any()):
        raise DataError(
            f"{records.report.source}: holding out {holdout_fraction:g} of {records.num_units} units "
            "leaves one side empty: give more records, or hold out none"
        )
    return records.select_units(~holdout), records.select_units(holdout)


def _salted_hash(keys: np.ndarray, salt: str) -> np.ndarray:
    """uint64 [U] from the keys' text (or digests) under a salt of any length."""
    salt_key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    out = np.empty(len(keys), dtype=np.uint64)
    for index, key in enumerate(keys.tolist()):
        data = key.encode() if isinstance(key, str) else int(key).to_bytes(8, "little")
        out[index] = int.from_bytes(hashlib.blake2b(data, key=salt_key, digest_size=8).digest(), "little")
    return out


def row_digests(columns: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """uint64 [N]: a digest of each row's content (splitmix64 over its values, in column order)."""
    digest = np.full(rows, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for values in columns.values():
        # Adding 0.0 makes the two zeros one.
        bits = (values.astype(np.float64) + 0.0).view(np.uint64)
        digest = _mix(digest ^ _mix(bits + np.uint64(0x9E3779B97F4A7C15)))
    return digest


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
