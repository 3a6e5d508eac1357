"""The main job as a user runs it: simulate, fit, sample, evaluate; and the same on real records."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commandline import Outcome, run

EPSILON, DELTA = 3.0, 1e-6


def succeed(*arguments: object, timeout: float = 300) -> Outcome:
    """Runs a command that must end well, without a traceback on the way."""
    outcome = run(*arguments, timeout=timeout)
    assert outcome.code == 0, f"{arguments}: {outcome.stderr[-3000:]}"
    assert "Traceback" not in outcome.stderr
    return outcome


def as_json(outcome: Outcome) -> dict:
    """With --json, standard output is one JSON object and nothing else."""
    found = json.loads(outcome.stdout)
    assert isinstance(found, dict)
    return found


def assert_report_is_whole(report: Path) -> None:
    """One file without any outside resource, with pictures, the budget and the statement of what is
    protected."""
    html = report.read_text()
    assert "</html>" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html), "the report loads from a network"
    assert "@import" not in html and "<script src" not in html
    assert "<svg" in html or "data:image/png;base64," in html
    text = re.sub(r"<[^>]+>", " ", html).lower()
    for wanted in ("epsilon", "delta", "auroc", "total variation", "custodian"):
        assert wanted in text, wanted
    assert re.search(r"add(ing|ed)?[^.]{0,40}remov", text), "the neighbouring relation is stated"
    assert "1e-06" in text or "1e-6" in text or "0.000001" in text


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_simulate_fit_sample_evaluate(tmp_path, generator):
    """A small invented hospital, from nothing to the report."""
    from synthward.engine import Ledger

    hospital = tmp_path / "hospital.parquet"
    succeed("simulate", "--patients", 400, "--seed", 3, "--out", hospital)
    schema = tmp_path / "hospital.toml"
    if not schema.exists():
        from synthward.simulate import SIMULATION_SCHEMA_TOML

        schema.write_text(Path(SIMULATION_SCHEMA_TOML).read_text())
    folder, cohort, report = tmp_path / "run", tmp_path / "cohort.parquet", tmp_path / "report.html"
    fitted = as_json(
        succeed(
            *("fit", hospital, "--schema", schema, "--generator", generator, "--epsilon", EPSILON),
            *("--delta", DELTA, "--out", folder, "--steps", 40, "--json"),
        )
    )
    assert 0 < fitted["epsilon"] <= EPSILON
    sampled = as_json(succeed("sample", folder, "--rows", 500, "--out", cohort, "--json"))
    assert sampled["rows"] == pq.read_table(cohort).num_rows == 500
    succeed("evaluate", folder, "--real", hospital, "--out", report)
    assert_report_is_whole(report)
    ledger = Ledger.open(next(folder.rglob("ledger*.json*")))
    assert ledger.epsilon(DELTA, "pld") == pytest.approx(fitted["epsilon"], rel=1e-6)


@pytest.mark.slow
def test_every_command_can_be_run_twice(tmp_path):
    """The same data from the same seed; and a second run into the same place is refused, not mixed in."""
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for out in (first, second):
        succeed("simulate", "--patients", 50, "--seed", 3, "--out", out)
    assert pq.read_table(first).equals(pq.read_table(second))
    assert run("simulate", "--patients", 50, "--seed", 3, "--out", first).code == 2


def test_account_prints_the_library_s_epsilon():
    """The reference case of sigma 1, q 0.01, 1000 steps."""
    settings = ("--noise-multiplier", 1.0, "--sample-rate", 0.01, "--steps", 1000, "--delta", 1e-5)
    found = as_json(succeed("account", *settings, "--json"))
    assert found["epsilon"] == pytest.approx(1.828244, abs=2e-6)
    wanted = {"epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "accountant"}
    assert wanted <= set(found)


def test_account_solves_for_the_noise():
    settings = ("--target-epsilon", 3.0, "--sample-rate", 0.02, "--steps", 2500, "--delta", 1e-6)
    found = as_json(succeed("account", *settings, "--json"))
    assert found["noise_multiplier"] == pytest.approx(1.72615, rel=1e-3)
    assert found["epsilon"] <= 3.0


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_the_whole_job_on_part_of_diabetes130(tmp_path, shared_data, generator):
    """The first 20,000 encounters, with the hand-written schema of the benchmark."""
    schema = Path(__file__).parent.parent / "benchmarks" / "schemas" / "diabetes130.toml"
    data = tmp_path / "part.csv"
    with gzip.open(shared_data / "diabetes130" / "diabetic_data.csv.gz", "rt") as source:
        data.write_text("".join(line for _, line in zip(range(20_001), source, strict=False)))
    folder, cohort, report = tmp_path / "run", tmp_path / "cohort.parquet", tmp_path / "report.html"
    succeed(
        *("fit", data, "--schema", schema, "--generator", generator, "--epsilon", EPSILON),
        *("--delta", DELTA, "--out", folder, "--steps", 150),
    )
    succeed("sample", folder, "--rows", 4000, "--out", cohort)
    readmitted = tmp_path / "readmitted.parquet"
    succeed("sample", folder, "--rows", 500, "--out", readmitted, "--where", "readmitted='<30'")
    assert set(pq.read_table(readmitted)["readmitted"].to_pylist()) == {"<30"}
    found = as_json(succeed("evaluate", folder, "--real", data, "--out", report, "--json"))
    assert_report_is_whole(report)
    assert isinstance(found, dict) and found
    table = pq.read_table(cohort)
    assert table.num_rows == 4000
    assert 0.02 < table["readmitted"].to_pylist().count("<30") / 4000 < 0.30, "11% in the records"
