"""`synthward tune`: what a selection costs, what it releases, and that nothing else of it is left or told."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from synthward.data import read_records
from synthward.engine import KeySchedule
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, SelectionEvent, epsilon_of
from synthward.engine.accounting.tuning import calibrate_trial
from synthward.engine.budget import DatasetBudget
from synthward.engine.replay import differences, recording
from synthward.run import FitOptions, RunFolder, sample_run, tune
from synthward.run.score import Score
from synthward.schema import load_schema
from tests.tinydata import table, write_csv, write_tiny
from tests.tune.selecting import (
    DELTA,
    EPSILON,
    FILES,
    GRID,
    OPTIONS,
    PLANNED,
    call,
    command,
    select,
)

# What it costs


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
def test_the_plan_costs_what_the_accountant_says(shape):
    plan = tune.plan_selection(EPSILON, DELTA, PLANNED, 10.0, shape)
    query, steps, score = plan.trial.selection.inner
    assert query == GaussianEvent(plan.query_noise_multiplier, 1)
    assert steps == PoissonGaussianEvent(0.05, plan.trial.noise_multiplier, 200)
    assert score == GaussianEvent(plan.score_noise_multiplier, 1)
    assert plan.trial.selection == SelectionEvent((query, steps, score), 10.0, shape)
    spent = epsilon_of([plan.trial.selection], DELTA, "rdp")
    assert 0.9999 * EPSILON <= spent == plan.trial.epsilon <= EPSILON
    again = calibrate_trial(
        lambda noise: [query, PoissonGaussianEvent(0.05, noise, 200), score], EPSILON, DELTA, 10.0, shape
    )
    assert again == plan.trial
    assert plan.trial.trial_epsilon == epsilon_of([query, steps, score], DELTA, "rdp") < EPSILON


def test_the_shares_of_histograms_and_score_are_those_of_a_trial():
    plan = tune.plan_selection(EPSILON, DELTA, PLANNED, 10.0, 0.0)
    inner = plan.trial.selection.inner
    found = [epsilon_of([event], DELTA, "rdp") / plan.trial.trial_epsilon for event in inner]
    assert found[0] == pytest.approx(0.25, rel=0.02) and found[2] == pytest.approx(0.2, rel=0.02)
    assert found[1] > 0.9, "the steps have nearly all of it"


# What it releases


def test_the_best_trial_is_released_and_nothing_of_the_others(tiny, tmp_path, trials, capfd):
    seen, kept = trials(4), {}
    real = tune._release

    def release(folder: RunFolder, best: tune.Trial) -> None:
        present = [p.name for p in (folder.path / tune.TRIALS_FOLDER).iterdir()]
        assert present == [best.folder.path.name], "a trial that lost is gone before the end"
        assert (folder.path / tune.TRIALS_FOLDER).stat().st_mode & 0o077 == 0
        kept.update({n: (best.folder.path / n).read_bytes() for n in ("encoder.json", "model.safetensors")})
        real(folder, best)

    tune._release, folder = release, None
    try:
        folder = select(tiny, tmp_path / "run")
    finally:
        tune._release = real
    assert len(seen) == 4
    best = min(seen, key=lambda trial: trial.rank)
    assert folder.info["settings"] == best.folder.info["settings"]
    assert folder.info["max_grad_norm"] == best.folder.info["max_grad_norm"]
    assert {name: (folder.path / name).read_bytes() for name in kept} == kept
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert {p.name for p in folder.path.iterdir()} == FILES
    text = "".join(p.read_text(errors="replace") for p in folder.path.iterdir())
    streams = capfd.readouterr()
    assert not streams.out and not streams.err
    for trial in seen:
        assert trial.folder.info["run_id"] not in text
        assert not trial.folder.path.exists()
        # A noisy share beyond 0 or 1 is cut off there, and told so of the best one alone.
        share = trial.distance / folder.load_encoder().units
        if trial is best:
            assert folder.info["selection"]["score"] == min(max(share, 0.0), 1.0)
        else:
            assert repr(share) not in text and repr(trial.distance) not in text


def test_output_of_one_trial_and_of_many_differs_in_nothing_that_can_be_counted(
    tiny, tmp_path, trials, capsys, monkeypatch
):
    """With a trial that warns and prints, too."""
    real, told = tune.train_run, []

    def train_run(*arguments: Any, **named: Any) -> RunFolder:
        print("a trial began")
        os.fsync(2)
        return real(*arguments, **named)

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(tune, "train_run", train_run)
    for number in (1, 4):
        seen = trials(number)
        out = tmp_path / f"run{number}"
        outcome = call(capsys, *command(tiny, out, "--json"))
        assert outcome.code == 0, outcome.stderr
        assert len(seen) == number
        told.append((json.loads(outcome.stdout), outcome.stderr, out))
    (first, errors, one), (second, other_errors, many) = told
    assert first.keys() == second.keys() and first["selection"].keys() == second["selection"].keys()
    unlike = {name for name in first if first[name] != second[name]}
    assert unlike <= {"run", "run_id", "chosen", "selection"} and "seconds" not in first
    clean = [re.sub(r"\d:\d\d:\d\d", "", text) for text in (errors, other_errors)]
    assert clean[0] == clean[1] and "a trial began" not in clean[0] + json.dumps(first)
    assert {p.name for p in one.iterdir()} == {p.name for p in many.iterdir()} == FILES
    lines = [[json.loads(x) for x in (p / "ledger.jsonl").read_text().splitlines()] for p in (one, many)]
    assert [[x["kind"] for x in run] for run in lines] == [["header", "event"]] * 2
    assert lines[0][1]["event"] == lines[1][1]["event"]


def test_no_file_tells_when_the_selection_ended(tiny, tmp_path, trials, monkeypatch):
    """Lines have times: none is written after the first trial, neither to the ledger nor to the budget."""
    seen, real = trials(2), tune._best_trial
    budget = tmp_path / "budget.jsonl"
    DatasetBudget.create(budget, epsilon=9.0, delta=DELTA, unit="patient")
    watched: dict[Path, bytes] = {}

    def best_trial(folder: RunFolder, *rest: Any) -> tune.Trial | None:
        watched.update({p: p.read_bytes() for p in (folder.ledger_path, budget)})
        return real(folder, *rest)

    monkeypatch.setattr(tune, "_best_trial", best_trial)
    folder = select(tiny, tmp_path / "run", budget_file=budget)
    assert len(seen) == 2
    assert len(watched) == 2 and all(p.read_bytes() == data for p, data in watched.items())
    times = {p.stat().st_mtime for p in (*folder.path.iterdir(), folder.path)}
    assert len(times) == 1 and times.pop() == int(folder.ledger_path.stat().st_mtime)


def test_the_ledger_holds_one_event_and_tells_the_whole_epsilon(tiny, tmp_path, trials, capsys):
    trials(3)
    folder = select(tiny, tmp_path / "run", shape=1.0)
    with folder.open_ledger(readonly=True) as ledger:
        [event] = ledger.events()
        assert isinstance(event, SelectionEvent) and (event.mean_trials, event.shape) == (2.0, 1.0)
        assert (
            ledger.epsilon()
            == epsilon_of([event], DELTA, "rdp")
            <= EPSILON
            == ledger.header["target_epsilon"]
        )
        assert ledger.is_private and ledger.header["accountant"] == "rdp"
    shown = json.loads(call(capsys, "ledger", folder.path, "--json").stdout)
    assert shown["events"] == [event.to_dict()] and 0.9999 * EPSILON <= shown["epsilon"] <= EPSILON


def test_other_commands_take_the_run(tiny, tmp_path, trials, capsys):
    from synthward.audit.runs import _ledger_check, plan_of

    trials(2)
    folder = select(tiny, tmp_path / "run")
    made = sample_run(folder.path, 50, tmp_path / "cohort.csv", seed=1)
    assert made["rows"] == 50 and made["epsilon"] == EPSILON
    told = json.loads(call(capsys, "statement", folder.path, "--json").stdout)
    assert told["statement"]["guarantee"]["epsilon"] == pytest.approx(EPSILON, rel=1e-4)
    assert "the selection is charged" in json.dumps(told)
    with folder.open_ledger(readonly=True) as ledger:
        assert _ledger_check(plan_of(folder), ledger.events()).passed is True
        without = [GaussianEvent(5.0, 1)]
        assert _ledger_check(plan_of(folder), without).passed is False


# What a trial is


def test_the_number_is_drawn_once_from_its_law_before_a_record_is_read(tiny, tmp_path, trials, monkeypatch):
    order: list[object] = []

    def draw(mean: float, shape: float) -> int:
        order.append(("draw", mean, shape))
        return 3

    real = tune.read_training_records

    def read(*arguments: Any) -> Any:
        order.append("read")
        return real(*arguments)

    seen = trials(3)
    monkeypatch.setattr(tune, "draw_trials", draw)
    monkeypatch.setattr(tune, "read_training_records", read)
    select(tiny, tmp_path / "run", mean_trials=7.0, shape=1.0)
    assert order == [("draw", 7.0, 1.0), "read"] and len(seen) == 3


def test_settings_are_drawn_uniformly_with_replacement():
    grid = tune._checked(OPTIONS, GRID)
    assert grid == {"hidden": [8, 16], "learning_rate": [1e-3, 2e-3], "max_grad_norm": [0.5, 1.0]}
    counts: dict[tuple[object, ...], int] = {}
    for _ in range(4000):
        drawn, clip = tune.draw_settings(grid, OPTIONS)
        assert drawn["blocks"] == 1 and drawn["sampling_steps"] == 2
        cell = (drawn["hidden"], drawn["learning_rate"], clip)
        counts[cell] = counts.get(cell, 0) + 1
    # Eight cells of 500 each; six standard deviations of one.
    assert len(counts) == 8 and all(abs(n - 500) < 126 for n in counts.values())


def test_each_trial_has_keys_and_first_weights_of_its_own(tiny, tmp_path, trials, monkeypatch):
    """Torch begins at the same seed in every process: weights that go on in its stream would tell a trial's number."""
    keys: list[str] = []
    weights: list[torch.Tensor] = []
    real = tune.train_run

    def train_run(folder: RunFolder, train: Any, key: KeySchedule, *rest: Any, **named: Any) -> RunFolder:
        keys.append(key.key_id)
        weights.append(torch.rand(4))
        return real(folder, train, key, *rest, **named)

    trials(2)
    monkeypatch.setattr(tune, "train_run", train_run)
    for name in ("one", "two"):
        torch.manual_seed(0)
        select(tiny, tmp_path / name)
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(0)))
    assert len(set(keys)) == 4
    assert len({tuple(w.tolist()) for w in weights}) == 4


def test_ties_are_settled_by_lot():
    trial = tune.Trial(None, 2.0, 7)  # type: ignore[arg-type]
    assert tune.Trial(None, 2.0, 6).rank < trial.rank < tune.Trial(None, 2.5, 1).rank  # type: ignore[arg-type]


def test_replay_of_a_trial_on_a_neighbour(tmp_path, monkeypatch):
    """The base mechanism on D + x, then on D with what was asked before: within each sensitivity, all files equal."""
    others = table(40, 60)
    extra = [row | {"patient": "p90001"} for row in table(30, 45, seed=4)[:5]]
    options = FitOptions(steps=3, sample_rate=0.3)
    plan = tune.plan_selection(EPSILON, DELTA, options, 2.0, 0.0)
    found = []
    first = None
    for name, rows in (("with", others + extra), ("without", others)):
        _, schema_file = write_tiny(tmp_path, 10)
        schema = load_schema(schema_file)
        train = read_records(write_csv(tmp_path / f"{name}.csv", rows), schema)
        info = {
            **tune._plan_info(plan, options, schema),
            **{"version": 1, "run_id": "r", "created": "c", "unit": "patient", "delta": DELTA},
            **{"epsilon": plan.trial.trial_epsilon, "seed": 5, "private": False, "ledger_head": None},
            **{"score_noise_multiplier": plan.score_noise_multiplier},
            "settings": {"hidden": 8, "blocks": 1, "sampling_steps": 2},
        }
        with recording(first) as asked:
            trial = tune.run_trial(
                tmp_path / name, info, schema, train, Score(train), KeySchedule.reproducible(5)
            )
        first = asked
        files = {p.name: p.read_bytes() for p in trial.folder.path.iterdir() if p.suffix != ".jsonl"}
        files["run.json"] = re.sub(rb'"ledger_head": "[^"]*"', b"", files["run.json"])
        found.append((asked, trial.distance, files))
    (one, distance, files), (two, other_distance, other_files) = found
    assert [release.kind for release in one.releases] == ["gaussian_vector", *["step"] * 3, "integer_vector"]
    assert differences(one, two, rounding=1e-5) == []
    assert one.releases[-1].distance(two.releases[-1]) > 0, "the unit is in what the score is asked"
    assert distance == other_distance and files == other_files
