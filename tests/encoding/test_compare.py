"""Whether records may be those of an encoder: never "no" to its own, and "no" to others as far as noise allows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from synthward.encoding import TableEncoder
from synthward.encoding.compare import FALSE_ALARM, _fits_levels, may_be_of
from synthward.schema import load_schema
from tests.encoding.test_encoder import SCHEMA, make_records
from tests.queries.asking import mechanism


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    file = tmp_path_factory.mktemp("schema") / "schema.toml"
    file.write_text(SCHEMA)
    return load_schema(file)


def fitted(records, noise: float, seed: int | None = None) -> TableEncoder:
    """Through the engine's own query, and through what lies in a run's folder."""
    found = TableEncoder.fit(records, mechanism(seed), noise)
    return TableEncoder.from_dict(found.to_dict())


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("per_unit", [[1], [3, 1, 2], [2] * 40, [1, 5] * 400])
def test_the_encoder_s_own_records_always_may(schema, per_unit, noise):
    """From noise that drowns all there is to noise that changes nothing: one false alarm in 1e9 encoders."""
    records = make_records(schema, per_unit)
    assert all(may_be_of(fitted(records, noise), records, noise) for _ in range(40))
    assert FALSE_ALARM == 1e-9


def test_no_more_than_the_claimed_noise_is_allowed_for(schema):
    records = make_records(schema, [2] * 2000)
    assert not any(may_be_of(fitted(records, 10.0), records, 1.0) for _ in range(40))


@pytest.mark.parametrize("name", ["sex", "stage", "visits", "creatinine", "outcome"])
def test_one_column_of_others_is_enough(schema, name):
    """As many units and rows, and all else the same."""
    records = make_records(schema, [1, 2] * 3000)
    encoder = fitted(records, 0.5)
    values = records.columns[name]
    if name == "creatinine":
        moved = np.where(values < 2.0, values + 6.0, values)
    else:
        moved = np.where(values == 1, 0, values).astype(values.dtype)
    others = replace(records, columns={**records.columns, name: moved})
    assert may_be_of(encoder, records, 0.5) and not may_be_of(encoder, others, 0.5)


def test_numbers_that_are_missing_are_counted(schema):
    records = make_records(schema, [2] * 4000)
    encoder = fitted(records, 0.5)
    values = records.columns["creatinine"]
    # The same shares of those that are there, to within the noise.
    gone = np.where(np.arange(len(values)) % 8 == 0, np.nan, values)
    others = replace(records, columns={**records.columns, "creatinine": gone})
    assert not may_be_of(encoder, others, 0.5)


def test_levels_and_bins_that_drowned_are_none_in_others(schema):
    """Two thousand of what the encoder saw nobody have."""
    records = make_records(schema, [1] * 4000)
    records.columns["visits"][:] = 4.0
    records.columns["creatinine"][:] = 1.0
    encoder = fitted(records, 1.0)
    for name in ("visits", "creatinine"):
        moved = records.columns[name].copy()
        moved[:2000] = 11.0
        others = replace(records, columns={**records.columns, name: moved})
        assert may_be_of(encoder, records, 1.0) and not may_be_of(encoder, others, 1.0)


@pytest.mark.parametrize("units", [500, 4000])
def test_another_number_of_units_is_noticed(schema, units):
    records, others = make_records(schema, [1] * 2000), make_records(schema, [1] * units)
    assert not may_be_of(fitted(records, 1.0), others, 1.0)


def test_rows_that_are_put_together_otherwise_are_noticed(schema):
    """A row weighs as much alone as beside another one: all histograms are the same."""
    records = make_records(schema, [1] * 4000)
    paired = replace(records, unit_offsets=records.unit_offsets[::2], unit_keys=records.unit_keys[::2])
    for own, others in ((records, paired), (paired, records)):
        assert may_be_of(fitted(own, 1.0), own, 1.0) and not may_be_of(fitted(own, 1.0), others, 1.0)


def test_levels_below_the_noise_are_rare():
    """Of two tokens: one that nothing stands out in, and one with a level that does."""
    leaf, group = np.array([1.0, 1.0, 0.0, 90.0]), np.array([0, 0, 1, 1])
    assert _fits_levels(leaf, group, np.array([29.0, 30.0, 30.0, 80.0]), 10.0, 20.0)
    for exact in (
        [31.0, 0.0, 0.0, 90.0],
        [0.0, 0.0, 31.0, 90.0],
        [0.0, 0.0, 0.0, 79.0],
        [0.0, 0.0, 0.0, 101.0],
    ):
        assert not _fits_levels(leaf, group, np.array(exact), 10.0, 20.0)


def test_a_unit_more_or_less_is_not(schema):
    """What was paid for hides it."""
    records = make_records(schema, [1, 2] * 500)
    mask = np.arange(1000) != 7
    for _ in range(20):
        encoder = fitted(records, 1.0)
        assert may_be_of(encoder, records.select_units(mask), 1.0)
