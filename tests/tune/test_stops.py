"""`synthward tune`: kills, failures and refusals."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from typing import Any

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import SelectionEvent
from synthward.engine.budget import DatasetBudget
from synthward.engine.errors import BudgetExceededError, ConfigError, DataError, OutputError, PrivacyError
from synthward.run import FitOptions, RunFolder, fit_run, tune
from synthward.run.score import Score
from synthward.schema import load_schema
from tests.commandline import environment
from tests.tune.selecting import (
    DELTA,
    EPSILON,
    FILES,
    OPTIONS,
    call,
    command,
    select,
    stopped,
)

KILLED = """
import os, signal, sys
from synthward.run import tune
real, seen = tune.run_trial, []
def run_trial(*arguments):
    if seen:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(1)
    return real(*arguments)
tune.run_trial, tune.draw_trials = run_trial, lambda mean, shape: 3
from synthward.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_is_charged_whole_and_does_not_go_on(tiny, tmp_path, trials, capsys):
    """Killed when the second trial is about to begin: the first one's files are there, in a folder of their own."""
    out, budget = tmp_path / "run", tmp_path / "budget.jsonl"
    DatasetBudget.create(budget, epsilon=4.0, delta=DELTA, unit="patient")
    killed = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, *map(str, command(tiny, out, "--budget", budget))],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(list((out / tune.TRIALS_FOLDER).iterdir())) == 1, "the best so far"
    trials(3)
    stopped(out)
    [entry] = DatasetBudget(budget).entries()
    with Ledger.open(out / "ledger.jsonl", readonly=True) as ledger:
        assert list(entry.events) == ledger.events()
    assert (out / tune.TRIALS_FOLDER).stat().st_mode & 0o077 == 0
    with pytest.raises(OutputError, match="holds a run already"):
        select(tiny, out)
    with pytest.raises(ConfigError, match="can not go on"):
        fit_run(
            tiny[0],
            load_schema(tiny[1]),
            epsilon=EPSILON,
            delta=DELTA,
            out=out,
            resume=True,
            budget_file=budget,
        )
    for wrong in (("sample", out, "--out", tmp_path / "c.csv"), command(tiny, out, "--resume")):
        outcome = call(capsys, *wrong)
        assert outcome.code == 2 and not outcome.stdout and len(outcome.stderr.splitlines()) == 1
    with pytest.raises(BudgetExceededError):
        select(tiny, tmp_path / "again", budget_file=budget)
    assert select(tiny, out, overwrite=True).is_complete
    assert {p.name for p in out.iterdir()} == FILES


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk"), MemoryError()])
def test_what_stops_a_trial_leaves_the_charge_and_no_trial(tiny, tmp_path, trials, monkeypatch, error):
    trials(3)
    real = tune._samples
    calls: list[int] = []

    def samples(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(tune, "_samples", samples)
    with pytest.raises(type(error)):
        select(tiny, tmp_path / "run")
    stopped(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"ledger.jsonl", "run.json", "schema.toml"}


def test_nothing_is_spent_where_records_can_not_be_read(tiny, tmp_path, trials):
    budget = DatasetBudget.create(tmp_path / "b.jsonl", epsilon=4.0, delta=DELTA, unit="patient")
    trials(2)
    with pytest.raises(DataError):
        select(tiny, tmp_path / "run", data=tmp_path / "nosuch.csv", budget_file=budget.path)
    assert budget.spent() == 0.0 and not (tmp_path / "run").exists()


def test_a_budget_that_does_not_cover_it_refuses_before_records_are_read(tiny, tmp_path):
    budget = DatasetBudget.create(tmp_path / "b.jsonl", epsilon=2.0, delta=DELTA, unit="patient")
    with pytest.raises(BudgetExceededError):
        select(tiny, tmp_path / "run", data=tmp_path / "nosuch.csv", budget_file=budget.path)


def test_a_budget_counts_the_selection(tiny, tmp_path, trials):
    budget = DatasetBudget.create(tmp_path / "b.jsonl", epsilon=9.0, delta=DELTA, unit="patient")
    trials(1)
    folder = select(tiny, tmp_path / "run", budget_file=budget.path)
    [entry] = budget.entries()
    assert entry.state == "settled" and entry.ledger_head == folder.info["ledger_head"]
    assert [event.kind for event in entry.events] == ["selection"]
    assert folder.info["budget_id"] == budget.budget_id


def test_no_trial_at_all_releases_nothing(tiny, tmp_path, trials):
    trials(0)
    with pytest.raises(PrivacyError, match="nothing is released"):
        select(tiny, tmp_path / "run", shape=math.inf)
    stopped(tmp_path / "run")
    assert not (tmp_path / "run" / tune.TRIALS_FOLDER).exists()


def test_a_generator_that_diverged_loses_and_is_charged_alike(tiny, tmp_path, trials, monkeypatch):
    real = RunFolder.load_generator
    bad: list[bool] = []

    def load(self: RunFolder, encoder: Any) -> Any:
        generator = real(self, encoder)
        if bad.pop(0):
            next(iter(generator.averaged.parameters())).data[0] = math.nan
        return generator

    monkeypatch.setattr(RunFolder, "load_generator", load)
    seen = trials(3)
    bad += [True, False, True]
    folder = select(tiny, tmp_path / "run")
    assert [math.isinf(trial.distance) for trial in seen] == [True, False, True]
    assert folder.info["settings"] == seen[1].folder.info["settings"]
    bad += [True] * 3
    with pytest.raises(PrivacyError, match="diverged"):
        select(tiny, tmp_path / "none")
    stopped(tmp_path / "none")


def test_a_trial_that_is_not_what_was_charged_is_refused(tiny, tmp_path, trials, monkeypatch):
    trials(1)
    with monkeypatch.context() as patched, pytest.raises(PrivacyError, match="something else"):
        patched.setattr(Score, "ask", lambda *a: 1.0)
        select(tiny, tmp_path / "free")
    stopped(tmp_path / "free")
    real = Score.ask

    def twice(*arguments: Any) -> float:
        real(*arguments)
        return real(*arguments)

    monkeypatch.setattr(Score, "ask", twice)
    with pytest.raises(BudgetExceededError):
        select(tiny, tmp_path / "twice")
    stopped(tmp_path / "twice")


@pytest.mark.parametrize(
    ("wrong", "mention"),
    [
        (("--set", "blocks"), "KEY=V1,V2"),
        (("--set", "draws=2,,4"), "KEY=V1,V2"),
        (("--set", "hidden=32"), "given twice"),
        (("--set", "hiden=32"), "did you mean 'hidden'"),
        (("--set", "draws=2,many"), "expected int"),
        (("--set", "steps=2,3"), "'steps' is not one"),
        (("--set", "max_grad_norm=1,-1"), "max_grad_norm"),
        (("--set", "max_grad_norm=much"), "max_grad_norm"),
        (("--shape", "square"), "--shape"),
        (("--shape", "-1"), "--shape"),
        (("--mean-trials", "0.5"), "mean trials"),
        (("--mean-trials", "nan"), "mean trials"),
        (("--mean-trials", "1000", "--shape", "poisson"), "at most 50"),
        (("--epsilon", "0.001"), "epsilon"),
        (("--delta", "0"), "delta"),
        (("--steps", "0"), "steps"),
        (("--sample-rate", "2"), "sample rate"),
        (("--generator", "oracle"), "generator"),
        (("--resume",), "can not go on"),
        (("--grid", "nosuch.toml"), "nosuch.toml"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_read(tiny, tmp_path, capsys, wrong, mention):
    outcome = call(capsys, *command(tiny, tmp_path / "run", *wrong))
    assert outcome.code == 2 and not outcome.stdout
    [line] = outcome.stderr.splitlines()
    assert line.startswith("synthward: error: ") and mention in line and len(line) < 400
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mechanism", [{"noise": "banded", "bands": 2}, {"noise": "blt"}, {"arithmetic": "discrete"}]
)
def test_other_mechanisms_are_charged_as_themselves(tiny, tmp_path, trials, mechanism):
    seen = trials(2)
    options = FitOptions(steps=4, sample_rate=0.1, settings=OPTIONS.settings, **mechanism)
    folder = select(tiny, tmp_path / "run", options=options)
    assert len(seen) == 2 and folder.info["steps_taken"] == 4
    with folder.open_ledger(readonly=True) as ledger:
        [event] = ledger.events()
        assert isinstance(event, SelectionEvent) and ledger.epsilon() <= EPSILON
    expected = options.mechanism(EPSILON, DELTA).event(folder.info["noise_multiplier"], 4)
    assert event.inner[1] == expected


def test_static_batches_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="max_units"):
        select(tiny, tmp_path / "run", options=FitOptions(max_units=1000))


def test_a_seed_and_an_empty_grid_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="not private"):
        select(tiny, tmp_path / "run", options=FitOptions(seed=1))
    with pytest.raises(ConfigError, match="no setting to choose"):
        select(tiny, tmp_path / "run", grid={})
    with pytest.raises(ConfigError, match="no value"):
        select(tiny, tmp_path / "run", grid={"hidden": []})


def test_a_grid_from_a_file(tiny, tmp_path):
    from synthward.commands.tune import parse_grid, parse_shape

    file = tmp_path / "grid.toml"
    file.write_text('hidden = [64, 256]\nlearning_rate = [1e-3, "2e-3"]\n')
    assert parse_grid(["blocks=1,2"], file) == {
        "hidden": [64, 256],
        "learning_rate": [1e-3, "2e-3"],
        "blocks": ["1", "2"],
    }
    for text, mention in (("hidden = 64", "no list"), ("hidden = [true]", "no list"), ("hidden", "TOML")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=mention):
            parse_grid([], file)
    assert [parse_shape(text) for text in ("0", "1", "0.5", "poisson")] == [0.0, 1.0, 0.5, math.inf]
