"""What every generator owes its users: the schema holds in every row that is sampled."""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.commandline import environment
from tests.tinydata import COLUMNS, STAGES

pytestmark = pytest.mark.slow  # whole fits

ALLOWED_MISSING = ("weight", "stage")
INTEGERS = {"age": (0, 100), "first": (0, 60), "last": (0, 60)}
LEVELS = {"sex": {"F", "M"}, "stage": set(STAGES), "outcome": {"alive", "died"}}


def values(cohort: pa.Table, column: str) -> list:
    """The column's cells that are not missing."""
    return [v for v in cohort[column].to_pylist() if v is not None]


def test_the_cohort_has_the_declared_columns_in_order(cohort):
    modelled = [c for c in COLUMNS if c != "patient"]
    assert [c for c in cohort.column_names if c in modelled] == modelled
    assert set(cohort.column_names) <= set(COLUMNS)
    assert cohort.num_rows == 2000


def test_no_real_patient_is_named(cohort, fitted):
    real = {row["patient"] for row in fitted.real}
    for column in cohort.column_names:
        assert not real & set(map(str, cohort[column].to_pylist()))


@pytest.mark.parametrize("column", INTEGERS)
def test_integers_are_integral_and_within_bounds(cohort, column):
    assert pa.types.is_integer(cohort.schema.field(column).type)
    low, high = INTEGERS[column]
    assert low <= min(values(cohort, column)) <= max(values(cohort, column)) <= high


def test_numbers_have_the_declared_bounds_and_decimals(cohort):
    weights = values(cohort, "weight")
    assert min(weights) >= 30.0 and max(weights) <= 180.0
    assert all(abs(w * 10 - round(w * 10)) < 1e-6 for w in weights)


def test_dates_are_within_the_declared_bounds(cohort):
    visited = [str(v)[:10] for v in values(cohort, "visited")]
    dates = [datetime.date.fromisoformat(v) for v in visited]
    assert datetime.date(2020, 1, 1) <= min(dates) and max(dates) <= datetime.date(2023, 12, 31)


@pytest.mark.parametrize("column", LEVELS)
def test_categories_are_declared_ones(cohort, column):
    assert set(values(cohort, column)) <= LEVELS[column]


def test_missing_values_stand_only_where_allowed(cohort):
    for column in cohort.column_names:
        if column not in ALLOWED_MISSING:
            assert cohort[column].null_count == 0, column


@pytest.mark.parametrize("column", ALLOWED_MISSING)
def test_the_share_of_missing_values_is_reproduced(cohort, fitted, column):
    real = sum(row[column] == "" for row in fitted.real) / len(fitted.real)
    assert abs(cohort[column].null_count / cohort.num_rows - real) < 0.08


@pytest.mark.parametrize("column", ["sex", "outcome", "stage"])
def test_marginals_are_learned(cohort, fitted, column):
    """A wide budget on an easy table: total variation well below that of a uniform guess gone wrong."""
    real = [row[column] or None for row in fitted.real]
    fake = cohort[column].to_pylist()
    levels = set(real) | set(fake)
    distance = sum(abs(real.count(v) / len(real) - fake.count(v) / len(fake)) for v in levels) / 2
    assert distance < 0.15


def test_constraints_hold_in_every_row(cohort):
    rows = cohort.to_pylist()
    assert all(row["first"] <= row["last"] for row in rows)
    men = [row for row in rows if row["sex"] == "M"]
    assert men and not any(truth(row["pregnant"]) for row in men)


def truth(value: object) -> bool:
    """A boolean however the file spells it."""
    return str(value).lower() in ("true", "1")


@pytest.mark.parametrize(
    ("where", "column", "wanted"),
    [("outcome='died'", "outcome", "died"), ("sex='M'", "sex", "M"), ("stage='IV'", "stage", "IV")],
)
def test_conditional_sampling_gives_only_such_rows(fitted, tmp_path, where, column, wanted):
    """As many rows as asked, all of the kind asked for, and the constraints hold there too."""
    cohort = fitted.sample(tmp_path / "c.parquet", 300, where=where)
    assert cohort.num_rows == 300
    assert set(cohort[column].to_pylist()) == {wanted}
    for row in cohort.to_pylist():
        assert row["first"] <= row["last"]
        assert row["sex"] != "M" or not truth(row["pregnant"])


def test_a_condition_on_a_forced_value_contradicts_no_constraint(fitted, tmp_path):
    """Pregnant patients are women: the rows are drawn, not repaired into men."""
    cohort = fitted.sample(tmp_path / "c.parquet", 100, where="pregnant='true'")
    assert {truth(v) for v in cohort["pregnant"].to_pylist()} == {True}
    assert set(cohort["sex"].to_pylist()) == {"F"}


def test_the_same_seed_gives_the_same_cohort(fitted, tmp_path):
    first = fitted.sample(tmp_path / "a.parquet", 500, seed=7)
    assert first.equals(fitted.sample(tmp_path / "b.parquet", 500, seed=7))
    assert not first.equals(fitted.sample(tmp_path / "c.parquet", 500, seed=8))


def test_without_a_seed_cohorts_differ(fitted, tmp_path):
    first = fitted.sample(tmp_path / "a.parquet", 200)
    assert not first.equals(fitted.sample(tmp_path / "b.parquet", 200))


def test_a_longer_cohort_begins_with_the_shorter_one(fitted, tmp_path):
    """Row i depends on the seed and on i, not on how many rows are made at a time."""
    long = fitted.sample(tmp_path / "long.parquet", 5000, seed=3)
    short = fitted.sample(tmp_path / "short.parquet", 700, seed=3)
    assert long.slice(0, 700).equals(short)


def test_rows_are_not_repeated(cohort):
    """No copy of one row in place of draws."""
    keys = ["age", "weight", "visited", "first"]
    distinct = cohort.group_by(keys).aggregate([]).num_rows
    assert distinct > 0.9 * cohort.num_rows


def test_csv_and_parquet_hold_the_same_cohort(fitted, tmp_path):
    from synthward.run import sample_run

    parquet = fitted.sample(tmp_path / "c.parquet", 300, seed=4)
    sample_run(fitted.run, 300, tmp_path / "c.csv", seed=4)
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == parquet.column_names
    assert [row["age"] for row in rows] == [str(a) for a in parquet["age"].to_pylist()]
    assert sum(row["weight"] == "" for row in rows) == parquet["weight"].null_count


def test_an_interrupted_sampling_resumes_to_the_same_cohort(fitted, tmp_path, monkeypatch):
    """Stopped by an error in the middle of writing, then continued: the cohort of an uninterrupted run."""
    from synthward.data import CohortWriter

    whole = fitted.sample(tmp_path / "whole.parquet", 40_000, seed=6)
    original, written = CohortWriter.write, []

    def failing(self, batch):
        if len(written) >= 1:
            raise KeyboardInterrupt
        written.append(None)
        return original(self, batch)

    out = tmp_path / "resumed.parquet"
    monkeypatch.setattr(CohortWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        fitted.sample(out, 40_000, seed=6)
    monkeypatch.undo()
    assert not out.exists()
    assert fitted.sample(out, 40_000, seed=6, resume=True).equals(whole)


def test_another_process_draws_the_same_cohort(fitted, tmp_path):
    """A seed means the same on the command line, in a process of its own."""
    here = fitted.sample(tmp_path / "here.parquet", 200, seed=9)
    out = tmp_path / "there.parquet"
    arguments = ["sample", fitted.run, "--rows", 200, "--out", out, "--seed", 9, "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "synthward", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert isinstance(json.loads(done.stdout), dict)
    assert here.equals(pq.read_table(out))


def test_sampling_does_not_change_the_run(fitted, tmp_path):
    """Post-processing: no file of the run changes, the budget least of all."""
    before = {p: p.read_bytes() for p in fitted.run.rglob("*") if p.is_file()}
    fitted.sample(tmp_path / "c.parquet", 100)
    assert before == {p: p.read_bytes() for p in fitted.run.rglob("*") if p.is_file()}


def test_the_cohort_is_not_the_records(cohort, fitted):
    """Not one synthetic row equals a real one in all its free columns: a generator that copies would."""
    keys = ("age", "weight", "visited", "first", "last")
    real = {tuple(row[k] for k in keys) for row in fitted.real if row["weight"]}
    weighed = cohort.filter(pc.is_valid(cohort["weight"])).to_pylist()
    fake = {tuple(f"{r[k]:.1f}" if k == "weight" else str(r[k])[:10] for k in keys) for r in weighed}
    assert not real & fake
