"""After enforcement every row is within bounds, rounded as declared, and meets every constraint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from synthward.data import check_constraints, enforce_constraints, to_arrow
from synthward.engine.errors import DataError, SchemaError
from synthward.schema.load import schema_from_dict

LEVELS = ["0", "1", "2"]
COLUMNS = {
    "a": {"kind": "categorical", "categories": LEVELS, "missing": True},
    "b": {"kind": "categorical", "categories": LEVELS},
    "s": {"kind": "ordinal", "categories": LEVELS, "missing": True},
    "t": {"kind": "ordinal", "categories": LEVELS},
    "i": {"kind": "integer", "min": 0, "max": 10, "missing": True},
    "j": {"kind": "integer", "min": -5, "max": 7},
    "x": {"kind": "continuous", "min": 0.0, "max": 10.0},
    "y": {"kind": "continuous", "min": 0.5, "max": 12.5, "decimals": 1, "missing": True},
    "z": {"kind": "continuous", "min": 0.0, "max": 10.0, "decimals": 2},
}
NUMBERS, ORDINALS, CATEGORIES = "ijxyz", "st", "abst"
ROWS = 64


@st.composite
def constraint(draw):
    if draw(st.booleans()):
        left, right = draw(
            st.permutations(draw(st.sampled_from([NUMBERS, ORDINALS]))).map(lambda names: names[:2])
        )
        return {"kind": "le", "left": left, "right": right, "strict": draw(st.booleans())}
    return {"kind": "implies", "if": draw(condition()), "then": draw(condition())}


@st.composite
def condition(draw):
    name = draw(st.sampled_from(list(COLUMNS)))
    if COLUMNS[name].get("missing") and draw(st.booleans()):
        return {"column": name, "missing": True}
    return {
        "column": name,
        "equals": draw(st.sampled_from(LEVELS)) if name in CATEGORIES else draw(st.integers(1, 7)),
    }


def random_columns(schema, seed):
    """Values far beyond the bounds, missing where they may be."""
    rng = np.random.default_rng(seed)
    columns = {}
    for column in schema.modelled:
        if column.is_discrete:
            columns[column.name] = rng.integers(-1 if column.missing else 0, 3, ROWS)
        else:
            columns[column.name] = rng.normal(5, 5, ROWS).astype(np.float32)
            if column.missing:
                columns[column.name][rng.random(ROWS) < 0.2] = np.nan
    return columns


@settings(deadline=None, max_examples=300)
@given(st.lists(constraint(), max_size=4), st.integers(0, 2**32))
def test_every_row_satisfies_every_constraint(constraints, seed):
    try:
        schema = schema_from_dict({"version": 1, "columns": COLUMNS, "constraints": constraints})
    except SchemaError:
        assume(False)
    columns = enforce_constraints(schema, random_columns(schema, seed))
    assert set(check_constraints(schema, columns).values()) <= {0}
    for column in schema.modelled:
        values = columns[column.name]
        if column.is_discrete:
            assert values.dtype == np.int32
            continue
        values = values[~np.isnan(values)]
        assert np.all((values >= column.min) & (values <= column.max))
        if column.is_integral:
            assert np.all(values == np.floor(values))
        if column.decimals is not None:
            assert np.all(np.round(values, column.decimals) == values)
    to_arrow(schema, columns)


def enforce(constraints, **columns):
    schema = schema_from_dict(
        {"version": 1, "columns": {name: COLUMNS[name] for name in columns}, "constraints": constraints}
    )
    arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    return {name: values.tolist() for name, values in enforce_constraints(schema, arrays).items()}


def test_rows_that_hold_are_left_alone():
    rule = [{"kind": "le", "left": "i", "right": "j"}]
    assert enforce(rule, i=[1, 3, 7], j=[1, 4, 7]) == {"i": [1, 3, 7], "j": [1, 4, 7]}


def test_left_gives_way():
    assert enforce([{"kind": "le", "left": "i", "right": "j"}], i=[9, 9], j=[4, -3]) == {
        "i": [4, 0],
        "j": [4, 0],
    }


def test_strict_is_the_next_value_below():
    rule = [{"kind": "le", "left": "z", "right": "y", "strict": True}]
    assert enforce(rule, z=[9.0], y=[0.8]) == {"z": [0.7], "y": [0.8]}


def test_a_value_fixed_by_another_constraint_stays():
    rules = [
        {"kind": "le", "left": "i", "right": "j"},
        {"kind": "implies", "if": {"column": "b", "equals": "1"}, "then": {"column": "i", "equals": 6}},
    ]
    assert enforce(rules, i=[2, 2], j=[3, 3], b=[1, 0]) == {"i": [6, 2], "j": [6, 3], "b": [1, 0]}


def test_chains_of_implications():
    rules = [
        {"kind": "implies", "if": {"column": "b", "equals": "1"}, "then": {"column": "i", "missing": True}},
        {"kind": "implies", "if": {"column": "a", "missing": True}, "then": {"column": "b", "equals": "1"}},
    ]
    out = enforce(rules, a=[-1, 0], b=[0, 0], i=[5, 5])
    assert out["b"] == [1, 0]
    assert np.isnan(out["i"][0]) and out["i"][1] == 5


def test_a_circle_of_equals_settles():
    names = ["i", "x", "j"]
    rules = [
        {"kind": "le", "left": left, "right": right}
        for left, right in zip(names, [*names[1:], names[0]], strict=True)
    ]
    out = enforce(rules, i=[9, 0, 3], x=[0.5, 9.5, 3.5], j=[4, 7, 3])
    assert out["i"] == out["x"] == out["j"]


def test_missing_satisfies_a_comparison():
    schema = schema_from_dict(
        {
            "version": 1,
            "columns": {name: COLUMNS[name] for name in "st"},
            "constraints": [{"kind": "le", "left": "t", "right": "s"}],
        }
    )
    columns = {"s": np.array([-1, 0, 2], dtype=np.int32), "t": np.array([2, 2, 2], dtype=np.int32)}
    assert check_constraints(schema, columns) == {"t <= s": 1}


def test_constraints_that_cannot_be_met_end_in_an_error():
    """The schema's own check refuses these two; past it, the repair stops instead of turning for ever."""
    rules = [
        {"kind": "implies", "if": {"column": "a", "equals": "1"}, "then": {"column": "b", "equals": value}}
        for value in ("0", "1")
    ]
    columns = {name: COLUMNS[name] for name in "ab"}
    halves = [schema_from_dict({"version": 1, "columns": columns, "constraints": [rule]}) for rule in rules]
    both = halves[0].model_copy(update={"constraints": halves[0].constraints + halves[1].constraints})
    with pytest.raises(DataError, match="cannot be met together"):
        enforce_constraints(both, {"a": np.array([1, 0]), "b": np.array([0, 0])})
