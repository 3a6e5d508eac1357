"""A fit and its log: on several ranks, over a kill, on a full disk, and without TensorBoard."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from synthward.cli import main
from synthward.observe import LOG_FILE
from synthward.progress import LineProgress
from synthward.run import FitOptions, fit_run
from synthward.run import training as training_module
from synthward.run.training import Training
from synthward.schema import load_schema
from tests.distributed.launch import run_ranks
from tests.observe.lines import lines
from tests.observe.test_scalars import read
from tests.tinydata import SCHEMA, table, write_csv

STEPS = 12


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "LEASE_STEPS", 4)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    write_csv(tmp_path / "data.csv", table(40))
    return tmp_path


def fit(place, *, resume=False, **more):
    options = FitOptions(
        accountant="rdp",
        steps=STEPS,
        sample_rate=0.2,
        settings={"hidden": 8, "blocks": 1},
        tensorboard=place / "events",
    )
    return fit_run(
        place / "data.csv",
        load_schema(place / "schema.toml"),
        epsilon=3.0,
        delta=1e-5,
        out=place / "run",
        options=options,
        resume=resume,
        **more,
    )


def arguments(place, *more) -> list[str]:
    words = ["fit", place / "data.csv", "--schema", place / "schema.toml", "--out", place / "run"]
    words += ["--epsilon", 3, "--delta", 1e-5, "--steps", STEPS, "--accountant", "rdp", "--set", "hidden=8"]
    return [str(word) for word in (*words, "--tensorboard", place / "events", *more)]


def test_a_run_that_was_killed_goes_on_in_its_log(place, monkeypatch):
    """What it told before stays, a line that the kill tore included."""
    original, calls = Training._step, [0]

    def dying(self, step):
        calls[0] += 1
        if calls[0] == 6:
            raise Killed
        original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", dying)
        # A process that is killed tells nothing.
        patch.setattr("synthward.observe.TrainingObserver.failed", lambda self, error: None)
        with pytest.raises(Killed):
            fit(place)
    before = (place / "run" / LOG_FILE).read_bytes()
    (place / "run" / LOG_FILE).write_bytes(before[:-7])
    fit(place, resume=True)
    after = (place / "run" / LOG_FILE).read_bytes()
    assert after.startswith(before[:-7] + b"\n{")
    found = [json.loads(line) for line in after[len(before) - 6 :].splitlines()]
    events = ["resumed", "leased", "progress", "checkpointed", "finished"]
    assert [line["event"] for line in found] == events
    assert (found[0]["step"], found[1]["first"], found[2]["step"]) == (8, 8, STEPS)
    assert found[2]["epsilon"] == pytest.approx(found[-1]["epsilon"])
    assert [step for step, _ in read(place / "events")["privacy/epsilon"]] == [STEPS]


def test_an_error_ends_the_log_and_is_raised(place, monkeypatch):
    monkeypatch.setattr(Training, "_checkpoint", lambda self, step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(place)
    assert lines(place / "run")[-1] == {"event": "stopped", "error": "ZeroDivisionError", "message": None}


def test_a_full_disk_takes_the_log_and_not_the_run(place, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    for module in ("log", "scalars"):
        monkeypatch.setattr(f"synthward.observe.{module}.write_all", full)
    folder = fit(place, progress=LineProgress())
    assert folder.info["status"] == "complete"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert (
        len(told) == 2 and LOG_FILE in told[0] + told[1] and all("goes on without" in line for line in told)
    )


def test_a_missing_package_is_told_before_records_are_read(place, monkeypatch, capsys, no_tensorboard):
    monkeypatch.setattr("synthward.run.fit.read_records", pytest.fail)
    assert main(arguments(place)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'synthward[tensorboard]'" in error
    assert not (place / "run").exists() and not (place / "events").exists()


@pytest.mark.slow
def test_of_several_ranks_the_first_tells(place):
    """One log and one file of scalars, which say what one process alone would, with the number of ranks."""
    codes = run_ranks(2, "synthward.cli:main", arguments(place), join=False)
    assert codes == [0, 0]
    found = lines(place / "run")
    assert [line["event"] for line in found] == ["started", "leased", "progress", "checkpointed", "finished"]
    assert found[0]["world_size"] == 2 and found[0]["backend"] == "gloo"
    assert found[2]["update_norm"] > 0.0 and found[2]["epsilon"] == pytest.approx(found[-1]["epsilon"])
    assert len(list((place / "events").iterdir())) == 1


@pytest.mark.slow
def test_norms_of_shards_are_those_of_the_whole():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    entries = torch.cat([parameter.detach().double().flatten() + 1.0 for parameter in module.parameters()])
    for found in run_ranks(2, "tests.observe.sharded:norms"):
        assert [collective for collective, _, _ in found] == [False, True]
        for _, norm, update in found:
            assert norm == pytest.approx(float(entries.norm()), rel=1e-6)
            assert update == pytest.approx(math.sqrt(22), rel=1e-6)
