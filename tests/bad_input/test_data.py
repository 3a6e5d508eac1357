"""Records that are not what the schema says: one clear line with column and row, and nothing written."""

from __future__ import annotations

import csv

import pytest

from tests.commandline import fit_arguments
from tests.tinydata import COLUMNS, SCHEMA, only_columns, table, write_csv


def test_an_empty_file(desk):
    desk.data.write_bytes(b"")
    desk.fit_refused(mentions=("data.csv", "empty"))


def test_a_header_without_rows(desk):
    write_csv(desk.data, [])
    desk.fit_refused(mentions=("data.csv",))


def test_a_single_row(desk):
    write_csv(desk.data, table(1, 1))
    desk.fit_refused(mentions=("data.csv",))


def test_a_file_that_does_not_exist(desk):
    desk.data.unlink()
    desk.fit_refused(mentions=("data.csv",))


def test_a_folder_without_parts(desk):
    desk.data.unlink()
    desk.data.mkdir()
    desk.fit_refused(mentions=("data.csv",))


@pytest.mark.parametrize("name", ["records.parquet", "records.csv.gz"])
def test_a_file_that_is_not_what_its_name_says(desk, name):
    data = desk.folder / name
    data.write_bytes(b"\x00\x01not a table at all" * 50)
    desk.refused(*fit_arguments(data, desk.schema, desk.out), mentions=(name,))


def test_bytes_that_are_no_text(desk):
    desk.data.write_bytes(desk.data.read_bytes() + b"\xff\xfe\x80" * 10 + b"\n")
    desk.fit_refused(mentions=("data.csv",))


def test_a_kind_of_file_that_is_not_read(desk):
    data = desk.data.rename(desk.folder / "data.xlsx")
    desk.refused(*fit_arguments(data, desk.schema, desk.out), mentions=("data.xlsx",))


@pytest.mark.parametrize("column", ["patient", "weight", "outcome"])
def test_a_column_missing(desk, column):
    write_csv(desk.data, table(), tuple(c for c in COLUMNS if c != column))
    desk.fit_refused(mentions=("data.csv", column))


def test_a_column_that_is_not_declared(desk):
    rows = [row | {"postcode": "08001"} for row in table()]
    write_csv(desk.data, rows, (*COLUMNS, "postcode"))
    desk.fit_refused(mentions=("data.csv", "postcode"))


def test_a_column_twice(desk):
    lines = desk.data.read_text().splitlines()
    desk.data.write_text("\n".join(line + "," + line.split(",")[1] for line in lines) + "\n")
    desk.fit_refused(mentions=("age",))


def test_a_row_of_another_length(desk):
    lines = desk.data.read_text().splitlines()
    lines[6] = ",".join(lines[6].split(",")[:-2])
    desk.data.write_text("\n".join(lines) + "\n")
    desk.fit_refused(mentions=("data.csv",))


BAD_CELLS = [
    ("age", "old"),
    ("age", "41.5"),
    ("age", "nan"),
    ("age", "1e400"),
    ("age", ""),
    ("weight", "heavy"),
    ("weight", "NaN"),
    ("weight", "nan"),
    ("weight", "inf"),
    ("weight", "-Infinity"),
    ("weight", "72,5"),
    ("sex", "X"),
    ("sex", ""),
    ("stage", "V"),
    ("smoker", "perhaps"),
    ("visited", "2020-13-01"),
    ("visited", "yesterday"),
    ("outcome", "Alive"),
    ("patient", ""),
]


@pytest.mark.parametrize(("column", "cell"), BAD_CELLS, ids=lambda v: v or "missing")
def test_a_cell_that_the_schema_does_not_allow(desk, column, cell):
    """The 38th row is the bad one; the message names the column and the row."""
    rows = table()
    rows[37][column] = cell
    write_csv(desk.data, rows)
    desk.fit_refused(mentions=("data.csv", column, "38"))


def test_the_bad_cell_of_a_late_row_is_found(desk):
    """Beyond the first batch of a streaming reader, and still with the right row number."""
    rows = table(2000, 60_000)
    rows[54_320]["age"] = "old"
    write_csv(desk.data, rows)
    desk.fit_refused(mentions=("age", "54321"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_in_parquet(desk, bad):
    """Parquet can hold a NaN that is not a missing value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = table()
    typed = {c: [r[c] or None for r in rows] for c in COLUMNS}
    weights = [float(w) if w else None for w in typed["weight"]]
    weights[11] = bad
    numbers = {c: [int(v) for v in typed[c]] for c in ("age", "first", "last")}
    flags = {c: [v == "true" for v in typed[c]] for c in ("smoker", "pregnant")}
    data = desk.folder / "data.parquet"
    pq.write_table(pa.table(typed | {"weight": weights} | numbers | flags), data)
    desk.refused(*fit_arguments(data, desk.schema, desk.out), mentions=("weight", "12"))


def works(desk, **settings):
    """The fit ends well and a cohort of the asked size can be drawn."""
    outcome = desk.call(*fit_arguments(desk.data, desk.schema, desk.out, **settings))
    assert outcome.code == 0, outcome.stderr[-2000:]
    cohort = desk.folder / "cohort.csv"
    outcome = desk.call("sample", desk.out, "--rows", 50, "--out", cohort)
    assert outcome.code == 0, outcome.stderr[-2000:]
    with cohort.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_constant_columns_work(desk, generator):
    """A number, a category and a missing column that never change, and a column that has but one category."""
    rows = [r | {"age": "44", "sex": "F", "weight": "", "site": "north"} for r in table()]
    write_csv(desk.data, rows, (*COLUMNS, "site"))
    block = '\n[columns.site]\nkind = "categorical"\ncategories = ["north"]\n'
    desk.schema.write_text(SCHEMA.replace("\n[[constraints]]", block + "\n[[constraints]]", 1))
    cohort = works(desk, generator=generator)
    assert {row["site"] for row in cohort} == {"north"}


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_ten_thousand_categories_work(desk, generator):
    levels = [f"c{i:05d}" for i in range(10_000)]
    rows = [r | {"code": levels[(37 * i) % 10_000]} for i, r in enumerate(table())]
    write_csv(desk.data, rows, (*COLUMNS, "code"))
    listed = ", ".join(f'"{level}"' for level in levels)
    block = f'\n[columns.code]\nkind = "categorical"\ncategories = [{listed}]\n'
    desk.schema.write_text(SCHEMA.replace("\n[[constraints]]", block + "\n[[constraints]]", 1))
    cohort = works(desk, generator=generator)
    assert {row["code"] for row in cohort} <= set(levels)


@pytest.mark.slow
def test_values_beyond_the_bounds_are_clipped_not_refused(desk):
    rows = table()
    rows[3]["age"], rows[4]["weight"] = "140", "1e30"
    write_csv(desk.data, rows)
    cohort = works(desk)
    assert all(0 <= int(row["age"]) <= 100 for row in cohort)


@pytest.mark.slow
def test_a_byte_order_mark_is_no_part_of_a_name(desk):
    """Spreadsheets write one."""
    desk.data.write_bytes(b"\xef\xbb\xbf" + desk.data.read_bytes())
    works(desk)


@pytest.mark.slow
def test_two_columns_are_enough(desk):
    keep = ("patient", "age", "outcome")
    write_csv(desk.data, table(), keep)
    desk.schema.write_text(only_columns(SCHEMA, keep))
    assert {"age", "outcome"} <= set(works(desk)[0])
