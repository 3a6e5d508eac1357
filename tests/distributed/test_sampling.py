"""`sample` on several ranks: the same cohort for any number of them, after any kill, and one voice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from synthward.data import Layout, check_dataset
from synthward.run.cohort import CHUNK_ROWS
from tests.commandline import environment, fit_arguments, run
from tests.distributed.launch import PLAIN, run_ranks, started
from tests.tinydata import write_tiny

# Some 40 parts of 250 rows.
CHUNK, ROWS, SEED = 250, 10_000, 5
# How long the others may take to notice that one died.
BOUND = 30.0


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    data, schema = write_tiny(folder)
    outcome = run(*fit_arguments(data, schema, folder / "run", "--set", "hidden=8", "--set", "blocks=1"))
    assert outcome.code == 0, outcome.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def whole(finished_run, tmp_path_factory) -> dict[str, bytes]:
    """The cohort of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "cohort"
    assert say(words(finished_run, out))[0] == 0
    return contents(out)


def words(run_folder: Path, out: Path, *more: object) -> list[str]:
    arguments = ["sample", run_folder, "--rows", ROWS, "--seed", SEED, "--out", out, *more]
    return [str(word) for word in arguments]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# what the ranks run


def say(arguments: list[str]) -> tuple[int, str, str]:
    """The command in this process, with small chunks: exit code and both streams."""
    from synthward.cli import main

    out, err = io.StringIO(), io.StringIO()
    with small_chunks(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return main(arguments), out.getvalue(), err.getvalue()


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    from synthward.run import cohort, sampling

    before = cohort.CHUNK_ROWS
    cohort.CHUNK_ROWS = sampling.CHUNK_ROWS = CHUNK
    try:
        yield
    finally:
        cohort.CHUNK_ROWS = sampling.CHUNK_ROWS = before


def say_each(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    return [say(arguments) for arguments in commands]


def die_at(arguments: list[str], victim: int, point: int) -> int:
    """The command in this process; the victim is killed by its ``point``-th call that touches the disk."""
    from synthward.cli import main

    if int(os.environ["RANK"]) == victim:
        calls = 0

        def dies(function: Any) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **named)

            return call

        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "unlink")):
            setattr(owner, name, dies(getattr(owner, name)))
    with small_chunks():
        code = main(arguments)
    if code:
        sys.exit(code)
    return code


def fill_disk(arguments: list[str], victim: int) -> tuple[int, str, str]:
    """The command in this process; the victim's disk is full after two parts."""
    import torch.distributed as dist

    from synthward.data.disk import ParquetOutput

    close, closed = ParquetOutput.close, 0

    def refuse(self: ParquetOutput) -> None:
        nonlocal closed
        closed += 1
        if closed > 2:
            raise OSError(28, "No space left on device")
        close(self)

    if dist.get_rank() == victim:
        ParquetOutput.close = refuse  # type: ignore[method-assign]
    return say(arguments)


# the same cohort


def torchrun(ranks: int, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user starts it, on a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return subprocess.run(
        [str(word) for word in [*command, "-m", "synthward", *arguments]],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment(), **PLAIN, "TORCHELASTIC_USE_AGENT_STORE": ""},
        cwd=folder,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_makes_the_same_cohort_by_any_number_of_ranks(tmp_path, finished_run):
    asked = ["sample", finished_run, "--rows", 20_000, "--seed", SEED, "--json"]
    file = tmp_path / "cohort.parquet"
    assert run(*asked, "--out", file).code == 0
    assert run(*asked, "--out", tmp_path / "one").code == 0
    for ranks, name in ((2, "two"), (4, "four")):
        done = torchrun(ranks, tmp_path, *asked, "--out", name)
        assert done.returncode == 0, done.stderr[-3000:]
        [line] = done.stdout.splitlines()
        result = json.loads(line)
        assert (result["rows"], result["parts"]) == (20_000, Layout.of(20_000, CHUNK_ROWS).parts)
        assert done.stderr.count("20,000/20,000 (100%)") in (1, 2), "one rank shows progress"
        assert contents(tmp_path / name) == contents(tmp_path / "one")
    found = pads.dataset(tmp_path / "two").to_table()
    assert found.equals(pq.read_table(file).replace_schema_metadata(found.schema.metadata))
    info = json.loads((finished_run / "run.json").read_text())
    manifest = check_dataset(tmp_path / "two")
    for key in ("run_id", "epsilon", "delta", "unit", "private"):
        assert manifest[key] == info[key]
    # A single file has one writer.
    done = torchrun(2, tmp_path, *asked, "--out", "cohort.csv")
    assert done.returncode != 0 and not (tmp_path / "cohort.csv").exists()
    assert done.stderr.count("synthward: error: cohort.csv: a file is written by one process") == 1


# one voice


def test_a_mistake_in_the_options_is_told_once(tmp_path):
    first, second = run_ranks(2, say, ["sample", str(tmp_path), "--rows", "many", "--out", "x"], join=False)
    assert first[0] == second[0] == 2 and second[1:] == ("", "")
    assert first[2].count("synthward: error:") == 1 and "'--rows'" in first[2]


@pytest.mark.slow
def test_an_interruption_is_told_once_and_gone_on_with(tmp_path, finished_run, whole):
    out = tmp_path / "cohort"
    with started(2, die_at, words(finished_run, out), -1, 0, join=False) as group:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("cohort.parts/part-*"))) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        for process in group.processes:
            process.send_signal(signal.SIGINT)
        assert group.wait(BOUND) == [130, 130], (group.stderr(0), group.stderr(1))
        assert group.stderr(0).count("interrupted") == 1 and "--resume goes on" in group.stderr(0)
        assert group.stderr(1) == ""
    assert say(words(finished_run, out, "--resume"))[0] == 0
    assert contents(out) == whole


def test_what_is_wrong_is_told_once_and_nothing_is_lost(tmp_path, finished_run, whole):
    out, file, full = tmp_path / "cohort", tmp_path / "file", tmp_path / "full"
    file.write_text("mine")
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    asked = words(finished_run, out)
    refused = {
        "--rows: got 0": [*asked, "--rows", "0"],
        "is a file: name a folder": [*asked, "--out", str(file)],
        "a folder that holds other files": [*asked, "--out", str(full), "--overwrite"],
        "a folder named without a dot": [*asked, "--out", str(tmp_path / "cohort.xlsx")],
        "a file is written by one process: name a folder (--out": [*asked, "--out", str(out) + ".parquet"],
        "no run here": [*asked[:1], str(tmp_path), *asked[2:]],
        "error: --where: ": [*asked, "--where", "first > 58 and last < 3"],
        "--where: is empty": [*asked, "--where", " "],
    }
    good = [asked, asked, [*asked, "--resume"], [*asked, "--overwrite", "--seed", "6"]]
    first, second = run_ranks(2, say_each, [*refused.values(), *good])
    for number, message in enumerate(refused):
        code, stdout, stderr = first[number]
        [line] = [said for said in stderr.splitlines() if "error" in said]
        assert (code, stdout) == (2, "") and message in line, (message, first[number])
        assert second[number] == (2, "", "")
    assert [code for code, _, _ in first[len(refused) :]] == [0, 2, 0, 0]
    assert "exists already: give another folder or --overwrite" in first[len(refused) + 1][2]
    assert all((stdout, stderr) == ("", "") for _, stdout, stderr in second)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cohort", "file", "full"]
    assert file.read_text() == "mine" and contents(full) == {"thesis.txt": b"mine"}
    assert contents(out).keys() == whole.keys() and contents(out) != whole


def test_a_full_disk_of_one_rank_ends_all_and_is_told_by_rank_0(tmp_path, finished_run, whole):
    out = tmp_path / "cohort"
    first, second = run_ranks(2, fill_disk, words(finished_run, out), 1)
    assert first[0] == second[0] == 2 and second[1:] == ("", "")
    assert "no space left on the disk" in first[2] and "--resume" in first[2]
    kept = len(list((tmp_path / "cohort.parts").glob("part-*.parquet")))
    assert kept == 5 and not out.exists(), "the other rank finished its part of the round"
    assert say(words(finished_run, out, "--resume"))[0] == 0
    assert contents(out) == whole


# kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_anywhere_and_resumed_by_another_number_of_ranks(tmp_path, finished_run, whole, seed):
    """A rank is killed at a random point; the others end soon, in one line; the rest is made by 1 or 3 ranks."""
    chosen = random.Random(seed)
    ranks, victim = (2, chosen.randrange(2)) if seed % 2 else (4, chosen.randrange(4))
    calls = 4 * ROWS // CHUNK // ranks + (8 if victim == 0 else 0)
    out = tmp_path / "cohort"
    asked = words(finished_run, out)
    point = chosen.randrange(1, calls)
    with started(ranks, die_at, asked, victim, point, join=False) as group:
        end = time.monotonic() + 120
        while group.statuses()[victim] is None and time.monotonic() < end:
            time.sleep(0.02)
        assert group.statuses()[victim] == -signal.SIGKILL, group.stderr(victim)[-2000:]
        codes = group.wait(BOUND)
        others = [rank for rank in range(ranks) if rank != victim]
        assert all(codes[rank] == 2 for rank in others), (codes, [group.stderr(r)[-500:] for r in others])
        said = [line for rank in others for line in group.stderr(rank).splitlines() if "error" in line]
    assert len(said) == 1 and "another process stopped" in said[0] and "--resume" in said[0], said
    assert not out.exists() or contents(out) == whole
    if seed % 4 < 2:
        assert say([*asked, "--resume"])[0] == 0
    else:
        assert [code for code, _, _ in run_ranks(3, say, [*asked, "--resume"])] == [0, 0, 0]
    assert contents(out) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cohort"]
    check_dataset(out)


@pytest.mark.slow
def test_all_killed_at_once_then_one_process_goes_on(tmp_path, finished_run, whole):
    """As a machine that loses its power; whole parts are kept as they are."""
    out = tmp_path / "cohort"
    with started(2, say, words(finished_run, out), join=False) as group:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("cohort.parts/part-*"))) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        for rank in range(2):
            group.kill(rank)
        group.wait(10)
    assert not out.exists()
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cohort.parts").glob("part-*")}
    assert say(words(finished_run, out, "--resume"))[0] == 0
    assert contents(out) == whole
    assert len(kept) >= 5 and all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
