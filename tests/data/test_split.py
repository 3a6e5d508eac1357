"""The split into training and held-out units: by each unit's own key, so that no unit moves another."""

from __future__ import annotations

import numpy as np
import pytest

from synthward.data import IngestReport, Records, read_records, split_records
from synthward.engine.errors import DataError
from synthward.schema.load import parse_schema

SCHEMA = parse_schema(
    'version = 1\nunit = "u"\n[columns.u]\nkind = "id"\n'
    '[columns.x]\nkind = "integer"\nmin = 0\nmax = 1000000\n'
)
UNITS = 20_000


@pytest.fixture(scope="module")
def records():
    sizes = np.random.default_rng(1).integers(1, 4, UNITS)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    keys = np.array([f"patient-{number}" for number in range(UNITS)])
    values = np.arange(offsets[-1], dtype=np.float64)
    return Records(SCHEMA, {"x": values}, offsets, keys, IngestReport(int(offsets[-1])))


def test_a_partition_into_whole_units(records):
    train, holdout = split_records(records, holdout_fraction=0.2, salt="s")
    assert sorted([*train.unit_keys, *holdout.unit_keys]) == sorted(records.unit_keys)
    assert train.num_rows + holdout.num_rows == records.num_rows
    for part in (train, holdout):
        index = {key: number for number, key in enumerate(records.unit_keys)}
        for unit in range(0, part.num_units, 997):
            rows = part.columns["x"][part.unit_offsets[unit] : part.unit_offsets[unit + 1]]
            origin = index[part.unit_keys[unit]]
            np.testing.assert_array_equal(
                rows, np.arange(records.unit_offsets[origin], records.unit_offsets[origin + 1])
            )


def test_the_fraction_is_met(records):
    """Binomial(20,000, 0.2): 6.2 standard deviations hold but for one case in 1e9."""
    _, holdout = split_records(records, holdout_fraction=0.2, salt="s")
    assert abs(holdout.num_units - 0.2 * UNITS) < 6.2 * np.sqrt(UNITS * 0.2 * 0.8)


def test_a_unit_moves_no_other_unit(records):
    whole = set(split_records(records, holdout_fraction=0.3, salt="s")[1].unit_keys)
    keep = np.arange(UNITS) % 7 != 0
    part = records.select_units(keep)
    assert set(split_records(part, holdout_fraction=0.3, salt="s")[1].unit_keys) == whole & set(
        part.unit_keys
    )


def test_the_salt_decides(records):
    first = set(split_records(records, holdout_fraction=0.5, salt="a")[1].unit_keys)
    again = set(split_records(records, holdout_fraction=0.5, salt="a")[1].unit_keys)
    other = set(split_records(records, holdout_fraction=0.5, salt="b")[1].unit_keys)
    assert first == again
    assert abs(len(first & other) - UNITS / 4) < 6.2 * np.sqrt(UNITS * 0.25 * 0.75)


def test_nothing_held_out_and_nothing_left(records):
    train, holdout = split_records(records, holdout_fraction=0.0, salt="s")
    assert (train.num_units, holdout.num_units, holdout.num_rows) == (UNITS, 0, 0)
    single = records.select_units(np.arange(UNITS) == 5)
    with pytest.raises(DataError, match="one side empty"):
        split_records(single, holdout_fraction=0.2, salt="s")
    with pytest.raises(ValueError, match="holdout_fraction"):
        split_records(records, holdout_fraction=1.0, salt="s")


def test_rows_without_unit_split_by_content(tmp_path):
    """Where rows are units, a row's side depends on what it holds, not on where it stands."""
    schema = SCHEMA.with_unit(None)
    values = np.random.default_rng(2).permutation(5000)

    def read(name, cells):
        path = tmp_path / name
        path.write_text("u,x\n" + "".join(f"{number},{cell}\n" for number, cell in enumerate(cells)))
        return read_records(path, schema)

    held = split_records(read("a.csv", values), holdout_fraction=0.4, salt="s")[1].columns["x"]
    again = split_records(read("b.csv", values[::-1][100:]), holdout_fraction=0.4, salt="s")[1].columns["x"]
    assert set(again) == set(held) - set(values[::-1][:100])
    assert abs(len(held) - 2000) < 6.2 * np.sqrt(5000 * 0.24)


def test_select_units_checks_the_mask(records):
    with pytest.raises(ValueError, match="mask must be bool"):
        records.select_units(np.zeros(3, dtype=bool))
