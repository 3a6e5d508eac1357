"""Schemas that cannot be read, contradict themselves or contradict the records."""

from __future__ import annotations

import pytest

from tests.tinydata import SCHEMA


def test_a_schema_file_that_does_not_exist(desk):
    desk.schema.unlink()
    desk.fit_refused(mentions=("schema.toml",))


def test_a_schema_that_is_a_folder(desk):
    desk.schema.unlink()
    desk.schema.mkdir()
    desk.fit_refused(mentions=("schema.toml",))


@pytest.mark.parametrize("content", [b"", b"[columns.age\nkind=", b"\xff\xfe\x00", b"a = 1\na = 2\n", b"{}"])
def test_a_schema_that_is_no_toml(desk, content):
    desk.schema.write_bytes(content)
    desk.fit_refused(mentions=("schema.toml",))


CONTRADICTIONS = {
    "bounds_crossed": ("min = 0\nmax = 100", "min = 100\nmax = 0", "age"),
    "bounds_missing": ("min = 0\nmax = 100\n", "", "age"),
    "bounds_nan": ("min = 30.0", "min = nan", "weight"),
    "bounds_infinite": ("max = 180.0", "max = inf", "weight"),
    "kind_unknown": ('kind = "ordinal"', 'kind = "colour"', "stage"),
    "key_unknown": ("decimals = 1", "decimal = 1", "weight"),
    "categories_twice": ('["F", "M"]', '["F", "M", "F"]', "sex"),
    "categories_none": ('["F", "M"]', "[]", "sex"),
    "categories_numbers": ('["F", "M"]', "[1, [2]]", "sex"),
    "label_unknown": ('label = "outcome"', 'label = "fate"', "fate"),
    "label_value_unknown": ('label_positive = "died"', 'label_positive = "dead"', "dead"),
    "unit_unknown": ('unit = "patient"', 'unit = "person"', "person"),
    "date_bounds": ('min = "2020-01-01"', 'min = "long ago"', "visited"),
    "constraint_unknown_column": ('left = "first"', 'left = "begin"', "begin"),
    "constraint_of_categories": ('left = "first"', 'left = "sex"', "sex"),
    "constraint_unknown_value": ('equals = "M"', 'equals = "Q"', "Q"),
    "version_unknown": ("version = 1", "version = 99", "version"),
    "text_modelled": ('kind = "categorical"\ncategories = ["F", "M"]', 'kind = "text"', "sex"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_schema_that_contradicts_itself(desk, name):
    old, new, mention = CONTRADICTIONS[name]
    assert old in SCHEMA
    desk.schema.write_text(SCHEMA.replace(old, new, 1))
    desk.fit_refused(mentions=("schema.toml", mention))


AGAINST_DATA = {
    "text_declared_integer": (
        'kind = "categorical"\ncategories = ["F", "M"]',
        'kind = "integer"\nmin = 0\nmax = 9',
        "sex",
    ),
    "numbers_declared_date": (
        'kind = "integer"\nmin = 0\nmax = 100',
        'kind = "datetime"\nmin = "2000-01-01"\nmax = "2001-01-01"',
        "age",
    ),
    "other_categories": ('["alive", "died"]', '["yes", "died"]', "outcome"),
    "missing_not_allowed": ("decimals = 1\nmissing = true", "decimals = 1", "weight"),
    "other_date_format": ("%Y-%m-%d", "%d/%m/%Y", "visited"),
}


@pytest.mark.parametrize("name", AGAINST_DATA)
def test_a_schema_that_contradicts_the_records(desk, name):
    old, new, column = AGAINST_DATA[name]
    assert old in SCHEMA
    schema = SCHEMA.replace(old, new, 1).split("\n[[constraints]]")[0]
    desk.schema.write_text(schema)
    desk.fit_refused(mentions=("data.csv", column))


def test_a_unit_that_is_not_a_column(desk):
    desk.fit_refused("--unit", "nobody", mentions=("nobody",))
