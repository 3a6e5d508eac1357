"""Cohorts on disk: whole or absent, resumed after any kill, one clear line when the disk refuses."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from synthward.data import CohortWriter, to_arrow
from synthward.engine.errors import OutputError
from synthward.schema.load import parse_schema

SCHEMA_TEXT = """
version = 1
name = "tiny"
[columns.n]
kind = "integer"
min = 0
max = 100000
[columns.c]
kind = "categorical"
categories = ["a", "b", "c"]
missing = true
"""
SCHEMA = parse_schema(SCHEMA_TEXT)
BATCH = 100


def batch(number, rows=BATCH):
    """Batch `number` of the cohort, a function of its number alone."""
    first = number * BATCH
    values = np.arange(first, first + rows)
    return to_arrow(SCHEMA, {"n": values.astype(np.float64), "c": values % 4 - 1})


def read(path):
    return pa_csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)


def begin(path, batches=5, **options):
    """An interrupted output with `batches` batches, two to a part."""
    writer = CohortWriter(path, SCHEMA, **{"run_id": "run", "rows_per_part": 2 * BATCH} | options)
    for number in range(batches):
        writer.write(batch(number))
    writer.abort()


@pytest.fixture(params=["cohort.parquet", "cohort.csv"])
def out(request, tmp_path):
    return tmp_path / request.param


def parts(path):
    return path.with_name(path.name + ".parts")


def test_rows_and_order(out):
    with CohortWriter(out, SCHEMA, run_id="run", rows_per_part=250) as writer:
        for number in range(7):
            writer.write(batch(number))
        assert writer.rows_done == 700
        assert not out.exists()
    assert read(out)["n"].to_pylist() == list(range(700))
    assert sorted(out.parent.iterdir()) == [out]


def test_metadata_in_the_footer(tmp_path):
    out = tmp_path / "cohort.parquet"
    writer = CohortWriter(out, SCHEMA, run_id="run")
    writer.write(batch(0))
    writer.close({"run_id": "7", "epsilon": "3.0"})
    metadata = pq.read_metadata(out).metadata
    assert metadata[b"synthward.run_id"] == b"7"
    assert metadata[b"synthward.epsilon"] == b"3.0"
    assert pq.read_schema(out).names == ["n", "c"]


def test_no_rows_is_a_table_without_rows(out):
    CohortWriter(out, SCHEMA, run_id="run").close()
    table = read(out)
    assert (table.num_rows, table.column_names) == (0, ["n", "c"])


def test_row_groups_stay_bounded(tmp_path):
    """Memory is bounded by what is held at once: one row group."""
    out = tmp_path / "cohort.parquet"
    rows = np.zeros(300_000)
    with CohortWriter(out, SCHEMA, run_id="run") as writer:
        writer.write(to_arrow(SCHEMA, {"n": rows, "c": rows.astype(np.int32)}))
    file = pq.read_metadata(out)
    assert file.num_rows == 300_000
    assert max(file.row_group(index).num_rows for index in range(file.num_row_groups)) <= 65_536


def test_resume_continues_after_the_last_whole_part(out):
    begin(out, batches=5)
    assert not out.exists()
    with CohortWriter(out, SCHEMA, run_id="run", resume=True, rows_per_part=2 * BATCH) as writer:
        assert writer.rows_done == 4 * BATCH
        for number in range(4, 9):
            writer.write(batch(number))
    assert read(out)["n"].to_pylist() == list(range(900))
    assert not parts(out).exists()


def test_resume_with_nothing_there_starts(out):
    with CohortWriter(out, SCHEMA, run_id="run", resume=True) as writer:
        assert writer.rows_done == 0
        writer.write(batch(0))
    assert read(out).num_rows == BATCH


def test_without_a_whole_part_nothing_stays(out):
    begin(out, batches=1)
    assert list(out.parent.iterdir()) == []


def test_an_existing_output_is_safe(out):
    out.write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
            CohortWriter(out, SCHEMA, run_id="run", resume=resume)
    writer = CohortWriter(out, SCHEMA, run_id="run", overwrite=True)
    writer.write(batch(0))
    assert out.read_text() == "mine"
    writer.abort()
    assert out.read_text() == "mine"
    with CohortWriter(out, SCHEMA, run_id="run", overwrite=True) as writer:
        writer.write(batch(0))
    assert read(out).num_rows == BATCH


def test_an_interrupted_output_is_not_lost_by_accident(out):
    begin(out)
    with pytest.raises(OutputError, match=r"interrupted output.*--resume"):
        CohortWriter(out, SCHEMA, run_id="run")
    with CohortWriter(out, SCHEMA, run_id="run", overwrite=True) as writer:
        assert writer.rows_done == 0
        writer.write(batch(0))
    assert read(out).num_rows == BATCH


def test_another_run_or_schema_is_not_continued(out):
    begin(out)
    other = parse_schema(SCHEMA_TEXT.replace("100000", "99999"))
    for schema, run_id in ((SCHEMA, "other"), (other, "run")):
        with pytest.raises(OutputError, match="begun by another run"):
            CohortWriter(out, schema, run_id=run_id, resume=True)
    assert CohortWriter(out, SCHEMA, run_id="run", resume=True).rows_done == 4 * BATCH


def test_damaged_and_lost_parts_are_named(out):
    begin(out, batches=7)
    part = parts(out) / "part-00001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-20])
    with pytest.raises(OutputError, match="is damaged"):
        CohortWriter(out, SCHEMA, run_id="run", resume=True)
    part.unlink()
    with pytest.raises(OutputError, match="part 1 is gone"):
        CohortWriter(out, SCHEMA, run_id="run", resume=True)
    part.write_bytes(content)
    state = parts(out) / "state.json"
    state.write_text("{")
    with pytest.raises(OutputError, match=r"state\.json cannot be read"):
        CohortWriter(out, SCHEMA, run_id="run", resume=True)


def test_foreign_files_are_never_removed(out):
    parts(out).mkdir()
    (parts(out) / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="files of something else"):
        CohortWriter(out, SCHEMA, run_id="run", overwrite=True)
    assert (parts(out) / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cohort.xlsx", "as .parquet or .csv"),
        ("none/cohort.csv", "does not exist"),
        ("folder.csv", "is a folder"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OutputError, match=message):
        CohortWriter(tmp_path / name, SCHEMA, run_id="run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv"]


def test_misuse_is_refused(out):
    writer = CohortWriter(out, SCHEMA, run_id="run")
    with pytest.raises(ValueError, match="columns of the cohort"):
        writer.write(batch(0).select(["n"]))
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(batch(0))
    with pytest.raises(ValueError, match="closed"):
        writer.close()


def test_an_exception_keeps_the_whole_parts(out):
    with (
        pytest.raises(KeyboardInterrupt),
        CohortWriter(out, SCHEMA, run_id="run", rows_per_part=BATCH) as writer,
    ):
        writer.write(batch(0))
        writer.write(batch(1))
        raise KeyboardInterrupt
    assert not out.exists()
    assert CohortWriter(out, SCHEMA, run_id="run", resume=True).rows_done == 2 * BATCH


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_full_disk_while_a_part_is_written(out):
    writer = CohortWriter(out, SCHEMA, run_id="run", rows_per_part=2 * BATCH)
    writer.write(batch(0))
    writer.write(batch(1))
    # The kernel itself refuses every byte: the next part's temporary file is the device that is always full.
    (parts(out) / "part-00001.parquet.tmp").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"no space left.*1 whole part\(s\) are kept, --resume") as caught:
        for number in range(2, 4):
            writer.write(batch(number))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in parts(out).iterdir()) == ["part-00000.parquet", "state.json"]
    with CohortWriter(out, SCHEMA, run_id="run", resume=True) as writer:
        for number in range(writer.rows_done // BATCH, 4):
            writer.write(batch(number))
    assert read(out)["n"].to_pylist() == list(range(400))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_full_disk_while_merging(out):
    out.write_text("mine")
    writer = CohortWriter(out, SCHEMA, run_id="run", overwrite=True, rows_per_part=BATCH)
    writer.write(batch(0))
    out.with_name(f".{out.name}.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="no space left"):
        writer.close()
    assert out.read_text() == "mine"
    assert not out.with_name(f".{out.name}.partial").is_symlink()
    with CohortWriter(out, SCHEMA, run_id="run", resume=True, overwrite=True) as writer:
        assert writer.rows_done == BATCH
    assert read(out).num_rows == BATCH


def test_killed_at_every_point_that_touches_the_disk(out, tmp_path):
    """A forked process dies before its 1st, 2nd, 3rd ... such call; then the output is resumed to the end."""
    point = 0
    while True:
        point += 1
        work = tmp_path / f"kill-{point}"
        work.mkdir()
        path = work / out.name
        code = _run_and_die(path, point)
        if code == 0:
            break
        assert code == 99
        complete = path.exists()
        if complete:
            assert read(path)["n"].to_pylist() == list(range(500)), "an output that exists is whole"
        if complete and not (parts(path) / "state.json").exists():
            # Nothing is left to resume; what remains of the parts' folder goes with the next output.
            continue
        with CohortWriter(path, SCHEMA, run_id="run", resume=True, rows_per_part=2 * BATCH) as writer:
            assert writer.rows_done % BATCH == 0
            for number in range(writer.rows_done // BATCH, 5):
                writer.write(batch(number))
        assert read(path)["n"].to_pylist() == list(range(500))
        assert sorted(work.iterdir()) == [path]
    assert point > 15, "the count of disk calls is not what this test thinks"


def _run_and_die(path: Path, point: int) -> int:
    """Exit status of a child that writes five batches and dies before its call number `point` on the disk."""
    with warnings.catch_warnings():
        # Python warns of forking beside Arrow's idle threads; the child reads and writes on its one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            calls = 0

            def dies(function):
                def call(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == point:
                        os._exit(99)
                    return function(*args, **kwargs)

                return call

            for owner, name in (
                (os, "fsync"),
                (Path, "replace"),
                (Path, "unlink"),
                (Path, "mkdir"),
                (Path, "rmdir"),
            ):
                setattr(owner, name, dies(getattr(owner, name)))
            writer = CohortWriter(path, SCHEMA, run_id="run", rows_per_part=2 * BATCH)
            for number in range(5):
                writer.write(batch(number))
            writer.close()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
