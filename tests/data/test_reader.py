"""Reading records: typed conversion, units, counts, and one clear line for each fault."""

from __future__ import annotations

import datetime as dt
import gzip
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthward.data import read_records
from synthward.engine.errors import DataError
from synthward.schema.load import parse_schema

SCHEMA = parse_schema(
    """
version = 1
name = "visits"
unit = "patient"
missing_values = ["", "?", "-9"]

[columns.patient]
kind = "id"
[columns.note]
kind = "text"
exclude = true
[columns.age]
kind = "integer"
min = 0
max = 100
missing = true
[columns.weight]
kind = "continuous"
min = 0.0
max = 200.0
missing = true
[columns.sex]
kind = "categorical"
categories = ["F", "M"]
[columns.ward]
kind = "categorical"
categories = ["1", "2"]
other = "else"
missing = true
[columns.smoker]
kind = "boolean"
missing = true
[columns.seen]
kind = "datetime"
min = "2020-01-01"
max = "2020-12-31"
missing = true
[columns.diagnosis]
kind = "code"
system = "icd9"
level = "category"
missing = true

[[constraints]]
kind = "implies"
if = { column = "sex", equals = "M" }
then = { column = "smoker", equals = true }
"""
)
HEADER = "patient,note,age,weight,sex,ward,smoker,seen,diagnosis"
ROWS = [
    "p2,hello,41,70.5,F,1,yes,2020-03-01,250.83",
    'p1,"two\nlines",?,,M,9,0,2020-03-02T12:00:00,V57',
    "p2,,-9, 71 ,F,2,TRUE,?,8",
    "p3,,300,-5,M,,f,2021-05-05,?",
]


def write(folder, rows=ROWS, header=HEADER, name="visits.csv"):
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def level_names(records, name):
    levels = records.schema.columns[name].levels
    return [None if index < 0 else levels[index] for index in records.columns[name]]


@pytest.fixture
def records(tmp_path):
    return read_records(write(tmp_path), SCHEMA)


def test_rows_of_a_unit_are_together_and_in_file_order(records):
    assert records.unit_keys.tolist() == ["p2", "p1", "p3"]
    assert records.unit_offsets.tolist() == [0, 2, 3, 4]
    assert records.row_unit().tolist() == [0, 0, 1, 2]
    assert (records.num_rows, records.num_units) == (4, 3)


def test_values(records):
    nan = np.nan
    np.testing.assert_array_equal(records.columns["age"], [41, nan, nan, 100])
    np.testing.assert_array_equal(records.columns["weight"], [70.5, 71, nan, 0])
    first = (dt.date(2020, 3, 1) - dt.date(1970, 1, 1)).days
    last = (dt.date(2020, 12, 31) - dt.date(1970, 1, 1)).days
    np.testing.assert_array_equal(records.columns["seen"], [first, nan, first + 1, last])
    assert level_names(records, "sex") == ["F", "F", "M", "M"]
    assert level_names(records, "ward") == ["1", "2", "else", None]
    assert level_names(records, "smoker") == ["true", "true", "false", "false"]
    assert level_names(records, "diagnosis") == ["250", "008", "V57", None]
    assert list(records.columns) == [column.name for column in SCHEMA.modelled]


def test_report_counts(records):
    report = records.report
    assert report.rows == 4
    assert {name for name, count in report.clipped.items() if count} == {"age", "weight", "seen"}
    assert report.other["ward"] == 1
    assert report.missing == {
        "age": 2,
        "weight": 1,
        "sex": 0,
        "ward": 1,
        "smoker": 0,
        "seen": 1,
        "diagnosis": 1,
    }
    assert list(report.violations.values()) == [2]


def test_gzip_and_column_order_do_not_matter(tmp_path, records):
    path = tmp_path / "visits.csv.gz"
    cells = [line.split(",") for line in [HEADER, *[ROWS[0], *ROWS[2:]]]]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(",".join(reversed(line)) for line in cells) + "\n")
    again = read_records(path, SCHEMA)
    for name, values in again.columns.items():
        np.testing.assert_array_equal(values, np.delete(records.columns[name], 2), err_msg=name)


def test_progress_sees_every_row(tmp_path):
    seen = []
    read_records(write(tmp_path, ROWS * 10), SCHEMA, progress=seen.append)
    assert seen[-1] == 40
    assert seen == sorted(seen)


def parquet_table(**changes):
    table = {
        "patient": pa.array([7, 7, 8], pa.int64()),
        "note": pa.array([None, "a", "b"]),
        "age": pa.array([41, None, 30], pa.int8()),
        "weight": pa.array([Decimal("70.5"), None, Decimal("1.0")]),
        "sex": pa.array(["F", "M", "F"]).dictionary_encode(),
        "ward": pa.array([1.0, None, 3.0]),
        "smoker": pa.array([True, None, False]),
        "seen": pa.array(
            [dt.datetime(2020, 3, 1, 23, 59), None, dt.datetime(2020, 5, 1)], pa.timestamp("ns", "UTC")
        ),
        "diagnosis": pa.array(["250.1", None, "V57"], pa.large_string()),
    }
    return pa.table(table | changes)


def test_arrow_types(tmp_path):
    pq.write_table(parquet_table(), tmp_path / "v.parquet")
    records = read_records(tmp_path / "v.parquet", SCHEMA)
    assert records.unit_keys.tolist() == ["7", "8"]
    np.testing.assert_array_equal(records.columns["age"], [41, np.nan, 30])
    np.testing.assert_array_equal(records.columns["weight"], [70.5, np.nan, 1])
    assert level_names(records, "sex") == ["F", "M", "F"]
    assert level_names(records, "ward") == ["1", None, "else"]
    assert level_names(records, "smoker") == ["true", None, "false"]
    assert records.columns["seen"][0] == (dt.date(2020, 3, 1) - dt.date(1970, 1, 1)).days
    assert level_names(records, "diagnosis") == ["250", None, "V57"]


def test_numbers_that_mean_missing_do_so_in_parquet_too(tmp_path):
    pq.write_table(parquet_table(age=pa.array([41, -9, 30])), tmp_path / "v.parquet")
    assert np.isnan(read_records(tmp_path / "v.parquet", SCHEMA).columns["age"][1])


def test_a_folder_of_parts_is_one_table(tmp_path):
    for number in range(3):
        pq.write_table(parquet_table(), tmp_path / f"part-{number}.parquet")
    records = read_records(tmp_path, SCHEMA)
    assert (records.num_rows, records.num_units) == (9, 2)


def test_many_batches_keep_order_and_counts(tmp_path):
    """Row order inside units and counts hold over batches, and where sorting is not by insertion."""
    schema = parse_schema(
        'version = 1\nunit = "u"\n[columns.u]\nkind = "id"\n'
        '[columns.x]\nkind = "integer"\nmin = 10\nmax = 149000\n'
        '[columns.c]\nkind = "categorical"\ncategories = ["a"]\nother = "z"\nmissing = true\n'
    )
    units = np.random.default_rng(3).integers(0, 900, 150_000)
    cells = pa.array(["a", "b", None] * 50_000)
    pq.write_table(pa.table({"u": units, "x": np.arange(150_000), "c": cells}), tmp_path / "m.parquet")
    records = read_records(tmp_path / "m.parquet", schema)
    for unit in range(0, records.num_units, 83):
        rows = slice(*records.unit_offsets[unit : unit + 2])
        expected = np.clip(np.flatnonzero(units == int(records.unit_keys[unit])), 10, 149_000)
        np.testing.assert_array_equal(records.columns["x"][rows], expected)
    assert records.report.clipped == {"x": 10 + 999, "c": 0}
    assert records.report.other["c"] == records.report.missing["c"] == 50_000


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("age", pa.array([True, False, True])),
        ("weight", pa.array([dt.date(2020, 1, 1)] * 3)),
        ("seen", pa.array([1, 2, 3])),
        ("sex", pa.array([[1], [2], [3]])),
        ("patient", pa.array([[1], [2], [3]])),
    ],
)
def test_a_wrong_arrow_type(tmp_path, column, values):
    table = parquet_table()
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, tmp_path / "v.parquet")
    with pytest.raises(DataError, match=rf"column '{column}': has type"):
        read_records(tmp_path / "v.parquet", SCHEMA)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_in_parquet(tmp_path, value):
    pq.write_table(parquet_table(weight=pa.array([1.0, value, None])), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"column 'weight', row 2: is .* not a finite number"):
        read_records(tmp_path / "v.parquet", SCHEMA)


BAD_CELLS = [
    ("patient", "", "the privacy unit's id is missing"),
    ("patient", "?", "the privacy unit's id is missing"),
    ("age", "old", "'old' is not a number"),
    ("age", "41.5", ": 41.5 is not a whole number"),
    ("age", "1e999", "age"),
    ("weight", "nan", "not a finite number"),
    ("weight", "Inf", "not a finite number"),
    ("weight", "7O", "'7O' is not a number"),
    ("sex", "X", "'X' is not a declared category"),
    ("sex", "", "is missing"),
    ("smoker", "maybe", "'maybe' is not one of false/true"),
    ("seen", "01.02.2020", "does not match a date"),
    ("seen", "2020-13-01", "does not match a date"),
    ("diagnosis", "I10", "not an ICD-9 code"),
    ("sex", "x" * 500, "..."),
]


FAR = [("age", "old"), ("sex", "X"), ("patient", "")]
CASES = [(*bad, rows) for bad in BAD_CELLS for rows in (0, 4)] + [
    (*bad, 30_000) for bad in BAD_CELLS if bad[:2] in FAR
]


@pytest.mark.parametrize(("column", "cell", "message", "good_rows"), CASES, ids=lambda value: str(value)[:12])
def test_a_bad_cell_is_named(tmp_path, column, cell, message, good_rows):
    """The row is counted from 1 over all batches; a quoted line break does not shift it."""
    cells = ROWS[0].split(",")
    cells[HEADER.split(",").index(column)] = cell
    rows = (ROWS * (good_rows // 4 + 1))[:good_rows]
    # Long notes make a file of several blocks.
    rows = [row.replace("hello", "h" * 400) for row in rows] if good_rows > 4 else rows
    path = write(tmp_path, [*rows, ",".join(cells), *ROWS])
    with pytest.raises(DataError) as caught:
        read_records(path, SCHEMA)
    text = str(caught.value)
    assert text.startswith(f"{path}: column '{column}', row {good_rows + 1}: ")
    assert message in text
    assert "\n" not in text and len(text) < len(str(path)) + 160


def test_files_that_are_no_table(tmp_path):
    def refused(name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read_records(path, SCHEMA)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

    row = ROWS[0].encode()
    head = HEADER.encode() + b"\n"
    refused("a.csv", b"", "empty")
    refused("b.csv", b"\n\n", "empty")
    refused("c.csv", head, "no rows")
    refused("d.csv", head + row + b"\n" + row[:-10] + b"\n", "row 2: has 8 cells, the header has 9")
    refused("e.csv", head + row.replace(b"F", b"\xff\xfe") + b"\n", "UTF-8")
    refused("f.csv.gz", b"not gzip at all", "cannot read")
    refused("g.csv.gz", gzip.compress(head + (row + b"\n") * 999)[:-30], "cannot read")
    refused("h.parquet", b"PAR1 nothing PAR1", "not a readable Parquet")
    refused("i.xlsx", b"x", "unknown kind of file")
    refused("j.csv", head.replace(b"note", b"age") + row + b"\n", "'age' appears twice")
    refused("k.csv", (head + row + b"\n").decode().encode("utf-16"), "UTF-16")
    refused("m.csv", b"\xe9t\xe9," + head + row + b",\n", "UTF-8")
    refused("l.csv", (head + row + b"\n").replace(b",", b";"), "semicolons")
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.csv", SCHEMA)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet"):
        read_records(tmp_path / "folder", SCHEMA)


def test_columns_must_match_the_schema(tmp_path):
    with pytest.raises(DataError, match="column 'diagnosis' is declared but not in the file"):
        read_records(write(tmp_path, header=HEADER.replace("diagnosis", "icd")), SCHEMA)
    rows = [row.replace("\n", "") + ",x" for row in ROWS]
    with pytest.raises(DataError, match="column 'extra' is not declared"):
        read_records(write(tmp_path, rows, HEADER + ",extra"), SCHEMA)


def test_parts_of_a_folder_must_agree(tmp_path):
    pq.write_table(parquet_table(), tmp_path / "a.parquet")
    pq.write_table(parquet_table().drop_columns(["note"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: has other columns"):
        read_records(tmp_path, SCHEMA)


def test_a_constant_column_and_one_row(tmp_path):
    records = read_records(write(tmp_path, ROWS[:1]), SCHEMA)
    assert records.num_rows == records.num_units == 1
    assert read_records(write(tmp_path, ROWS[:1] * 50), SCHEMA).num_units == 1


def test_ten_thousand_categories(tmp_path):
    names = [f"c{number:05d}" for number in range(10_000)]
    listed = ", ".join(f'"{name}"' for name in names)
    schema = parse_schema(f'version = 1\n[columns.code]\nkind = "categorical"\ncategories = [{listed}]\n')
    cells = np.random.default_rng(0).permutation(np.repeat(np.arange(10_000), 3))
    path = write(tmp_path, [names[cell] for cell in cells], "code")
    np.testing.assert_array_equal(read_records(path, schema).columns["code"], cells)


def test_declared_boolean_words_and_datetime_format(tmp_path):
    schema = parse_schema(
        'version = 1\n[columns.b]\nkind = "boolean"\ncategories = ["nein", "ja"]\n'
        '[columns.d]\nkind = "datetime"\nmin = "2000-01-01"\nmax = "2030-01-01"\nformat = "%d.%m.%Y %H:%M"\n'
    )
    records = read_records(write(tmp_path, ["ja,03.02.2020 10:30", "nein,04.02.2020 00:00"], "b,d"), schema)
    assert records.columns["b"].tolist() == [1, 0]
    assert records.columns["d"][0] == dt.datetime(2020, 2, 3, 10, 30, tzinfo=dt.UTC).timestamp()
    with pytest.raises(DataError, match="row 1: '2020-02-03' does not match the format"):
        read_records(write(tmp_path, ["ja,2020-02-03"], "b,d"), schema)
    with pytest.raises(DataError, match="row 1: 'yes' is not one of nein/ja"):
        read_records(write(tmp_path, ["yes,03.02.2020 10:30"], "b,d"), schema)
