"""``--device``: told in one line, refused in one line, and no matter of what a command gives."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from tests.commandline import assert_one_line_error, fit_arguments, run
from tests.tinydata import write_tiny


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    return (folder, *write_tiny(folder))


@pytest.fixture(scope="module")
def fitted(place):
    folder, data, schema = place
    outcome = run(*fit_arguments(data, schema, folder / "run"), "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.stderr
    return folder / "run", outcome


def test_a_fit_says_where_it_trains_and_notes_it(fitted):
    folder, outcome = fitted
    assert outcome.stderr.splitlines().count("device: cpu") == 1, outcome.stderr
    assert isinstance(json.loads(outcome.stdout), dict)
    assert json.loads((folder / "run.json").read_text())["device"] == "cpu"
    begun = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert begun["event"] == "started" and begun["device"] == "cpu"


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_where_rows_are_drawn_is_said_and_changes_none(fitted, tmp_path, suffix):
    folder, _ = fitted
    cohorts = []
    for device in ("cpu", "auto"):
        out = tmp_path / f"{device}{suffix}"
        outcome = run("sample", folder, "--rows", 50, "--seed", 1, "--out", out, "--device", device)
        assert outcome.code == 0 and outcome.stderr.splitlines().count("device: cpu") == 1, outcome.stderr
        cohorts.append(pq.read_table(out if suffix else out / "part-00000.parquet"))
    assert cohorts[0].equals(cohorts[1])


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "tpu"])
def test_a_fit_without_the_device_leaves_nothing(place, tmp_path, device):
    _, data, schema = place
    outcome = run(*fit_arguments(data, schema, tmp_path / "run"), "--device", device)
    assert_one_line_error(outcome, "device", device)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["cohort.parquet", "cohort"])
def test_a_cohort_without_the_device_leaves_nothing(fitted, tmp_path, out):
    folder, _ = fitted
    outcome = run("sample", folder, "--rows", 50, "--out", tmp_path / out, "--device", "cuda")
    assert_one_line_error(outcome, "device", "cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tune", "cohort"])
def test_other_commands_that_train_refuse_it_too(place, tmp_path, name):
    _, data, schema = place
    words = [
        "--schema",
        schema,
        "--epsilon",
        3,
        "--delta",
        1e-5,
        "--out",
        tmp_path / "out",
        "--device",
        "cuda:9",
    ]
    given = [data, "--set", "hidden=8,16"] if name == "tune" else ["--data", data]
    assert_one_line_error(run(name, *given, *words), "device", "cuda:9")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
