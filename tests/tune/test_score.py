"""The score of a trial: what it measures, and how far one unit can move it before its noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthward.data import Records
from synthward.engine import KeySchedule, Ledger, QueryMechanism
from synthward.engine.accounting import GaussianEvent
from synthward.engine.queries.units import PARTS
from synthward.engine.replay import recording
from synthward.run.score import SAMPLES, Score, tables_of
from synthward.schema import Schema
from synthward.schema.load import parse_schema
from tests.tinydata import SCHEMA, only_columns

TINY = parse_schema(SCHEMA)
CODES = parse_schema(
    """
version = 1
name = "codes"
unit = "patient"
[columns.patient]
kind = "id"
[columns.diagnosis]
kind = "code"
system = "icd9"
level = "category"
[columns.ward]
kind = "ordinal"
categories = [WARDS]
missing = true
""".replace("WARDS", ", ".join(f'"w{i:02}"' for i in range(30)))
)


def columns(
    schema: Schema, rows: int, rng: np.random.Generator, *, one: bool = False
) -> dict[str, np.ndarray]:
    """Rows of any values that the schema allows, and missing ones; with `one`, all rows alike."""
    found = {}
    for column in schema.modelled:
        size = 1 if one else rows
        if column.is_discrete:
            values = rng.integers(-1, len(column.levels), size).astype(np.int32)
        else:
            values = np.rint(rng.uniform(column.min, column.max, size))
            values[rng.random(size) < 0.2] = np.nan
        found[column.name] = np.broadcast_to(values, rows).copy()
    return found


def records(schema: Schema, sizes: list[int], rng: np.random.Generator) -> Records:
    """Units of so many rows each."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    values = columns(schema, int(offsets[-1]), rng)
    return Records(schema, values, offsets, np.array([f"u{i:04d}" for i in range(len(sizes))]), None)  # type: ignore[arg-type]


def without(whole: Records, unit: int) -> Records:
    return whole.select_units(np.arange(whole.num_units) != unit)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schema=st.sampled_from([TINY, CODES]),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    seed=st.integers(0, 2**32),
    one=st.booleans(),
    unit=st.integers(0, 11),
)
def test_one_unit_moves_the_score_by_at_most_its_sensitivity(schema, sizes, seed, one, unit):
    rng = np.random.default_rng(seed)
    whole = records(schema, sizes, rng)
    samples = None if seed % 7 == 0 else columns(schema, SAMPLES, rng, one=one)
    more, less = Score(whole), Score(without(whole, unit % len(sizes)))
    assert more.sensitivity == less.sensitivity == 2 * len(tables_of(schema)) * PARTS * SAMPLES
    assert abs(more.distance(samples) - less.distance(samples)) <= more.sensitivity


def test_the_bound_is_met():
    """A unit that shares no cell with any sample, among units that agree with the samples, moves it by all of it."""
    schema = parse_schema(
        only_columns(SCHEMA, ("patient", "sex", "smoker")).replace(
            'label = "outcome"\nlabel_positive = "died"\n', ""
        )
    )
    kept = {"sex": np.zeros(3, dtype=np.int32), "smoker": np.zeros(3, dtype=np.int32)}
    far = {name: np.r_[values, np.int32(1)] for name, values in kept.items()}
    keys = np.array(list("abcd"))
    near = Score(Records(schema, kept, np.arange(4), keys[:3], None))  # type: ignore[arg-type]
    both = Score(Records(schema, far, np.arange(5), keys, None))  # type: ignore[arg-type]
    samples = {name: np.zeros(SAMPLES, dtype=np.int32) for name in kept}
    assert near.distance(samples) == 0
    assert both.distance(samples) == both.sensitivity


def test_it_is_units_times_the_mean_total_variation_distance():
    rng = np.random.default_rng(3)
    schema = parse_schema(only_columns(SCHEMA, ("patient", "sex", "stage", "smoker", "outcome")))
    whole, samples = records(schema, [1, 4, 2, 7, 1], rng), columns(schema, SAMPLES, rng)
    per_unit, owner = np.diff(whole.unit_offsets), whole.row_unit()
    distances = []
    for first, second in tables_of(schema):
        real: dict[tuple[int, int], float] = {}
        drawn: dict[tuple[int, int], float] = {}
        for row in range(whole.num_rows):
            cell = (int(whole.columns[first][row]), int(whole.columns[second][row]))
            real[cell] = real.get(cell, 0.0) + 1.0 / per_unit[owner[row]]
        for row in range(SAMPLES):
            cell = (int(samples[first][row]), int(samples[second][row]))
            drawn[cell] = drawn.get(cell, 0.0) + 5.0 / SAMPLES
        cells = real.keys() | drawn.keys()
        distances.append(sum(abs(real.get(c, 0.0) - drawn.get(c, 0.0)) for c in cells) / 2)
    score = Score(whole)
    # Weights are whole parts of 4096: thirds and sevenths are rounded.
    assert score.distance(samples) / score.sensitivity == pytest.approx(np.mean(distances), rel=1e-3)


def test_a_generator_that_is_nearer_scores_better():
    rng = np.random.default_rng(4)
    whole = records(TINY, [1] * 2000, rng)
    picked = rng.integers(0, 2000, SAMPLES)
    near = {name: values[picked] for name, values in whole.columns.items()}
    apart = {name: rng.permutation(values) for name, values in near.items()}
    one = columns(TINY, SAMPLES, rng, one=True)
    score = Score(whole)
    found = [score.distance(samples) for samples in (near, apart, one)]
    assert found[0] < found[1] < found[2] <= score.sensitivity * 2000


def test_the_answer_is_one_charged_query_of_that_sensitivity(tmp_path: Path):
    rng = np.random.default_rng(5)
    score, samples = Score(records(TINY, [2] * 40, rng)), columns(TINY, SAMPLES, rng)
    keys = KeySchedule.reproducible(1)
    with Ledger.create(
        tmp_path / "ledger.jsonl", run_id="r", unit="u", delta=1e-5, key_id=keys.key_id, private=False
    ) as ledger:
        queries = QueryMechanism(ledger, keys)
        with recording() as asked:
            answers = [score.ask(samples, queries, 4.0) for _ in range(400)]
        assert ledger.events() == [GaussianEvent(4.0, 400)]
    assert {release.sensitivity for release in asked.releases} == {np.nextafter(score.sensitivity, np.inf)}
    assert {release.values[0] for release in asked.releases} == {score.distance(samples)}
    centre = score.distance(samples) / score.sensitivity
    # 400 draws: five standard deviations of their mean, and of their spread.
    assert np.mean(answers) == pytest.approx(centre, abs=5 * 4.0 / 20)
    assert np.std(answers) == pytest.approx(4.0, rel=5 / np.sqrt(800))


def test_which_tables_there_are_follows_from_the_schema():
    assert len(tables_of(TINY)) == 10 * 9 // 2
    assert tables_of(parse_schema(only_columns(SCHEMA, ("patient", "outcome")))) == [("outcome", "outcome")]
    wide = SCHEMA.split("\n[[constraints]]")[0] + "".join(
        f'\n[columns.flag{i}]\nkind = "boolean"\n' for i in range(40)
    )
    tables = tables_of(parse_schema(wide))
    assert len(tables) == len(set(tables)) == 256
    assert sum("outcome" in pair for pair in tables) == 49
