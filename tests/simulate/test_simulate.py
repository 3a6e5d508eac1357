"""The simulator: deterministic, streamed, true to its own model, and within its own schema."""

import numpy as np
import pyarrow as pa
import pytest

from synthward.data import check_constraints, read_records
from synthward.engine.errors import ConfigError, OutputError
from synthward.simulate import (
    COMORBIDITIES,
    comorbidity_probability,
    simulate_batches,
    simulation_schema,
    write_simulation,
)
from synthward.simulate.patients import draw_patients
from synthward.simulate.visits import draw_visits

# Two-sided normal quantile of a false-alarm rate of 1e-9.
SIX_SIGMA = 6.11


def table(patients, seed=1):
    return pa.Table.from_batches(simulate_batches(patients, seed))


def test_a_seed_gives_the_same_patients_and_another_one_others():
    assert table(300, 4).equals(table(300, 4))
    assert not table(300, 4).equals(table(300, 5))


@pytest.mark.parametrize("patients", [1, 8191, 8192, 8193])
def test_more_patients_only_add_rows(patients):
    many, few = table(9000), table(patients)
    assert many.slice(0, few.num_rows).equals(few)
    assert len(set(few["patient_id"].to_pylist())) == patients


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_records_satisfy_their_schema(tmp_path, suffix):
    out = tmp_path / f"hospital{suffix}"
    rows = write_simulation(out, 3000, 2)
    schema = simulation_schema()
    records = read_records(out, schema)
    assert records.num_rows == rows and records.num_units == 3000
    assert not any(records.report.clipped.values()) and not any(records.report.other.values())
    assert not any(check_constraints(schema, records.columns).values())
    assert 1.5 <= rows / 3000 <= 2.0
    with pytest.raises(OutputError, match="exists already"):
        write_simulation(out, 10, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name]


@pytest.mark.parametrize("patients", [0, -3])
def test_too_few_patients_are_refused(patients):
    with pytest.raises(ConfigError, match="patients"):
        next(simulate_batches(patients))


def test_comorbidities_follow_the_diagram():
    people = draw_patients(np.random.default_rng(11), 200_000)
    truth = comorbidity_probability(people["age"], people["smoking"] == 2, people["bmi"] >= 30)
    for name in COMORBIDITIES:
        for old in (False, True):
            group = (people["age"] >= 65) == old
            p = truth[name][group]
            error = people[name][group].mean() - p.mean()
            assert abs(error) < SIX_SIGMA * np.sqrt((p * (1 - p)).mean() / group.sum()), (name, old)


def test_comorbidities_depend_on_age_and_on_each_other():
    truth = comorbidity_probability(np.array([30.0, 80.0]), np.zeros(2, bool), np.zeros(2, bool))
    for name in COMORBIDITIES:
        assert truth[name][1] > 1.5 * truth[name][0]
    people = draw_patients(np.random.default_rng(12), 100_000)
    middle = (people["age"] > 55) & (people["age"] < 65)
    ckd, diabetes = people["ckd"][middle] > 0, people["diabetes"][middle] > 0
    assert ckd[diabetes].mean() > 1.5 * ckd[~diabetes].mean()


def test_values_are_missing_more_often_for_the_healthy():
    rng = np.random.default_rng(13)
    people = draw_patients(rng, 30_000)
    visits = draw_visits(rng, people)
    patient = visits["patient"].astype(int)
    severity = sum(people[name] for name in COMORBIDITIES)[patient]
    absent = np.isnan(visits["creatinine"])
    assert absent[severity == 0].mean() > 1.5 * absent[severity >= 3].mean()


def test_outcome_follows_its_true_probability_and_can_be_predicted():
    rng = np.random.default_rng(14)
    visits = draw_visits(rng, draw_patients(rng, 60_000))
    chance, outcome = visits["outcome_chance"], visits["readmitted"]
    for low, high in ((0.0, 0.05), (0.05, 0.15), (0.15, 0.4), (0.4, 1.0)):
        group = (chance >= low) & (chance < high)
        p = chance[group]
        bound = SIX_SIGMA * np.sqrt((p * (1 - p)).sum()) / group.sum()
        assert abs(outcome[group].mean() - p.mean()) < bound
    ranks = chance.argsort().argsort() + 1.0
    positive = outcome > 0
    auroc = (ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / (
        positive.sum() * (~positive).sum()
    )
    assert 0.70 < auroc < 0.85
