"""Reading schema files: what they declare, and one clear line for each fault."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from synthward.engine.errors import SchemaError
from synthward.schema import load_schema
from synthward.schema.load import parse_schema

GOOD = """
version = 1
name = "clinic"
unit = "patient"
label = "outcome"
label_positive = "died"
missing_values = ["", "?"]

[columns.patient]
kind = "id"

[columns.note]
kind = "text"
exclude = true

[columns.age]
kind = "integer"
min = 0
max = 120

[columns.weight]
kind = "continuous"
min = 0.5
max = 300
decimals = 1
missing = true

[columns."blood group"]
kind = "categorical"
categories = ["A", "B", "0"]
other = "unknown"

[columns.stage]
kind = "ordinal"
categories = [1, 2, 3]

[columns.smoker]
kind = "boolean"

[columns.born]
kind = "datetime"
min = 1900-01-01
max = "2024-12-31"

[columns.seen]
kind = "datetime"
min = 2020-01-01T00:00:00
max = 2020-12-31T23:59:59
format = "%d.%m.%Y %H:%M:%S"

[columns.diagnosis]
kind = "code"
system = "icd9"
level = "category"
other = "none"

[columns.chapter]
kind = "code"
system = "icd9"
level = "chapter"
missing = true

[columns.outcome]
kind = "categorical"
categories = ["alive", "died"]

[[constraints]]
kind = "le"
left = "age"
right = "weight"

[[constraints]]
kind = "implies"
if = { column = "outcome", equals = "died" }
then = { column = "chapter", missing = true }
"""


@pytest.fixture
def good():
    return parse_schema(GOOD, source="clinic.toml")


def test_columns_in_file_order(good):
    assert list(good.columns)[:4] == ["patient", "note", "age", "weight"]
    assert [column.name for column in good.modelled] == [
        "age",
        "weight",
        "blood group",
        "stage",
        "smoker",
        "born",
        "seen",
        "diagnosis",
        "chapter",
        "outcome",
    ]


def test_levels(good):
    assert good.columns["blood group"].levels == ("A", "B", "0", "unknown")
    assert good.columns["stage"].levels == ("1", "2", "3")
    assert good.columns["smoker"].levels == ("false", "true")
    assert good.columns["age"].levels == ()
    assert len(good.columns["diagnosis"].levels) == 1291
    assert len(good.columns["chapter"].levels) == 19


def test_level_groups_are_public_chapters(good):
    column = good.columns["diagnosis"]
    groups = column.level_groups
    assert groups.shape == (1291,)
    assert groups[column.level_index["250"]] == 2
    assert groups[column.level_index["none"]] == 19
    assert len(np.unique(groups)) == 20
    assert good.columns["stage"].level_groups is None


def test_bounds_of_datetimes(good):
    born, seen = good.columns["born"], good.columns["seen"]
    assert born.resolution == "day"
    assert born.min == (dt.date(1900, 1, 1) - dt.date(1970, 1, 1)).days
    assert seen.resolution == "second"
    assert seen.max == dt.datetime(2020, 12, 31, 23, 59, 59, tzinfo=dt.UTC).timestamp()
    assert born.is_integral and seen.is_integral


def test_toml_round_trip(good):
    again = parse_schema(good.to_toml())
    assert again == good
    assert again.fingerprint() == good.fingerprint()


def test_fingerprint_sees_every_change(good):
    changes = [("max = 120", "max = 121"), ('"A", "B"', '"B", "A"'), ("missing = true", "missing = false")]
    prints = {parse_schema(GOOD.replace(old, new, 1)).fingerprint() for old, new in changes}
    assert len(prints | {good.fingerprint()}) == 4


def test_fingerprint_ignores_layout(good):
    assert parse_schema("# a comment\n" + GOOD.replace(" = ", "=")).fingerprint() == good.fingerprint()


def test_a_schema_is_frozen(good):
    with pytest.raises(ValueError, match="frozen"):
        good.columns["age"].max = 200.0


def test_with_unit(good):
    assert good.with_unit(None).unit is None
    assert good.with_unit(None).with_unit("patient") == good
    with pytest.raises(SchemaError, match="must have kind"):
        good.with_unit("age")


def test_cohort_has_the_modelled_columns_alone(good):
    cohort = good.cohort()
    assert list(cohort.columns) == [column.name for column in good.modelled]
    assert cohort.unit is None
    assert cohort.constraints == good.constraints


FAULTS = [
    ("version = 1", "", "version is missing"),
    ("version = 1", "version = 2", "version"),
    ('name = "clinic"', 'nmae = "clinic"', "did you mean 'name'"),
    ('unit = "patient"', 'unit = "patiant"', "did you mean 'patient'"),
    ('unit = "patient"', 'unit = "age"', 'must have kind = "id"'),
    ('label = "outcome"', 'label = "outcomes"', "did you mean 'outcome'"),
    ('label = "outcome"', 'label = "age"', "label 'age' must be"),
    ('label_positive = "died"', 'label_positive = "dead"', "'dead' is not a category"),
    ('missing_values = ["", "?"]', 'missing_values = ["", "A"]', "'A' is a category and in missing_values"),
    ('missing_values = ["", "?"]', 'missing_values = "?"', "missing_values"),
    ("max = 120", "max = 0", "min 0 is not below max 0"),
    ("max = 120", "max = -1", "min 0 is not below max -1"),
    ("max = 120", "max = 120.5", "not a whole number"),
    ("max = 120", "max = inf", "finite"),
    ("max = 120", 'max = "many"', "column 'age': max"),
    ("max = 120", "maximum = 120", "did you mean 'max'"),
    ("max = 120", "", "needs public bounds"),
    ("max = 120", 'max = 120\ncategories = ["1"]', "'categories' does not apply to kind 'integer'"),
    ("decimals = 1", "decimals = 0", "more than 0 decimals"),
    ("decimals = 1", "decimals = 40", "outside 0..12"),
    ('kind = "ordinal"', 'kind = "ordnal"', "did you mean 'ordinal'"),
    ('kind = "ordinal"', "", "kind is missing"),
    ("categories = [1, 2, 3]", "categories = [1, 2, 1]", "'1' is listed twice"),
    ("categories = [1, 2, 3]", "categories = []", "categories is empty"),
    ("categories = [1, 2, 3]", "categories = [1.5]", "column 'stage': categories"),
    ("categories = [1, 2, 3]", 'categories = [" x"]', "begins or ends with a blank"),
    ("categories = [1, 2, 3]", 'categories = [""]', "empty cell"),
    ("categories = [1, 2, 3]", "", "needs its categories"),
    ('kind = "boolean"', 'kind = "boolean"\ncategories = ["a"]', "two categories"),
    ("min = 1900-01-01", 'min = "long ago"', "not a date"),
    ("min = 1900-01-01", "min = 5", "not a date"),
    ('level = "chapter"', "", "needs level"),
    ('level = "chapter"', 'level = "chapter"\ncategories = ["1"]', "either system or categories"),
    ("exclude = true", "", "not modelled"),
    ('kind = "le"', 'kind = "lt"', 'write kind = "le"'),
    ('left = "age"', 'left = "agee"', "did you mean 'age'"),
    ('left = "age"', 'left = "patient"', "is an id or excluded"),
    ('left = "age"', 'left = "weight"', "compares a column with itself"),
    ('left = "age"', 'left = "born"', "cannot compare"),
    ('left = "age"', 'left = "age"\nstrictly = true', "did you mean 'strict'"),
    ('equals = "died" }', 'equals = "dead" }', "'dead' is not a category"),
    ('equals = "died" }', "missing = true }", "may not be missing"),
    ('equals = "died" }', 'equals = "died", missing = true }', "either equals"),
    ('equals = "died" }', 'equal = "died" }', "did you mean 'equals'"),
    ("[columns.stage]", "[columns.stage", "not valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS, ids=[message for _, _, message in FAULTS])
def test_a_fault_is_one_clear_line(tmp_path, old, new, message):
    assert old in GOOD
    path = tmp_path / "clinic.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SchemaError) as caught:
        load_schema(path)
    text = str(caught.value)
    assert text.startswith(str(path) + ": ")
    assert message in text
    assert "\n" not in text
    assert "pydantic" not in text


def test_files_that_are_not_there_or_no_text(tmp_path):
    with pytest.raises(SchemaError, match="no such schema file"):
        load_schema(tmp_path / "none.toml")
    with pytest.raises(SchemaError, match="cannot read"):
        load_schema(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SchemaError, match="not UTF-8"):
        load_schema(tmp_path / "bytes.toml")
    (tmp_path / "empty.toml").write_bytes(b"")
    with pytest.raises(SchemaError, match="version is missing"):
        load_schema(tmp_path / "empty.toml")


def test_ten_thousand_categories():
    listed = ", ".join(f'"c{number}"' for number in range(10_000))
    schema = parse_schema(f'version = 1\n[columns.code]\nkind = "categorical"\ncategories = [{listed}]\n')
    assert len(schema.columns["code"].levels) == 10_000
