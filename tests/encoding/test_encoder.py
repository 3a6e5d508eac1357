"""The encoder's one query: its sensitivity is what it declares, and decoding respects the schema."""

import numpy as np
import pytest

from synthward.data import Records
from synthward.data.records import IngestReport
from synthward.encoding import TableEncoder
from synthward.encoding.encoder import histograms_of
from synthward.schema import load_schema

SCHEMA = """
version = 1
name = "small"
unit = "pid"
label = "outcome"
[columns.pid]
kind = "id"
[columns.sex]
kind = "categorical"
categories = ["F", "M"]
[columns.stage]
kind = "ordinal"
categories = ["I", "II", "III", "IV"]
missing = true
[columns.visits]
kind = "integer"
min = 0
max = 20
[columns.creatinine]
kind = "continuous"
min = 0.0
max = 12.0
decimals = 2
missing = true
[columns.outcome]
kind = "boolean"
"""


class ExactQueries:
    """Stands for the charged mechanism: records what was asked and answers without noise."""

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, float, float]] = []

    def gaussian_vector(self, values, *, l2_sensitivity, noise_multiplier, note):
        self.asked.append((values, l2_sensitivity, noise_multiplier))
        return values.copy()


@pytest.fixture
def schema(tmp_path):
    file = tmp_path / "schema.toml"
    file.write_text(SCHEMA)
    return load_schema(file)


def make_records(schema, per_unit, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(per_unit)]).astype(np.int64)
    rows = int(offsets[-1])
    lab = np.where(rng.random(rows) < 0.3, np.nan, np.round(rng.uniform(0, 12, rows), 2))
    columns = {
        "sex": rng.integers(0, 2, rows).astype(np.int32),
        "stage": rng.integers(-1, 4, rows).astype(np.int32),
        "visits": rng.integers(0, 21, rows).astype(np.float64),
        "creatinine": lab,
        "outcome": rng.integers(0, 2, rows).astype(np.int32),
    }
    keys = np.array([str(i) for i in range(len(per_unit))])
    return Records(schema, columns, offsets, keys, IngestReport(rows))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 500])
def test_a_unit_moves_the_query_by_no_more_than_declared(schema, count):
    with_unit = make_records(schema, [3, 1, count])
    without = with_unit.select_units(np.array([True, True, False]))
    queries = ExactQueries()
    TableEncoder.fit(with_unit, queries, 1.0)
    moved = np.concatenate(histograms_of(with_unit)) - np.concatenate(histograms_of(without))
    declared = queries.asked[0][1]
    assert np.linalg.norm(moved) <= declared * (1 + 1e-12)
    # The bound is met, so that a smaller declaration would be caught by this test.
    same = make_records(schema, [1, count])
    for values in same.columns.values():
        values[1:] = 1
    worst = np.concatenate(histograms_of(same)) - np.concatenate(
        histograms_of(same.select_units(np.array([True, False])))
    )
    if count >= 2:
        assert np.linalg.norm(worst) == pytest.approx(declared)


def test_everything_learned_goes_through_one_query(schema):
    records = make_records(schema, np.full(300, 2))
    queries = ExactQueries()
    encoder = TableEncoder.fit(records, queries, 2.0)
    assert len(queries.asked) == 1
    # Same answers, other records: the same encoder. Nothing but the answer was used.
    answer = queries.asked[0][0]

    class Replay(ExactQueries):
        def gaussian_vector(self, values, *, l2_sensitivity, noise_multiplier, note):
            return answer.copy()

    other = TableEncoder.fit(make_records(schema, [1, 9, 4], seed=5), Replay(), 2.0)
    assert other.to_dict() == encoder.to_dict()


def test_round_trip_respects_the_schema(schema):
    records = make_records(schema, np.full(2000, 1))
    encoder = TableEncoder.fit(records, ExactQueries(), 0.5)
    assert encoder.layout.label is not None
    encoded = encoder.encode(records, np.random.default_rng(0))
    uniforms = np.random.default_rng(1).random(encoded.tokens.shape)
    back = encoder.decode(schema, encoded.tokens, encoded.scores, uniforms)
    assert list(back) == [c.name for c in schema.modelled]
    np.testing.assert_array_equal(np.isnan(back["creatinine"]), np.isnan(records.columns["creatinine"]))
    kept = ~np.isnan(back["creatinine"])
    np.testing.assert_allclose(back["creatinine"][kept], records.columns["creatinine"][kept], atol=0.03)
    np.testing.assert_array_equal(back["stage"] < 0, records.columns["stage"] < 0)
    for name in ("sex", "outcome"):
        assert back[name].min() >= 0 and back[name].dtype == np.int32
    assert set(back["visits"]) <= set(range(21))
    again = TableEncoder.from_dict(encoder.to_dict())
    assert again.to_dict() == encoder.to_dict()


def test_context_follows_records_not_units(schema):
    per_unit = np.array([1] * 600 + [4] * 200)
    encoder = TableEncoder.fit(make_records(schema, per_unit), ExactQueries(), 0.1)
    assert encoder.units == pytest.approx(800)
    assert encoder.records == pytest.approx(1400)
    assert encoder.context_mass[0] == pytest.approx(600 / 1400)
    assert encoder.context_mass[3] == pytest.approx(800 / 1400)
