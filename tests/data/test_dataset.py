"""Cohorts in parts: the same bytes by any number of writers, whole or absent, resumed after any kill."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.data import DatasetWriter, Layout, check_dataset, to_arrow
from synthward.data.manifest import MANIFEST_FILE, STATE_FILE, read_manifest
from synthward.engine.errors import OutputError
from tests.data.parts import FACTS, LAYOUT, SCHEMA, SEED, batches, begin, columns, contents, staging, write


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "cohort"


# what is written


@settings(deadline=None)
@given(rows=st.integers(1, 10**12), chunk=st.integers(1, 1 << 21))
def test_every_row_is_in_one_part(rows, chunk):
    layout = Layout.of(rows, chunk)
    assert layout.rows_per_part % chunk == 0
    assert layout.rows_per_part < (1 << 19) + chunk
    last = layout.parts - 1
    assert layout.first_row(0) == 0 and layout.first_row(last) + layout.rows_of(last) == rows
    assert 1 <= layout.rows_of(last) <= layout.rows_per_part
    assert layout.name(0) <= layout.name(last) and len(layout.name(0)) == len(layout.name(last))


def test_rows_manifest_and_footers(out):
    write(out)
    assert sorted(out.parent.iterdir()) == [out]
    names = [f"part-{part:05d}.parquet" for part in range(5)]
    assert sorted(contents(out)) == [MANIFEST_FILE, *names]
    manifest = read_manifest(out)
    for key, value in FACTS.items():
        assert manifest[key] == value
    assert manifest["rows"] == 430 and manifest["seed"] == {"mode": "given", "value": SEED}
    assert manifest["schema"]["fingerprint"] == SCHEMA.fingerprint()
    assert manifest["schema"]["columns"][1] == {
        "name": "c",
        "kind": "categorical",
        "type": "dictionary<values=string, indices=int32, ordered=0>",
        "nullable": True,
    }
    for number, entry in enumerate(manifest["parts"]):
        file = out / entry["file"]
        assert entry["file"] == names[number] and entry["first_row"] == 100 * number
        assert entry["rows"] == pq.read_metadata(file).num_rows and entry["bytes"] == file.stat().st_size
        footer = pq.read_metadata(file).metadata
        assert footer[b"synthward.run_id"] == b"run-1" and footer[b"synthward.epsilon"] == b"3.0"
        assert pq.read_table(file)["n"].to_pylist() == list(range(100 * number, 100 * number + entry["rows"]))
    assert check_dataset(out) == manifest


@pytest.mark.parametrize("writers", [2, 3, 4, 7])
def test_the_same_bytes_by_any_number_of_writers(tmp_path, writers):
    one, many = write(tmp_path / "one"), write(tmp_path / "many", writers)
    assert contents(one) == contents(many)


def test_a_drawn_seed_is_not_told(out):
    write(out, seed=None)
    assert read_manifest(out)["seed"] == {"mode": "drawn"}
    assert not (out / STATE_FILE).exists()


def test_row_groups_are_not_cut_to_batches(out):
    layout = Layout(140_000, 140_000)
    with begin(out, layout=layout) as writer:
        writer.finish([writer.write(0, (to_arrow(SCHEMA, columns(0, 3500)) for _ in range(40)))])
    found = pq.read_metadata(out / "part-00000.parquet")
    assert [found.row_group(g).num_rows for g in range(found.num_row_groups)] == [65_536, 65_536, 8_928]
    numbers = pq.read_table(out / "part-00000.parquet")["n"].to_numpy()
    assert np.array_equal(numbers, np.tile(np.arange(3500), 40))


def test_misuse_is_refused(out):
    with begin(out) as writer:
        with pytest.raises(ValueError, match="has 100 rows, got 50"):
            writer.write(0, [next(batches(0))])
        with pytest.raises(ValueError, match="columns of the cohort"):
            writer.write(0, [next(batches(0)).select(["n"])])
        with pytest.raises(ValueError, match="5 parts is not finished with 1"):
            writer.finish([writer.write(0, batches(0))])
    assert not [name for name in contents(staging(out)) if name.endswith(".tmp")]


# going on


def test_whole_parts_are_kept_and_others_made(out, tmp_path):
    with begin(out, seed=None) as first, DatasetWriter(out, SCHEMA, first.job) as second:
        seed = first.job.seed
        for writer, part in ((first, 0), (second, 1), (second, 3)):
            writer.write(part, batches(part, seed))
    damaged = staging(out) / "part-00001.parquet"
    damaged.write_bytes(damaged.read_bytes().replace(b"run-1", b"run-2"))
    # As a kill in the middle of a line leaves it.
    [journal, *_] = staging(out).glob("_journal-*")
    journal.write_bytes(journal.read_bytes() + b'{"part": 4, "ro')
    with begin(out, seed=None, resume=True) as writer:
        assert writer.job.present == (0, 1, 3) and writer.job.seed == seed
        assert [writer.verify(part) is not None for part in (0, 1, 3)] == [True, False, True]
    write(out, 3, seed=None, resume=True)
    whole = write(tmp_path / "whole", seed=seed)
    made = contents(out)
    assert made.pop(MANIFEST_FILE) != contents(whole)[MANIFEST_FILE], "here the seed was not given"
    assert made == {name: data for name, data in contents(whole).items() if name != MANIFEST_FILE}
    assert read_manifest(out)["parts"] == read_manifest(whole)["parts"]


def test_a_part_without_a_note_is_not_trusted(out):
    with begin(out) as writer:
        writer.write(0, batches(0))
    for journal in staging(out).glob("_journal-*"):
        journal.unlink()
    with begin(out, resume=True) as writer:
        assert writer.job.present == (0,) and writer.verify(0) is None


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"request": {"rows": 431}},
        {"facts": FACTS | {"run_id": "run-2"}},
        {"layout": Layout(430, 200)},
    ],
)
def test_another_request_is_refused(out, other):
    with begin(out) as writer:
        writer.write(0, batches(0))
    before = contents(staging(out))
    with pytest.raises(OutputError, match="was begun with another run, --rows, --where or --seed"):
        begin(out, resume=True, **other)
    with pytest.raises(OutputError, match="holds an interrupted cohort: give --resume"):
        begin(out, **other)
    after = contents(staging(out))
    assert {k: v for k, v in after.items() if k != "_lock"} == {
        k: v for k, v in before.items() if k != "_lock"
    }
    with begin(out, overwrite=True, **other) as writer:
        assert writer.job.present == ()


def test_nothing_to_go_on_with_is_a_beginning(out):
    write(out, resume=True)
    before = contents(out)
    with begin(out, resume=True) as writer:
        assert writer.job.is_finished
    assert contents(out) == before
    with pytest.raises(OutputError, match="exists already"):
        begin(out)
    with pytest.raises(OutputError, match="exists already"):
        begin(out, resume=True, seed=8)


def test_without_a_whole_part_nothing_stays(out):
    with pytest.raises(KeyboardInterrupt), begin(out):
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []


# replacing


def test_a_replaced_dataset_stays_until_the_new_one_is_whole(out):
    write(out, seed=8)
    before = contents(out)
    with begin(out, overwrite=True) as writer:
        records = [writer.write(part, batches(part)) for part in range(LAYOUT.parts)]
        assert contents(out) == before
        writer.finish(records)
    assert contents(out) != before
    assert check_dataset(out)["seed"]["value"] == SEED
    assert list(out.parent.iterdir()) == [out]


def test_files_of_something_else_are_left_alone(out):
    write(out)
    (out / "thesis.txt").write_text("mine")
    for options in ({"overwrite": True}, {}):
        with pytest.raises(OutputError, match=r"a file of something else, thesis.txt"):
            begin(out, **options)
    assert (out / "thesis.txt").read_text() == "mine" and not staging(out).exists()
    (out / "thesis.txt").unlink()
    staging(out).mkdir()
    (staging(out) / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"a file of something else, thesis.txt"):
        begin(out, overwrite=True)
    assert contents(staging(out)) == {"thesis.txt": b"mine"}


def test_a_file_that_comes_in_the_meantime_is_not_lost(out):
    write(out, seed=8)
    with begin(out, overwrite=True) as writer:
        records = [writer.write(part, batches(part)) for part in range(LAYOUT.parts)]
        (out / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"thesis.txt"):
            writer.finish(records)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    write(out, overwrite=True, resume=True)
    assert check_dataset(out)["seed"]["value"] == SEED and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cohort.xlsx", "or a folder named without a dot"),
        ("..", "or a folder named without a dot"),
        ("none/cohort", "does not exist"),
        ("file", "is a file"),
        ("link", "is a link"),
        ("full", "holds other files"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.parquet").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=message) as caught:
            begin(tmp_path / name, **options)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(out):
    out.mkdir()
    check_dataset(write(out))


# together


def test_nobody_else_begins_while_one_writes(out, monkeypatch):
    monkeypatch.setattr("synthward.data.lock.PATIENCE_SECONDS", 0.2)
    with begin(out) as first:
        first.write(0, batches(0))
        second = DatasetWriter(out, SCHEMA, first.job)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match="another process writes here"):
                begin(out, **options)
    # The one that began has ended, or was killed; another of its command still writes.
    with pytest.raises(OutputError, match="another process writes here"):
        begin(out, overwrite=True)
    second.close()
    with begin(out, resume=True) as writer:
        assert writer.job.present == (0,)


def test_a_killed_process_holds_no_lock(out):
    code = (
        "import os, sys, pickle; from synthward.data import DatasetWriter; "
        "arguments = pickle.load(sys.stdin.buffer); DatasetWriter.begin(*arguments[0], **arguments[1]); "
        "os.kill(os.getpid(), 9)"
    )
    options = {"layout": LAYOUT, "request": {"rows": 430}, "facts": FACTS, "seed": SEED}
    arguments = pickle.dumps(((out, SCHEMA), options))
    done = subprocess.run([sys.executable, "-P", "-c", code], input=arguments, check=False)
    assert done.returncode == -9 and (staging(out) / STATE_FILE).is_file()
    check_dataset(write(out, resume=True))


# kills and full disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_keeps_the_whole_parts(out):
    with begin(out) as writer:
        writer.write(0, batches(0))
        # The kernel itself refuses every byte.
        (staging(out) / f".part-00001.parquet.{writer._token}.tmp").symlink_to("/dev/full")
        with pytest.raises(
            OutputError, match=r"no space left.*1 whole part\(s\) are kept, --resume"
        ) as caught:
            writer.write(1, batches(1))
        assert "\n" not in str(caught.value)
    with begin(out, resume=True) as writer:
        assert writer.job.present == (0,)
    check_dataset(write(out, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_every_point_that_touches_the_disk(tmp_path, replaced):
    """A forked process dies before its 1st, 2nd, 3rd ... such call; then the dataset is resumed to the end."""
    whole = contents(write(tmp_path / "whole"))
    old = contents(write(tmp_path / "old", seed=8))
    point = 0
    while True:
        point += 1
        work = tmp_path / f"kill-{point}"
        work.mkdir()
        path = work / "cohort"
        if replaced:
            write(path, seed=8)
        code = _run_and_die(path, point, overwrite=replaced)
        if code == 0:
            break
        assert code == 99
        if path.exists():
            assert {k: v for k, v in contents(path).items() if k != "_lock"} in (whole, old), (
                "an output that exists is whole"
            )
        write(path, 2, resume=True, overwrite=replaced)
        assert contents(path) == whole
        assert sorted(work.iterdir()) == [path]
    assert point > 40, "the count of disk calls is not what this test thinks"


def _run_and_die(path: Path, point: int, *, overwrite: bool) -> int:
    """Exit status of a child that writes the dataset and dies before its call number `point` on the disk."""
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

            calling = [(os, "fsync")]
            calling += [(Path, name) for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "open")]
            for owner, name in calling:
                setattr(owner, name, dies(getattr(owner, name)))
            write(path, 2, overwrite=overwrite)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
