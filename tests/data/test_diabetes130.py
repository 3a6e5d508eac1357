"""The real records of the diabetes set against the schema declared for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from synthward.data import CohortWriter, draft_schema, enforce_constraints, read_records, to_arrow
from synthward.schema import load_schema
from synthward.schema.load import parse_schema

pytestmark = pytest.mark.realdata

SCHEMA = Path(__file__).parents[2] / "benchmarks" / "schemas" / "diabetes130.toml"


@pytest.fixture(scope="module")
def data(shared_data):
    return shared_data / "diabetes130" / "diabetic_data.csv.gz"


@pytest.fixture(scope="module")
def records(data):
    return read_records(data, load_schema(SCHEMA))


def test_counts(records):
    assert records.num_rows == 101_766
    assert records.num_units == 71_518
    assert np.diff(records.unit_offsets).max() == 40
    assert len(records.columns) == 48
    assert sum(records.report.clipped.values()) == 0
    assert sum(records.report.other.values()) == 0
    assert {name: count for name, count in records.report.missing.items() if count} == {
        "race": 2273,
        "weight": 98569,
        "payer_code": 40256,
        "medical_specialty": 49949,
        "diag_1": 21,
        "diag_2": 358,
        "diag_3": 1423,
    }


def test_label_and_units(records):
    label = records.schema.columns["readmitted"]
    positive = label.level_index[records.schema.label_positive]
    assert np.count_nonzero(records.columns["readmitted"] == positive) == 11_357
    assert len(set(records.unit_keys.tolist())) == 71_518


def test_codes_fall_into_their_chapters(records):
    """Diseases of the circulatory system are the most frequent first diagnosis."""
    column = records.schema.columns["diag_1"]
    codes = records.columns["diag_1"]
    chapters = column.level_groups[codes[codes >= 0]]
    share = np.bincount(chapters, minlength=19) / len(codes)
    assert share.argmax() == 6
    assert 0.28 < share[6] < 0.31


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_written_and_read_again(tmp_path, records, suffix):
    columns = enforce_constraints(records.schema, dict(records.columns))
    with CohortWriter(tmp_path / f"copy{suffix}", records.schema, run_id="copy") as writer:
        for start in range(0, records.num_rows, 20_000):
            part = {name: values[start : start + 20_000] for name, values in columns.items()}
            writer.write(to_arrow(records.schema, part))
    again = read_records(tmp_path / f"copy{suffix}", records.schema.cohort())
    for name, values in records.columns.items():
        np.testing.assert_array_equal(again.columns[name], values, err_msg=name)


def test_a_draft_reads_the_same_table(data):
    text, _ = draft_schema(data)
    schema = parse_schema(text)
    assert schema.columns["diag_1"].system == "icd9"
    assert schema.columns["number_diagnoses"].kind == "integer"
    assert [name for name, column in schema.columns.items() if column.kind == "id"] == [
        "encounter_id",
        "patient_nbr",
    ]
    assert sum(read_records(data, schema).report.clipped.values()) == 0
