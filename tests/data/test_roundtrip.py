"""Records -> Arrow -> Parquet or CSV -> records: nothing changes, whatever the columns hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.data import CohortWriter, arrow_schema, read_records, to_arrow
from synthward.engine.errors import DataError
from synthward.schema.load import schema_from_dict

ROWS = 12
_WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8)
_WORDS = st.lists(
    _WORD.filter(lambda text: text == text.strip() and text != "?"), min_size=2, max_size=6, unique=True
)


@st.composite
def numeric_columns(draw):
    kind = draw(st.sampled_from(["integer", "continuous", "rounded", "day", "second", "formatted"]))
    whole = sorted(draw(st.lists(st.integers(-60_000, 60_000), min_size=2, max_size=2, unique=True)))
    cells = draw(st.lists(st.floats(0, 1), min_size=ROWS, max_size=ROWS))
    values = whole[0] + np.array(cells) * (whole[1] - whole[0])
    if kind == "integer":
        return {"kind": "integer", "min": whole[0], "max": whole[1]}, np.round(values)
    if kind == "continuous":
        return {"kind": "continuous", "min": float(whole[0]), "max": float(whole[1])}, values
    if kind == "rounded":
        column = {"kind": "continuous", "min": float(whole[0]), "max": float(whole[1]), "decimals": 2}
        return column, np.round(values, 2)
    resolution = "day" if kind == "day" else "second"
    dates = [str(np.datetime64("1970-01-01") + day) for day in whole]
    column = {"kind": "datetime", "min": dates[0], "max": dates[1], "resolution": resolution}
    if kind == "formatted":
        column["format"] = "%d/%m/%Y %H:%M:%S"
    return column, np.round(values * (1 if kind == "day" else 86400))


@st.composite
def discrete_columns(draw):
    kind = draw(st.sampled_from(["categorical", "ordinal", "boolean", "words", "code", "icd9", "chapter"]))
    if kind == "boolean":
        column, levels = {"kind": "boolean"}, 2
    elif kind == "icd9":
        column, levels = {"kind": "code", "system": "icd9", "level": "category"}, 1290
    elif kind == "chapter":
        column, levels = {"kind": "code", "system": "icd9", "level": "chapter"}, 19
    else:
        words = draw(_WORDS)
        words = words[:2] if kind == "words" else words
        column, levels = {"kind": "boolean" if kind == "words" else kind, "categories": words}, len(words)
    cells = draw(st.lists(st.integers(0, levels - 1), min_size=ROWS, max_size=ROWS))
    return column, np.array(cells, dtype=np.int32)


@st.composite
def tables(draw):
    """A schema and columns that satisfy it, missing values among them."""
    columns, values = {}, {}
    for number, (column, cells) in enumerate(
        draw(st.lists(st.one_of(numeric_columns(), discrete_columns()), min_size=2, max_size=6))
    ):
        name = f"{draw(_WORD)} {number}".strip()
        column["missing"] = draw(st.booleans())
        if column["missing"]:
            absent = np.array(draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)))
            cells[absent] = -1 if cells.dtype == np.int32 else np.nan
        columns[name], values[name] = column, cells
    schema = schema_from_dict({"version": 1, "columns": columns, "missing_values": ["", "?"]})
    return schema, values


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from([".parquet", ".csv"]), st.integers(1, ROWS))
def test_round_trip(table, suffix, batch):
    schema, values = table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cohort{suffix}"
        with CohortWriter(path, schema, run_id="r", rows_per_part=5) as writer:
            for start in range(0, ROWS, batch):
                writer.write(to_arrow(schema, {n: v[start : start + batch] for n, v in values.items()}))
        records = read_records(path, schema.cohort())
        assert list(Path(folder).iterdir()) == [path]
    for name, cells in values.items():
        np.testing.assert_array_equal(records.columns[name], cells, err_msg=name)
    assert sum(records.report.clipped.values()) == 0
    assert sum(records.report.other.values()) == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.sampled_from([".parquet", ".csv"]))
def test_clipping_is_counted(cells, suffix):
    schema = schema_from_dict(
        {"version": 1, "columns": {"x": {"kind": "continuous", "min": -10.0, "max": 500.0}}}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        if suffix == ".csv":
            path.write_text("x\n" + "".join(f"{cell!r}\n" for cell in cells))
        else:
            pq.write_table(pa.table({"x": cells}), path)
        records = read_records(path, schema)
    np.testing.assert_array_equal(records.columns["x"], np.clip(cells, -10, 500))
    assert records.report.clipped["x"] == sum(not -10 <= cell <= 500 for cell in cells)


SCHEMA = schema_from_dict(
    {
        "version": 1,
        "columns": {
            "n": {"kind": "integer", "min": 0, "max": 9, "missing": True},
            "c": {"kind": "categorical", "categories": ["a", "b"]},
            "day": {"kind": "datetime", "min": "2020-01-01", "max": "2020-12-31"},
            "id": {"kind": "id"},
            "note": {"kind": "text", "exclude": True},
        },
    }
)


def columns(n=(1.4, np.nan), c=(0, 1), day=(18300.0, 18301.0)):
    return {"n": np.array(n), "c": np.array(c), "day": np.array(day)}


def test_arrow_types_and_order():
    batch = to_arrow(SCHEMA, columns())
    assert batch.schema == arrow_schema(SCHEMA)
    assert batch.schema.names == ["n", "c", "day"]
    assert batch.schema.field("n").type == pa.int64()
    assert not batch.schema.field("c").nullable
    assert batch.column("n").to_pylist() == [1, None]
    assert batch.column("c").to_pylist() == ["a", "b"]
    assert batch.column("day").type == pa.date32()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": (0, 2)}, "level index is outside"),
        ({"c": (0, -1)}, "column 'c', row 2 of the batch: is missing"),
        ({"n": (np.inf, 1)}, "infinite"),
        ({"day": (np.nan, 1.0)}, "column 'day', row 1"),
        ({"n": (1.0,)}, "unequal lengths"),
    ],
)
def test_what_is_not_a_cohort_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        to_arrow(SCHEMA, columns(**changes))


def test_a_column_absent_is_refused():
    values = columns()
    del values["c"]
    with pytest.raises(DataError, match="column 'c' is not in the batch"):
        to_arrow(SCHEMA, values)
