"""The whole evaluation: its figures, what it leaves out and why, and its JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthward.engine.errors import DataError
from synthward.evaluate import RELEASABLE_ROWS, evaluate_records, two_way_tv
from tests.invented import as_records, make_records, make_schema

SCHEMA = make_schema()
PRIVACY = {"epsilon": 3.0, "delta": 1e-6, "unit": "patient", "private": True}


def evaluate(train, holdout, synthetic, schema=SCHEMA, **privacy):
    return evaluate_records(
        schema,
        train,
        holdout,
        synthetic,
        privacy=PRIVACY | privacy,
        settings={"generator": "gan"},
        epsilon_curve=[(1, 0.5), (2, 1.0)],
    )


def test_figures_agree_with_the_single_functions():
    train, holdout = make_records(SCHEMA, 900, 1), make_records(SCHEMA, 300, 2)
    made = make_records(SCHEMA, 800, 3)
    found = evaluate(train, holdout, made).comparison
    assert found.pairs.mean == pytest.approx(two_way_tv(train, made).mean)
    assert found.pairs_floor.mean == pytest.approx(two_way_tv(train, holdout).mean)
    # As many rows as the floor: more sampling noise than with all rows, about as much as the floor itself.
    assert found.pairs.mean < found.pairs_matched.mean < 1.5 * found.pairs_floor.mean
    assert found.sizes == {
        "train_rows": 900,
        "train_units": 450,
        "holdout_rows": 300,
        "holdout_units": 150,
        "synthetic_rows": 800,
    }
    assert 0 < len(found.panels) <= 4
    for panel in found.panels:
        assert panel.tv == pytest.approx(0.5 * np.abs(panel.train - panel.synthetic).sum())


def test_json_holds_the_headline_figures_and_only_legal_numbers():
    train = make_records(SCHEMA, 600, 1)
    result = evaluate(train, make_records(SCHEMA, 300, 2), make_records(SCHEMA, 600, 3), epsilon=np.inf)
    document = json.loads(result.to_json(), parse_constant=lambda text: pytest.fail(text))
    assert document["summary"]["two_way_tv_mean"] == pytest.approx(result.comparison.pairs.mean)
    assert 0.5 < document["summary"]["trtr_auroc_gradient_boosting"] < 1
    assert document["privacy"]["epsilon"] == "inf"
    assert not result.is_private


@pytest.mark.parametrize(
    "said", [{"private": "yes"}, {"private": None}, {"epsilon": None}, {"private": False}]
)
def test_only_a_clear_statement_makes_a_run_private(said):
    records = make_records(SCHEMA, 60, 1)
    assert evaluate(records, None, records).is_private
    assert not evaluate(records, None, records, **said).is_private


def test_without_held_out_records_the_reason_is_named():
    records = make_records(SCHEMA, 200, 1)
    result = evaluate(records, None, records)
    assert result.comparison.utility is result.comparison.pairs_floor is None
    assert "held-out" in result.skipped["utility"]
    assert result.comparison.one_way_floor is None


def test_a_single_synthetic_row_and_a_constant_column():
    schema = make_schema({"p": {"kind": "boolean"}, "c": {"kind": "continuous", "min": 0.0, "max": 1.0}})
    train = as_records(schema, {"p": [0, 1, 0, 1], "c": [0.5] * 4})
    result = evaluate(train, train, as_records(schema, {"p": [1], "c": [0.5]}), schema)
    assert result.comparison.one_way == {"p": 0.5, "c": 0.0}
    assert result.comparison.pairs.mean == 0.5
    assert "label" in result.skipped["utility"]


def test_one_column_has_no_pairs():
    schema = make_schema({"p": {"kind": "boolean"}})
    records = as_records(schema, {"p": [0, 1]})
    result = evaluate(records, records, records, schema)
    assert result.comparison.panels == ()
    assert np.isnan(result.comparison.pairs.mean)
    assert json.loads(result.to_json())["summary"]["two_way_tv_mean"] is None


def test_an_empty_synthetic_table_is_an_error():
    records = make_records(SCHEMA, 20, 1)
    with pytest.raises(DataError, match="synthetic"):
        evaluate(records, None, make_records(SCHEMA, 0, 1))


def test_public_figures_do_not_tell_how_many_rows_there_are():
    train = make_records(SCHEMA, 60, 1)
    assert evaluate(train, None, make_records(SCHEMA, RELEASABLE_ROWS - 1, 2)).public_marginals == ()
    shown = evaluate(train, None, make_records(SCHEMA, RELEASABLE_ROWS + 777, 2)).public_marginals
    assert len(shown) == len(SCHEMA.modelled)
    for marginal in shown:
        counts = marginal.synthetic * RELEASABLE_ROWS
        assert np.allclose(counts, np.round(counts), atol=1e-9)
        assert marginal.synthetic.sum() == pytest.approx(1.0)


def test_parts_of_one_file_share_its_ingest_report():
    records = make_records(SCHEMA, 100, 1)
    first = np.arange(records.num_units) < 30
    found = evaluate(records.select_units(first), records.select_units(~first), make_records(SCHEMA, 50, 2))
    assert list(found.comparison.ingest) == ["train and held-out", "synthetic"]
    assert found.comparison.ingest["train and held-out"]["clipped"] == {"sodium": 731}
