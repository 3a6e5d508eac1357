"""A run and its ledger: an old ledger put back is refused, and what a kill left is paid for within the budgets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent
from synthward.engine.budget import DatasetBudget
from synthward.engine.errors import CheckpointError, ConfigError, LedgerError
from synthward.run import FitOptions, RunFolder, fit_run
from synthward.run import training as training_module
from synthward.run.training import Training
from synthward.schema import load_schema
from tests.tinydata import SCHEMA, table, write_csv

EPSILON, DELTA, STEPS = 3.0, 1e-5, 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it, and nothing is tidied up on the way out."""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(training_module, "LEASE_STEPS", 4)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    write_csv(tmp_path / "data.csv", table(40))
    return tmp_path


def fit(place, *, resume=False, budget=None, epsilon=EPSILON, name="run"):
    options = FitOptions(accountant="rdp", steps=STEPS, sample_rate=0.2, settings={"hidden": 8, "blocks": 1})
    return fit_run(
        place / "data.csv",
        load_schema(place / "schema.toml"),
        epsilon=epsilon,
        delta=DELTA,
        out=place / name,
        options=options,
        resume=resume,
        budget_file=budget,
    )


def killed_fit(place, monkeypatch, *, owner=Training, name="_step", call=6, **more):
    """A fit that dies at the given call; its claim on a budget is left as a dead process leaves it."""
    original, calls = getattr(owner, name), 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            fit(place, **more)


def steps(place, name="run"):
    with Ledger.open(place / name / "ledger.jsonl", readonly=True) as ledger:
        return sum(e.steps for e in ledger.events() if isinstance(e, PoissonGaussianEvent))


def test_a_resumed_run_needs_the_ledger_that_its_checkpoint_names(place, monkeypatch):
    run, old = place / "run", place / "old"
    killed_fit(place, monkeypatch, call=2)
    shutil.copytree(run, old)
    shutil.rmtree(run)
    killed_fit(place, monkeypatch, call=10)
    whole = (run / "ledger.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for shorter in (lines[:3], lines[:-3], (old / "ledger.jsonl").read_bytes().splitlines(keepends=True)):
        (run / "ledger.jsonl").write_bytes(b"".join(shorter))
        with pytest.raises(LedgerError, match="expected head"):
            fit(place, resume=True)
        # run.json put back too: the checkpoint still names the later head.
        info = json.loads((run / "run.json").read_text())
        earlier = info | {"ledger_head": json.loads(shorter[0])["hash"]}
        (run / "run.json").write_text(json.dumps(earlier))
        with pytest.raises(LedgerError, match="checkpoint"):
            fit(place, resume=True)
        (run / "run.json").write_text(json.dumps(info))
        assert not (run / "model.safetensors").exists()
    (run / "ledger.jsonl").write_bytes(whole)
    folder = fit(place, resume=True)
    assert folder.is_complete and steps(place) == STEPS
    with folder.open_ledger(readonly=True) as ledger:
        assert folder.info["ledger_head"] == ledger.head


def test_a_missing_ledger_is_begun_again_only_if_there_never_was_one(place, monkeypatch):
    killed_fit(place, monkeypatch, owner=Ledger, name="create", call=1)
    assert (place / "run" / "run.json").is_file() and not (place / "run" / "ledger.jsonl").exists()
    (place / "run" / "ledger.jsonl").touch()  # made, and killed before the first line
    assert fit(place, resume=True).is_complete
    assert steps(place) == STEPS
    shutil.rmtree(place / "run")
    killed_fit(place, monkeypatch, call=1)
    (place / "run" / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match="ledger is missing"):
        fit(place, resume=True)


def test_a_run_that_was_killed_before_its_schema_was_kept_can_be_resumed(place, monkeypatch):
    killed_fit(place, monkeypatch, owner=RunFolder, name="save_schema", call=1)
    assert fit(place, resume=True).is_complete
    assert RunFolder(place / "run").schema.fingerprint() == load_schema(place / "schema.toml").fingerprint()


@pytest.fixture
def budget(place) -> Path:
    path = place / "budget.jsonl"
    DatasetBudget.create(path, epsilon=12.0, delta=DELTA, unit="patient")
    return path


def entry(budget):
    [found] = DatasetBudget(budget).entries()
    return found


def test_a_killed_run_stays_reserved_and_goes_on_under_its_reservation(place, monkeypatch, budget):
    killed_fit(place, monkeypatch, call=6, budget=budget)
    whole = DatasetBudget(budget).spent()
    reserved = entry(budget)
    assert reserved.state == "started" and sum(getattr(e, "steps", 0) for e in reserved.events) == STEPS
    for other in (None, place / "other.jsonl"):
        if other is not None:
            DatasetBudget.create(other, epsilon=99.0, delta=DELTA, unit="patient")
        with pytest.raises(ConfigError, match="--budget"):
            fit(place, resume=True, budget=other)
    folder = fit(place, resume=True, budget=budget)
    settled = entry(budget)
    with folder.open_ledger(readonly=True) as ledger:
        assert (settled.state, settled.ledger_head) == ("settled", ledger.head)
        assert list(settled.events) == ledger.events()
    assert DatasetBudget(budget).spent() <= whole
    content = budget.read_bytes()
    fit(place, resume=True, budget=budget)
    assert budget.read_bytes() == content, "a finished run has nothing more to settle"


def test_a_lost_query_is_reserved_before_it_is_asked_again(place, monkeypatch, budget):
    killed_fit(place, monkeypatch, owner=RunFolder, name="save_encoder", call=1, budget=budget)
    fit(place, resume=True, budget=budget)
    queries = [e.count for e in entry(budget).events if isinstance(e, GaussianEvent)]
    assert queries == [2] and entry(budget).state == "settled"


def test_a_run_killed_between_its_end_and_its_settling_is_settled_later(place, monkeypatch, budget):
    killed_fit(place, monkeypatch, owner=DatasetBudget, name="settle", call=1, budget=budget)
    assert RunFolder(place / "run").is_complete and entry(budget).state == "started"
    fit(place, resume=True, budget=budget)
    assert entry(budget).state == "settled"
