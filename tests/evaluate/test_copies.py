"""The copy check finds exact repeats and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthward.evaluate import check_copies
from synthward.evaluate.copies import share_repeated
from tests.invented import as_records, make_records, make_schema

WORDS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=15)


@given(WORDS, WORDS)
def test_share_equals_a_set_lookup(rows, pool):
    found = share_repeated(np.array(rows, dtype=np.uint64), np.array(pool, dtype=np.uint64))
    assert found == pytest.approx(sum(r in set(pool) for r in rows) / len(rows))


def test_missing_equals_missing_and_zero_has_no_sign():
    schema = make_schema({"w": {"kind": "continuous", "min": -1.0, "max": 1.0, "missing": True}})
    train = as_records(schema, {"w": [np.nan, 0.0]})
    made = as_records(schema, {"w": [-0.0, np.float64(-np.nan), 0.5, 0.25]})
    assert check_copies(train, None, made).synthetic_in_train == 0.5


def test_a_generator_that_returns_its_records_is_found():
    schema = make_schema()
    train, holdout = make_records(schema, 1000, 1), make_records(schema, 300, 2)
    copied = check_copies(train, holdout, train)
    assert copied.synthetic_in_train == 1.0
    assert copied.synthetic_in_train_sample == pytest.approx(0.3)
    assert copied.synthetic_in_holdout == 0.0
    fresh = check_copies(train, holdout, make_records(schema, 500, 3))
    assert fresh.synthetic_in_train == fresh.holdout_in_train == 0.0
