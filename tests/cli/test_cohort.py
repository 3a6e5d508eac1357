"""`synthward cohort`, the job behind `make cohort`: done once, found again, never in the way of anything."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.commandline import Outcome, assert_one_line_error, run, start
from tests.tinydata import write_tiny

pytestmark = pytest.mark.slow

EPSILON, DELTA = 3.0, 1e-5
# The RDP accountant plans a fit of so few steps in a fraction of the time that PLD takes.
QUICK = ("--steps", 20, "--accountant", "rdp", "--delta", DELTA, "--json")


def call(*arguments: object) -> Outcome:
    """`synthward ...` in this process, which spares it the imports and the planning of equal budgets."""
    from synthward.cli import main

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = main([str(a) for a in arguments])
    return Outcome(code, out.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs a job on the tiny data; the folder of all jobs is the fixture's `out`."""
    folder = tmp_path_factory.mktemp("jobs")
    data, schema = write_tiny(folder)
    out = folder / "out"

    def do(*extra: object) -> dict[str, Any]:
        outcome = call("cohort", "--data", data, "--schema", schema, "--out", out, *QUICK, *extra)
        assert outcome.code == 0, outcome.stderr[-3000:]
        assert "Traceback" not in outcome.stderr
        return json.loads(outcome.stdout)

    do.out, do.data, do.schema = out, data, schema
    do.first = do("--epsilon", EPSILON)
    return do


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_job_ends_with_epsilon_cohort_and_report(job):
    first = job.first
    assert 0 < first["epsilon"] <= EPSILON and first["private"] is True and first["unit"] == "patient"
    assert Path(first["cohort"]) == job.out / "data" / "cohort.parquet"
    assert pq.read_table(first["cohort"]).num_rows > 0
    assert "</html>" in Path(first["report"]).read_text()
    assert first["custodian_only"] is True and first["summary"]["two_way_tv_mean"] > 0


def test_the_same_job_again_spends_and_changes_nothing(job):
    before = contents(job.out / "data")
    again = job("--epsilon", EPSILON)
    assert {k: again[k] for k in ("epsilon", "cohort", "report", "run_id", "summary")} == {
        k: job.first[k] for k in ("epsilon", "cohort", "report", "run_id", "summary")
    }
    assert contents(job.out / "data") == before


def test_a_lost_report_is_made_again_from_the_same_run(job):
    before = contents(job.out / "data")
    Path(job.first["report"]).unlink()
    job("--epsilon", EPSILON)
    after = contents(job.out / "data")
    assert after.keys() == before.keys()
    assert after["run/ledger.jsonl"] == before["run/ledger.jsonl"]
    assert after["cohort.parquet"] == before["cohort.parquet"]


def test_another_number_of_rows_costs_no_budget_and_replaces_nothing(job):
    before = contents(job.out / "data")
    other = job("--epsilon", EPSILON, "--rows", 37)
    assert Path(other["cohort"]).name == "cohort-37.parquet"
    assert pq.read_table(other["cohort"]).num_rows == 37
    after = contents(job.out / "data")
    assert {name: after[name] for name in before if name != "job.json"} == {
        name: before[name] for name in before if name != "job.json"
    }


def test_another_budget_gets_a_folder_of_its_own(job):
    """Beside the first, whatever else is in the way."""
    before = contents(job.out / "data")
    theirs = job.out / "data-2" / "thesis.txt"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    other = job("--epsilon", 2.0)
    assert Path(other["run"]) == job.out / "data-3" / "run"
    assert other["epsilon"] <= 2.0
    assert contents(job.out / "data") == before
    assert theirs.read_text() == "mine" and len(list(theirs.parent.iterdir())) == 1
    assert job("--epsilon", EPSILON)["run"] == job.first["run"], "and the first is still found"
    shutil.rmtree(theirs.parent)


def test_a_fresh_job_is_asked_for(job):
    fresh = job("--epsilon", EPSILON, "--fresh")
    assert fresh["run_id"] != job.first["run_id"]
    assert job("--epsilon", EPSILON)["run_id"] == fresh["run_id"], "the latest is the one that is found"


def test_a_killed_job_goes_on(tmp_path):
    """Killed in the middle of its fit, the same command ends it within the budget."""
    data, schema = write_tiny(tmp_path)
    before = data.read_bytes(), schema.read_bytes()
    arguments = ["cohort", "--data", data, "--schema", schema, "--out", tmp_path / "out", *QUICK]
    arguments[arguments.index("--steps") + 1] = 300
    process = start(*arguments, "--epsilon", EPSILON)
    ledger = tmp_path / "out" / "data" / "run" / "ledger.jsonl"
    while process.poll() is None and not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 3):
        pass
    assert process.poll() is None, process.stderr.read()[-2000:]
    process.kill()
    process.wait()
    process.stderr.close()
    outcome = run(*arguments, "--epsilon", EPSILON)
    assert outcome.code == 0, outcome.stderr[-3000:]
    found = json.loads(outcome.stdout)
    assert 0 < found["epsilon"] <= EPSILON
    assert Path(found["cohort"]).is_file() and Path(found["report"]).is_file()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data"]
    assert (data.read_bytes(), schema.read_bytes()) == before


def test_what_cannot_be_a_job_leaves_nothing(tmp_path):
    data, schema = write_tiny(tmp_path)
    out = tmp_path / "out"
    assert_one_line_error(call("cohort", "--data", data, "--out", out), "--schema")
    assert_one_line_error(call("cohort", "--schema", schema, "--out", out), "--data")
    gone = tmp_path / "gone.csv"
    assert_one_line_error(call("cohort", "--data", gone, "--schema", schema, "--out", out), "gone.csv")
    for option, value in (("--epsilon", 0), ("--delta", 1), ("--generator", "wizard"), ("--set", "x")):
        line = assert_one_line_error(
            call("cohort", "--data", data, "--schema", schema, "--out", out, option, value)
        )
        assert option.strip("-") in line
    assert not list(out.rglob("*"))
