"""A cohort in parts on the command line: sampled, evaluated, signed and checked as one in a file is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from synthward.cli import main
from synthward.data import check_dataset
from tests.commandline import Outcome, assert_one_line_error
from tests.tinydata import SCHEMA, table, write_csv

ROWS = 10_000


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`synthward ...` in this process."""

    def invoke(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return invoke


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of ten steps, its cohort in parts and in a file, and a key."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "schema.toml").write_text(SCHEMA)
    data = write_csv(folder / "data.csv", table(120))
    fit = ["fit", data, "--schema", folder / "schema.toml", "--epsilon", 3, "--delta", 1e-5]
    fit += ["--out", folder / "run", "--steps", 10, "--accountant", "rdp"]
    sample = ["sample", folder / "run", "--rows", ROWS, "--seed", 3, "--out"]
    small = ["--set", "hidden=8", "--set", "blocks=1"]
    for words in ([*fit, *small], [*sample, folder / "cohort"], [*sample, folder / "cohort.parquet"]):
        assert main([str(w) for w in words]) == 0
    assert main(["sign", "--new-key", str(folder / "key.pem")]) == 0
    return folder


@pytest.fixture
def place(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_the_same_rows_in_parts_as_in_a_file(finished):
    parts = pads.dataset(finished / "cohort").to_table()
    file = pq.read_table(finished / "cohort.parquet")
    assert parts.num_rows == ROWS and parts.equals(file)
    footer = pq.read_metadata(finished / "cohort" / "part-00000.parquet").metadata
    of_file = pq.read_metadata(finished / "cohort.parquet").metadata
    for key in (b"run_id", b"generator", b"epsilon", b"delta", b"unit", b"private"):
        assert footer[b"synthward." + key] == of_file[b"synthward." + key]


def test_the_manifest_says_where_the_rows_come_from(finished):
    manifest = check_dataset(finished / "cohort")
    info = json.loads((finished / "run" / "run.json").read_text())
    assert {key: manifest[key] for key in ("run_id", "epsilon", "delta", "unit", "private")} == {
        key: info[key] for key in ("run_id", "epsilon", "delta", "unit", "private")
    }
    assert manifest["private"] is True and manifest["seed"] == {"mode": "given", "value": 3}
    assert manifest["request"]["where"] is None


def test_a_seeded_run_is_marked_in_its_cohort(call, place):
    fit = ["fit", place / "data.csv", "--schema", place / "schema.toml", "--epsilon", 3, "--delta", 1e-5]
    more = ["--steps", 3, "--accountant", "rdp", "--set", "hidden=8", "--set", "blocks=1", "--seed", 1]
    assert call(*fit, "--out", place / "seeded", *more).code == 0
    assert call("sample", place / "seeded", "--rows", 9, "--out", place / "marked").code == 0
    manifest = check_dataset(place / "marked")
    assert manifest["private"] is False and manifest["seed"] == {"mode": "drawn"}


def test_a_dataset_is_evaluated(call, place):
    evaluate = ["evaluate", place / "run", "--real", place / "data.csv", "--json", "--out"]
    summaries = []
    for name in ("cohort", "cohort.parquet"):
        outcome = call(*evaluate, place / f"{name}.html", "--synthetic", place / name)
        assert outcome.code == 0, outcome.stderr
        summaries.append(json.loads(outcome.stdout)["summary"])
    (place / "cohort").rename(place / "run" / "cohort")
    outcome = call(*evaluate, place / "own.html")
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["summary"] == summaries[0] == summaries[1]
    next((place / "run" / "cohort").glob("part-*")).unlink()
    assert_one_line_error(call(*evaluate, place / "no.html"), "is missing; the manifest")


def test_a_dataset_is_signed_by_its_manifest(call, place):
    sign = ["sign", place / "run", "--key", place / "key.pem", "--cohort", place / "cohort"]
    verify = ["verify", place / "run", "--key", place / "key.pub.pem"]
    assert call(*sign).code == 0
    outcome = call(*verify, "--json")
    assert outcome.code == 0 and "cohort" in json.loads(outcome.stdout)["files"], outcome.stderr
    part = place / "cohort" / "part-00001.parquet"
    good = part.read_bytes()
    part.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    assert_one_line_error(call(*verify), "part-00001.parquet", "is not what the manifest names")
    assert_one_line_error(call(*sign), "part-00001.parquet", "is not what the manifest names")
    part.write_bytes(good)
    assert call(*verify).code == 0
    shutil.copy(part, place / "cohort" / "part-00099.parquet")
    assert_one_line_error(call(*verify), "part-00099.parquet", "not named by the manifest")
    (place / "cohort" / "part-00099.parquet").unlink()
    manifest = place / "cohort" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"private": true', '"private": 1'))
    assert_one_line_error(call(*verify), "not the file that was signed")
    moved = (place / "cohort").rename(place / "run" / "moved")
    assert_one_line_error(call(*verify), "cohort", "say where it lies")
    assert_one_line_error(call(*verify, "--cohort", moved), "moved", "is not named by")


def test_options_that_make_no_cohort_are_one_line(call, place):
    sample = ["sample", place / "run", "--rows", 50]
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("mine")
    before = sorted(place.rglob("*"))
    for words, message in (
        (["--rows", 0, "--out", place / "new"], "--rows: got 0"),
        (["--out", place / "cohort"], "exists already: give another folder or --overwrite"),
        (["--out", place / "cohort", "--resume"], "exists already"),
        (["--out", place / "notes", "--overwrite"], "holds other files"),
        (["--out", place / "key.pem"], "a folder named without a dot"),
        (["--out", place / "nosuch" / "new"], "does not exist"),
        (["--out", place / "run"], "holds other files"),
        (["--out", place / "new", "--where", "age > 200"], "age"),
    ):
        assert_one_line_error(call(*sample, *words), message)
    assert sorted(place.rglob("*")) == before
    assert call(*sample, "--out", place / "cohort", "--overwrite").code == 0
    assert check_dataset(place / "cohort")["rows"] == 50
    again = call("sample", place / "run", "--rows", 50, "--out", place / "cohort", "--resume", "--json")
    assert again.code == 0 and json.loads(again.stdout)["rows"] == 50
