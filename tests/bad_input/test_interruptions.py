"""A full disk, a killed fit, a killed sampling: nothing half-written, nothing lost, nothing spent unseen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from tests.commandline import ACCOUNTANT, assert_one_line_error, command, fit_arguments, run, snapshot, start
from tests.tinydata import write_tiny

pytestmark = pytest.mark.slow  # whole fits in processes of their own

EPSILON, DELTA = 3.0, 1e-5
STEPS = 400


def ledger_report(run_folder: Path) -> dict:
    """What `synthward ledger RUN --json` says."""
    outcome = run("ledger", run_folder, "--json")
    assert outcome.code == 0, outcome.stderr[-2000:]
    return json.loads(outcome.stdout)


def charged(run_folder: Path) -> tuple[float, int]:
    """Epsilon and training steps in the run's ledger, read by the engine's own ledger."""
    from synthward.engine import Ledger

    [path] = list(run_folder.rglob("ledger*.json*"))
    ledger = Ledger.open(path)
    try:
        steps = sum(getattr(event, "steps", 0) for event in ledger.events())
        return ledger.epsilon(DELTA, ACCOUNTANT), steps
    finally:
        if hasattr(ledger, "close"):
            ledger.close()


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine does not allow mounting a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_fit_on_a_full_disk(tmp_path, small_disk):
    """The model does not fit on the disk: one line, and no finished-looking run."""
    data, schema = write_tiny(tmp_path)
    before = snapshot([data, schema])
    outcome = run(*fit_arguments(data, schema, small_disk / "run"))
    assert_one_line_error(outcome, "space")
    assert snapshot([data, schema]) == before
    later = run("sample", small_disk / "run", "--rows", 5, "--out", tmp_path / "c.csv")
    assert_one_line_error(later)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_sample_on_a_full_disk(finished_run, small_disk, suffix):
    cohort = small_disk / f"cohort.{suffix}"
    before = snapshot(sorted(finished_run.rglob("*.*")))
    outcome = run("sample", finished_run, "--rows", 20_000, "--out", cohort)
    assert_one_line_error(outcome, "space")
    assert not cohort.exists()
    assert snapshot(sorted(finished_run.rglob("*.*"))) == before


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_sample_when_no_file_may_grow(tmp_path, finished_run, suffix):
    """The same without a mount: every write beyond 64 KiB fails."""
    cohort = tmp_path / f"cohort.{suffix}"
    outcome = run("sample", finished_run, "--rows", 20_000, "--out", cohort, file_size_limit=65_536)
    assert_one_line_error(outcome)
    assert not cohort.exists()


def test_fit_when_no_file_may_grow(tmp_path):
    """A checkpoint or model beyond 16 KiB cannot be written; the run is not left looking finished."""
    data, schema = write_tiny(tmp_path)
    outcome = run(*fit_arguments(data, schema, tmp_path / "run"), file_size_limit=16_384)
    assert_one_line_error(outcome)
    assert_one_line_error(run("sample", tmp_path / "run", "--rows", 5, "--out", tmp_path / "c.csv"))


# a killed fit


def kill_when(process: subprocess.Popen, ready, timeout: float = 120) -> bool:
    """SIGKILL as soon as `ready()`; False when the process had ended by itself before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if ready():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    process.kill()
    pytest.fail("the command did not come to the point where it was to be killed")


def started_fit(data: Path, schema: Path, out: Path) -> subprocess.Popen:
    arguments = fit_arguments(data, schema, out, epsilon=EPSILON, delta=DELTA)
    arguments[arguments.index("--steps") + 1] = STEPS
    return start(*arguments)


def resume_arguments(data: Path, schema: Path, out: Path) -> list[object]:
    arguments = fit_arguments(data, schema, out, "--resume", epsilon=EPSILON, delta=DELTA)
    arguments[arguments.index("--steps") + 1] = STEPS
    return arguments


@pytest.mark.parametrize("lines", [1, 3, 5])
def test_a_killed_fit_resumes_to_the_same_steps_within_the_budget(tmp_path, lines):
    """Killed after the ledger has so many lines. What was leased stays charged; the end is at the planned
    step."""
    data, schema = write_tiny(tmp_path)
    before = snapshot([data, schema])
    out = tmp_path / "run"

    def ready() -> bool:
        found = list(tmp_path.rglob("ledger*.json*"))
        return bool(found) and found[0].read_bytes().count(b"\n") >= lines

    process = started_fit(data, schema, out)
    if not kill_when(process, ready):
        pytest.fail("the fit ended before it could be killed: " + process.stderr.read()[-2000:])
    process.stderr.close()
    spent_before = charged(out)[0]
    outcome = run(*resume_arguments(data, schema, out))
    assert outcome.code == 0, outcome.stderr[-3000:]
    spent, steps = charged(out)
    assert spent_before <= spent <= EPSILON
    assert steps >= STEPS, "the run ends at its planned number of steps, and all of them are charged"
    assert snapshot([data, schema]) == before
    cohort = tmp_path / "c.csv"
    assert run("sample", out, "--rows", 40, "--out", cohort).code == 0
    assert len(cohort.read_text().splitlines()) == 41


def test_a_fit_killed_again_and_again_never_under_reports(tmp_path):
    """Three kills at odd moments: epsilon never falls, key ids never repeat, the budget is never passed."""
    data, schema = write_tiny(tmp_path)
    out = tmp_path / "run"
    process = started_fit(data, schema, out)
    spent = 0.0
    for delay in (0.4, 0.9, 1.7):
        seen = time.monotonic()

        def ready(since: float = seen, wait: float = delay) -> bool:
            return bool(list(tmp_path.rglob("ledger*.json*"))) and time.monotonic() - since > 3 + wait

        ended = not kill_when(process, ready)
        process.stderr.close()
        now = charged(out)[0]
        assert spent <= now <= EPSILON
        spent = now
        if ended:
            break
        process = start(*resume_arguments(data, schema, out))
    process.wait(timeout=300)
    process.stderr.close()
    assert spent <= charged(out)[0] <= EPSILON
    [path] = list(out.rglob("ledger*.json*"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [line["key_id"] for line in lines if "key_id" in line]
    changes = [k for i, k in enumerate(keys) if i == 0 or k != keys[i - 1]]
    assert len(changes) == len(set(changes)), "a key came back after another: its noise stream was used twice"


def test_resume_refuses_other_settings_and_other_records(tmp_path):
    """What was calibrated for one plan is not spent on another."""
    data, schema = write_tiny(tmp_path)
    out = tmp_path / "run"
    process = started_fit(data, schema, out)
    assert kill_when(process, lambda: bool(list(tmp_path.rglob("ledger*.json*"))))
    process.stderr.close()
    arguments = resume_arguments(data, schema, out)
    arguments[arguments.index("--epsilon") + 1] = 9
    assert_one_line_error(run(*arguments), "epsilon")
    arguments = resume_arguments(data, schema, out)
    arguments[arguments.index("--generator") + 1] = "gan"
    assert_one_line_error(run(*arguments), "generator")


def test_resume_of_a_finished_run_changes_no_budget(tmp_path, finished_run):
    """Either nothing to do or a clear line; never more spend."""
    spent = charged(finished_run)
    folder = finished_run.parent
    outcome = run(*fit_arguments(folder / "data.csv", folder / "schema.toml", finished_run, "--resume"))
    assert outcome.code in (0, 2) and "Traceback" not in outcome.stderr
    assert charged(finished_run) == spent


def test_the_ledger_command_agrees_with_the_ledger(finished_run):
    report = ledger_report(finished_run)
    assert report["epsilon"] == pytest.approx(charged(finished_run)[0], rel=1e-9)
    assert report["epsilon"] <= 3.0


# a killed sampling


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_killed_sampling_resumes_to_the_full_cohort(tmp_path, finished_run, suffix):
    """The number of rows is the asked one, and the rows are those of an uninterrupted run with the same
    seed."""
    cohort, whole = tmp_path / f"cohort.{suffix}", tmp_path / f"whole.{suffix}"
    arguments = ["sample", finished_run, "--rows", 60_000, "--seed", 5]
    process = start(*arguments, "--out", cohort)
    parts = tmp_path / f"cohort.{suffix}.parts"
    if not kill_when(process, lambda: parts.exists() and any(parts.iterdir())):
        pytest.fail("sampling ended before it could be killed: " + process.stderr.read()[-2000:])
    process.stderr.close()
    assert not cohort.exists()
    outcome = run(*arguments, "--out", cohort, "--resume")
    assert outcome.code == 0, outcome.stderr[-2000:]
    assert run(*arguments, "--out", whole).code == 0
    assert read(cohort).equals(read(whole))
    assert read(cohort).num_rows == 60_000
    assert not parts.exists()


def read(path: Path) -> pa.Table:
    return pacsv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)


def test_a_broken_pipe_is_no_traceback(finished_run):
    """`synthward ledger RUN | head -1`."""
    process = subprocess.Popen(
        command("ledger", finished_run, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in errors, errors[-2000:]
