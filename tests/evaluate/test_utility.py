"""TSTR and TRTR tell a useful table from a useless one, or give the reason why they cannot."""

from __future__ import annotations

import numpy as np
import pytest

from synthward.evaluate import measure_utility
from synthward.evaluate.features import MAX_LEVELS, FeatureEncoder
from synthward.evaluate.utility import choose_subgroup_columns, find_target
from tests.invented import as_records, make_records, make_schema

SCHEMA = make_schema()


def test_a_faithful_table_is_near_real_and_one_without_the_link_is_near_chance():
    train, holdout = make_records(SCHEMA, 3000, 1), make_records(SCHEMA, 2000, 2)
    good = measure_utility(SCHEMA, train, holdout, make_records(SCHEMA, 3000, 3), bootstrap_draws=50)
    useless = make_records(SCHEMA, 3000, 4, link=0.0)
    bad = measure_utility(SCHEMA, train, holdout, useless, bootstrap_draws=50)
    for near, far in zip(good.models, bad.models, strict=True):
        assert near.trtr.value > 0.75
        assert abs(near.gap.value) < 0.05
        assert abs(far.tstr.value - 0.5) < 0.15
        assert far.gap.low > 0.1
        assert near.tstr.low < near.tstr.value < near.tstr.high
    assert good.training_rows == 3000
    assert good.test_units == 1000


def test_the_smaller_table_sets_the_training_rows():
    train, holdout = make_records(SCHEMA, 800, 1), make_records(SCHEMA, 400, 2)
    found = measure_utility(SCHEMA, train, holdout, make_records(SCHEMA, 300, 3), bootstrap_draws=5)
    assert found.training_rows == 300


def test_subgroups_have_shares_that_sum_to_one_and_small_ones_no_auroc():
    train, holdout = make_records(SCHEMA, 800, 1), make_records(SCHEMA, 400, 2)
    holdout.columns["sex"][:] = 0
    holdout.columns["sex"][:3] = 1
    found = measure_utility(SCHEMA, train, holdout, make_records(SCHEMA, 800, 3), bootstrap_draws=5)
    assert [c.name for c in choose_subgroup_columns(SCHEMA, "died")] == ["sex", "stage"]
    for name in ("sex", "stage"):
        assert sum(g.share_train for g in found.subgroups if g.column == name) == pytest.approx(1.0)
    groups = {g.level: g for g in found.subgroups if g.column == "sex"}
    assert groups["male"].test_rows == 3
    assert np.isnan(groups["male"].trtr)
    assert 0.5 < groups["female"].trtr <= 1.0


@pytest.mark.parametrize(("top", "reason"), [({}, "declares no label"), ({"label": "stage"}, "4 levels")])
def test_a_label_that_cannot_be_used_is_a_reason(top, reason):
    stage = {"kind": "ordinal", "categories": ["I", "II", "III", "IV"]}
    assert reason in find_target(make_schema({"stage": stage, "smoker": {"kind": "boolean"}}, **top))


def test_an_absent_class_is_a_reason():
    train, holdout = make_records(SCHEMA, 200, 1), make_records(SCHEMA, 200, 2)
    made = make_records(SCHEMA, 200, 3)
    made.columns["died"][:] = 0
    reason = measure_utility(SCHEMA, train, holdout, made)
    assert isinstance(reason, str)
    assert "synthetic" in reason and "'true'" in reason


@pytest.mark.parametrize("grouped", [True, False])
def test_codes_of_many_levels_are_reduced_for_the_trees(grouped):
    if grouped:
        column = {"kind": "code", "system": "icd9", "level": "category", "missing": True}
    else:
        column = {"kind": "categorical", "categories": [str(k) for k in range(1000)], "missing": True}
    schema = make_schema({"code": column, "died": {"kind": "boolean"}})
    levels = len(schema.columns["code"].levels)
    assert levels > MAX_LEVELS
    rows = np.arange(levels + 1)
    records = as_records(schema, {"code": rows - 1, "died": rows % 2})
    encoder = FeatureEncoder(schema, records, rows, exclude="died")
    matrix = encoder.ordinal(records, rows)
    assert matrix.shape == (levels + 1, 1)
    assert np.isnan(matrix[0, 0]) and not np.isnan(matrix[1:]).any()
    assert matrix[1:].max() < MAX_LEVELS
    dense = encoder.one_hot(records, rows).toarray()
    assert (dense.sum(axis=1) == 1).all()
    assert dense.argmax(axis=1)[1:].tolist() == matrix[1:, 0].tolist()
