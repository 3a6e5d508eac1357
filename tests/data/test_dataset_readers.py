"""A cohort in parts is one table for every reader, and a check finds what was changed in it."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from synthward.data import check_dataset, read_records, to_arrow
from synthward.data.manifest import MANIFEST_FILE
from synthward.engine.errors import DataError, OutputError
from tests.data.parts import SCHEMA, batches, begin, columns, contents, staging, write


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "cohort"


# one table for every reader


def test_pyarrow_reads_one_table(out):
    write(out)
    found = pads.dataset(out)
    assert len(found.files) == 5
    table = found.to_table()
    table.validate(full=True)
    assert table["n"].to_pylist() == list(range(430))
    assert table.schema.field("c").type == pa.dictionary(pa.int32(), pa.string())
    assert {tuple(chunk.dictionary.to_pylist()) for chunk in table["c"].chunks} == {("a", "b", "c", "never")}
    assert found.to_table(filter=pads.field("c") == "a").num_rows == table["c"].to_pylist().count("a")
    assert len({pq.read_schema(out / name).serialize().to_pybytes() for name in found.files}) == 1


def test_duckdb_reads_one_table(out):
    expected = pads.dataset(write(out)).to_table()
    with duckdb.connect() as base:
        for place in (out, out / "*.parquet"):
            source = f"read_parquet('{place}')"
            types = [row[1] for row in base.execute(f"describe select * from {source}").fetchall()]
            assert types == ["BIGINT", "VARCHAR", "DOUBLE", "DATE", "TIMESTAMP", "BOOLEAN"]
            rows = base.execute(f"select * from {source} order by n").fetchall()
            assert rows == [tuple(row.values()) for row in expected.to_pylist()]
        counts = dict(base.execute(f"select c, count(*) from {source} group by c").fetchall())
    column = expected["c"].to_pylist()
    assert counts == {level: column.count(level) for level in ("a", "b", "c", None)}


def test_polars_reads_one_table(out):
    expected = pads.dataset(write(out)).to_table()
    for source in (
        polars.scan_parquet(out / "*.parquet"),
        polars.scan_parquet(out, hidden_file_prefix=["_", "."]),
    ):
        table = source.collect()
        assert table.rows() == [tuple(row.values()) for row in expected.to_pylist()]
        assert table["c"].dtype == polars.Categorical
        assert source.filter(polars.col("c") == "b").collect().height == expected["c"].to_pylist().count("b")


def test_the_types_are_those_that_parquet_itself_defines(out):
    """What a reader without Arrow's own schema (Spark) goes by: physical and logical types, alike in all parts."""
    write(out)
    schemas = [pq.ParquetFile(out / f"part-{part:05d}.parquet").schema for part in range(5)]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    found = [
        (c.name, c.physical_type, str(c.logical_type.type), c.max_definition_level)
        for c in map(schemas[0].column, range(6))
    ]
    assert found == [
        ("n", "INT64", "NONE", 0),
        ("c", "BYTE_ARRAY", "STRING", 1),
        ("x", "DOUBLE", "NONE", 1),
        ("day", "INT32", "DATE", 0),
        ("at", "INT64", "TIMESTAMP", 0),
        ("yes", "BOOLEAN", "NONE", 0),
    ]
    at = json.loads(schemas[0].column(4).logical_type.to_json())
    assert (at["isAdjustedToUTC"], at["timeUnit"]) == (False, "milliseconds")


def test_a_folder_is_read_as_records(out, tmp_path):
    write(out)
    schema = SCHEMA.cohort()
    records = read_records(out, schema)
    assert records.columns["n"].tolist() == list(range(430))
    (out / "part-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00003.parquet: is missing; the manifest"):
        read_records(out, schema)


def test_an_unfinished_folder_is_not_read(out):
    with begin(out) as writer:
        writer.write(0, batches(0))
    with pytest.raises(DataError, match="is an unfinished cohort"):
        read_records(staging(out), SCHEMA.cohort())


def test_hidden_files_of_any_folder_are_not_read(tmp_path):
    for name in ("a.parquet", ".a.parquet", "_b.parquet"):
        pq.write_table(pa.Table.from_batches([to_arrow(SCHEMA, columns(0, 5))]), tmp_path / name)
    (tmp_path / MANIFEST_FILE).write_text('{"format": "of something else"}')
    assert read_records(tmp_path, SCHEMA.cohort()).columns["n"].tolist() == list(range(5))


# what a check finds


def test_a_check_finds_what_was_changed(out):
    write(out)
    part = out / "part-00002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(DataError, match=r"part-00002.parquet: is not what the manifest names"):
        check_dataset(out)
    part.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"part-00002.parquet: has \d+ bytes"):
        check_dataset(out)
    part.write_bytes(whole)
    check_dataset(out)
    (out / "part-00005.parquet").write_bytes(whole)
    with pytest.raises(DataError, match=r"part-00005.parquet: is not named"):
        check_dataset(out)
    with pytest.raises(DataError, match="without a manifest"):
        check_dataset(out.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can not be read"),
        ('{"format": "synthward cohort", "format_version": 99}', "another version"),
        ('{"format": "synthward cohort", "format_version": 1, "rows": 3}', "is damaged"),
        (
            '{"format": "synthward cohort", "format_version": 1, "rows": 3, "parts": '
            '[{"file": "../x.parquet", "rows": 3, "bytes": 3, "sha256": ""}]}',
            "is damaged",
        ),
    ],
)
def test_a_broken_manifest_is_one_line(out, text, message):
    write(out)
    (out / MANIFEST_FILE).write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(out, SCHEMA.cohort())
    before = contents(out)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises((DataError, OutputError)):
            begin(out, **options)
    assert contents(out) == before
