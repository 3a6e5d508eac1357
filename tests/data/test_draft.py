"""Drafted schemas: they load, they read their own table without a clip, and they say what they are."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthward.data import draft_schema, read_records
from synthward.engine.errors import DataError
from synthward.schema.load import parse_schema

ROWS = 400


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    return {
        "patient_id": [f"p{number}" for number in rng.integers(0, 300, ROWS)],
        "age": rng.integers(18, 95, ROWS).tolist(),
        "weight": [None if number % 5 == 0 else round(float(rng.normal(70, 9)), 1) for number in range(ROWS)],
        "ward_type": rng.integers(1, 5, ROWS).tolist(),
        "smoker": rng.choice(["yes", "no"], ROWS).tolist(),
        "stage": rng.choice(["I", "II", "?"], ROWS).tolist(),
        "diag_1": rng.choice(["250.83", "V57", "8", "E885.9"], ROWS).tolist(),
        "number_diagnoses": rng.integers(1, 9, ROWS).tolist(),
        "seen": [
            str(dt.date(2020, 1, 1) + dt.timedelta(days=int(day))) for day in rng.integers(0, 300, ROWS)
        ],
        "constant": ["x"] * ROWS,
        "nothing": [None] * ROWS,
        "note": [f"free text {number}" for number in range(ROWS)],
    }


def write(folder, table, suffix):
    path = folder / f"records{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(table), path)
        return path
    lines = zip(*table.values(), strict=True)
    path.write_text(
        ",".join(table)
        + "\n"
        + "".join(",".join("" if c is None else str(c) for c in row) + "\n" for row in lines)
    )
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_kinds_and_bounds(tmp_path, table, suffix):
    text, _ = draft_schema(write(tmp_path, table, suffix))
    schema = parse_schema(text)
    kinds = {name: (column.kind, column.exclude) for name, column in schema.columns.items()}
    assert kinds == {
        "patient_id": ("id", False),
        "age": ("integer", False),
        "weight": ("continuous", False),
        "ward_type": ("categorical", False),
        "smoker": ("boolean", False),
        "stage": ("categorical", False),
        "diag_1": ("code", False),
        "number_diagnoses": ("integer", False),
        "seen": ("datetime", False),
        "constant": ("categorical", False),
        "nothing": ("text", True),
        "note": ("text", True),
    }
    columns = schema.columns
    assert (columns["age"].min, columns["age"].max) == (min(table["age"]), max(table["age"]))
    assert columns["weight"].decimals == 1 and columns["weight"].missing
    assert columns["ward_type"].levels == ("1", "2", "3", "4")
    assert columns["stage"].levels == ("I", "II") and columns["stage"].missing
    assert schema.missing_values == ("", "?")
    assert schema.unit is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_draft_reads_its_own_table(tmp_path, table, suffix):
    path = write(tmp_path, table, suffix)
    text, _ = draft_schema(path)
    report = read_records(path, parse_schema(text)).report
    assert report.rows == ROWS
    assert sum(report.clipped.values()) == sum(report.other.values()) == 0
    assert report.missing["weight"] == ROWS // 5


def test_it_says_that_it_is_not_private(tmp_path, table):
    text, warnings = draft_schema(write(tmp_path, table, ".csv"))
    assert text.startswith("# A DRAFT")
    assert "NOT private" in text
    assert '# unit = "patient_id"' in text
    assert "not private" in warnings[0]
    assert any("'constant': has the same value" in line for line in warnings)
    assert any("'note'" in line for line in warnings)
    assert any("'nothing'" in line for line in warnings)


def test_numbers_of_every_width(tmp_path):
    """Bounds are exact: single precision, large, tiny and signed numbers clip nothing."""
    rng = np.random.default_rng(1)
    values = {
        "single": pa.array(rng.normal(size=50).astype(np.float32)),
        "large": pa.array(rng.integers(-(2**60), 2**60, 50)),
        "tiny": pa.array(rng.normal(size=50) * 1e-12),
        "same": pa.array([0.25] * 50),
        "whole": pa.array([float(value) for value in range(50)]),
        "coded_type": pa.array([float(value % 3) for value in range(50)]),
    }
    path = tmp_path / "n.parquet"
    pq.write_table(pa.table(values), path)
    schema = parse_schema(draft_schema(path)[0])
    assert sum(read_records(path, schema).report.clipped.values()) == 0
    assert schema.columns["whole"].kind == "integer"
    assert schema.columns["coded_type"].levels == ("0", "1", "2")


def test_awkward_names_and_values(tmp_path):
    table = {
        'a "quoted" name': ["x\\y", 'say "hi"'] * 5,
        "blood.group": ["é", "日本"] * 5,
        "": ["1", "2"] * 5,
    }
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(table), path)
    schema = parse_schema(draft_schema(path)[0])
    assert list(schema.columns) == list(table)
    assert schema.columns['a "quoted" name'].levels == ('say "hi"', "x\\y")
    assert read_records(path, schema).num_rows == 10


def test_no_rows(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="no rows"):
        draft_schema(tmp_path / "r.csv")
