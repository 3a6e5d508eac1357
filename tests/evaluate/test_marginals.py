"""Total variation against a count by hand, and its values at the ends."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.engine.errors import DataError
from synthward.evaluate import bin_records, marginals, one_way_tv, two_way_tv
from synthward.evaluate.binning import code_labels
from tests.invented import as_records, make_records, make_schema

SMALL = make_schema(
    {
        "a": {"kind": "categorical", "categories": ["x", "y", "z"], "missing": True},
        "b": {"kind": "boolean"},
        "i": {"kind": "integer", "min": -2, "max": 40, "missing": True},
        "w": {"kind": "continuous", "min": 0.0, "max": 10.0, "missing": True},
    }
)


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 12))

    def column(values):
        return draw(st.lists(values, min_size=rows, max_size=rows))

    return as_records(
        SMALL,
        {
            "a": column(st.integers(-1, 2)),
            "b": column(st.integers(0, 1)),
            "i": column(st.one_of(st.just(math.nan), st.integers(-2, 40).map(float))),
            "w": column(st.one_of(st.just(math.nan), st.floats(0.0, 10.0))),
        },
    )


def value_key(name: str, value: float) -> object:
    """The cell of a value by plain arithmetic: level, number of the bin, or missing."""
    if name in "ab":
        return int(value)
    if math.isnan(value):
        return "missing"
    low, high = (-2.0, 40.0) if name == "i" else (0.0, 10.0)
    return min(19, math.floor((value - low) / (high - low) * 20))


def counted_tv(left, right, names) -> float:
    counts = []
    for records in (left, right):
        rows = zip(*(records.columns[name] for name in names), strict=True)
        counts.append(
            Counter(tuple(value_key(n, v) for n, v in zip(names, row, strict=True)) for row in rows)
        )
    sizes = [sum(c.values()) for c in counts]
    cells = set(counts[0]) | set(counts[1])
    return 0.5 * sum(abs(counts[0][c] / sizes[0] - counts[1][c] / sizes[1]) for c in cells)


@settings(max_examples=60, deadline=None)
@given(tables(), tables(), st.booleans())
def test_every_marginal_equals_a_count_by_hand(left, right, sparse):
    with pytest.MonkeyPatch.context() as patch:
        if sparse:
            patch.setattr(marginals, "DENSE_CELLS", 0)
        one, two = one_way_tv(left, right), two_way_tv(left, right)
    for name, value in one.items():
        assert value == pytest.approx(counted_tv(left, right, [name]), abs=1e-12)
    for (i, j), value in zip(two.pairs, two.values, strict=True):
        expected = counted_tv(left, right, [two.names[i], two.names[j]])
        assert value == pytest.approx(expected, abs=1e-12)
        assert two.matrix[i, j] == two.matrix[j, i] == value
    assert len(two.values) == 6


def test_equal_tables_are_at_zero_and_disjoint_tables_at_one():
    schema = make_schema({k: {"kind": "ordinal", "categories": list("abcd")} for k in ("p", "q", "r")})
    low = as_records(schema, {k: [0, 1, 1, 0] for k in "pqr"})
    high = as_records(schema, {k: [2, 3, 3] for k in "pqr"})
    assert set(one_way_tv(low, low).values()) == {0.0}
    assert two_way_tv(low, low).maximum == 0.0
    assert set(one_way_tv(low, high).values()) == {1.0}
    assert two_way_tv(low, high).values == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)


def test_pairs_see_what_columns_alone_do_not():
    schema = make_schema({k: {"kind": "boolean"} for k in "pq"})
    same = as_records(schema, {"p": [0, 0, 1, 1], "q": [0, 0, 1, 1]})
    crossed = as_records(schema, {"p": [0, 0, 1, 1], "q": [1, 1, 0, 0]})
    assert set(one_way_tv(same, crossed).values()) == {0.0}
    assert two_way_tv(same, crossed).mean == 1.0


def test_ten_thousand_categories():
    levels = [str(k) for k in range(10_000)]
    schema = make_schema({k: {"kind": "categorical", "categories": levels} for k in "pq"})
    rng = np.random.default_rng(0)
    left = as_records(schema, {k: rng.integers(0, 10_000, 5000) for k in "pq"})
    moved = {k: v.copy() for k, v in left.columns.items()}
    moved["p"][:1000] = (moved["p"][:1000] + 5000) % 10_000
    two = two_way_tv(left, as_records(schema, moved))
    pairs = [Counter(zip(t["p"], t["q"], strict=True)) for t in (left.columns, moved)]
    expected = 0.5 * sum(abs(pairs[0][c] - pairs[1][c]) for c in pairs[0] | pairs[1]) / 5000
    assert two.mean == pytest.approx(expected, abs=1e-12)


def test_bounds_and_values_beyond_them_fall_into_the_end_bins():
    schema = make_schema({"w": {"kind": "continuous", "min": 0.0, "max": 1.0, "missing": True}})
    codes = bin_records(as_records(schema, {"w": [-9.0, 0.0, 0.05, 0.999, 1.0, 7.0, np.nan]})).codes[0]
    assert codes.tolist() == [0, 0, 1, 19, 19, 19, 20]


def test_few_whole_numbers_have_a_bin_and_a_label_each():
    schema = make_schema({"n": {"kind": "integer", "min": 1, "max": 3}})
    binned = bin_records(as_records(schema, {"n": [1, 2, 3, 3]}))
    assert binned.codes[0].tolist() == [0, 1, 2, 2]
    assert code_labels(schema.modelled[0]) == ["1", "2", "3", "missing"]
    assert binned.cardinalities == (4,)


def test_worst_pairs_come_first_and_many_pairs_are_sampled():
    schema = make_schema()
    left, right = make_records(schema, 400, 1), make_records(schema, 300, 2)
    two = two_way_tv(left, right)
    worst = two.worst(3)
    assert [w[2] for w in worst] == sorted(two.values, reverse=True)[:3]
    assert "code" in worst[0][:2]
    drawn = marginals.choose_pairs(200, seed=3)
    assert len(drawn) == len({tuple(p) for p in drawn.tolist()}) == marginals.MAX_PAIRS
    assert (drawn[:, 0] < drawn[:, 1]).all()


def test_an_empty_table_and_an_undeclared_level_are_errors():
    schema = make_schema({"p": {"kind": "boolean"}})
    with pytest.raises(DataError, match="no rows"):
        one_way_tv(as_records(schema, {"p": [0]}), as_records(schema, {"p": []}))
    with pytest.raises(DataError, match="'p'"):
        bin_records(as_records(schema, {"p": [0, 2]}))
