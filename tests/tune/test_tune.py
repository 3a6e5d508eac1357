"""`synthward tune`: what a selection costs, what it releases, and that nothing else of it is left or told."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synthward.data import read_records
from synthward.engine import KeySchedule, Ledger
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, SelectionEvent, epsilon_of
from synthward.engine.accounting.tuning import calibrate_trial
from synthward.engine.budget import DatasetBudget
from synthward.engine.errors import BudgetExceededError, ConfigError, DataError, OutputError, PrivacyError
from synthward.engine.replay import differences, recording
from synthward.run import FitOptions, RunFolder, fit_run, sample_run, tune
from synthward.run.score import Score
from synthward.schema import load_schema
from tests.commandline import Outcome, environment
from tests.tinydata import table, write_csv, write_tiny

EPSILON, DELTA, STEPS = 3.0, 1e-5, 2
GRID: dict[str, list[Any]] = {"hidden": [8, 16], "learning_rate": ["1e-3", "2e-3"], "max_grad_norm": [0.5, 1]}
OPTIONS = FitOptions(steps=STEPS, sample_rate=0.1, settings={"blocks": 1, "sampling_steps": 2})
PLANNED = FitOptions(steps=200, sample_rate=0.05)
FLAGS = (
    "--steps",
    STEPS,
    "--sample-rate",
    0.1,
    "--set",
    "hidden=8,16",
    "--set",
    "blocks=1",
    "--set",
    "sampling_steps=2",
)
FILES = {"encoder.json", "ledger.jsonl", "model.safetensors", "run.json", "schema.toml"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny(tmp_path_factory.mktemp("tiny"), 60)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tune.Trial]]:
    """Fixes the number of trials; gives the list that they will be in."""

    def fix(number: int) -> list[tune.Trial]:
        seen: list[tune.Trial] = []
        real = tune.run_trial

        def run_trial(*arguments: Any) -> tune.Trial:
            seen.append(real(*arguments))
            return seen[-1]

        monkeypatch.setattr(tune, "draw_trials", lambda mean, shape: number)
        monkeypatch.setattr(tune, "run_trial", run_trial)
        return seen

    return fix


def select(tiny: tuple[Path, Path], out: Path, **changes: Any) -> RunFolder:
    """A small selection; keyword arguments replace those of `tune_run`."""
    given = {"epsilon": EPSILON, "delta": DELTA, "grid": GRID, "mean_trials": 2.0, "options": OPTIONS}
    data, schema = changes.pop("data", tiny[0]), load_schema(tiny[1])
    return tune.tune_run(data, schema, out=out, **(given | changes))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """`synthward ...` in this process."""
    from synthward.cli import main

    capsys.readouterr()
    code = main([str(a) for a in arguments])
    streams = capsys.readouterr()
    return Outcome(code, streams.out, streams.err)


def command(tiny: tuple[Path, Path], out: Path, *extra: object) -> list[object]:
    return [
        *("tune", tiny[0], "--schema", tiny[1], "--out", out, "--epsilon", EPSILON, "--delta", DELTA),
        *("--mean-trials", 2, *FLAGS, *extra),
    ]


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
        units = folder.load_encoder().units
        assert (f"{trial.distance / units:.9g}"[:9] in text) == (trial is best), (
            "only the best one's score is told"
        )


def test_output_of_one_trial_and_of_many_differs_in_nothing_that_can_be_counted(
    tiny, tmp_path, trials, capsys, monkeypatch
):
    """With a trial that warns and prints, too."""
    real, told = tune.train_run, []

    def train_run(*arguments: Any) -> RunFolder:
        print("a trial began")
        os.fsync(2)
        return real(*arguments)

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

    def train_run(folder: RunFolder, train: Any, key: KeySchedule, *rest: Any) -> RunFolder:
        keys.append(key.key_id)
        weights.append(torch.rand(4))
        return real(folder, train, key, *rest)

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


# Stops, refusals, failures


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


def stopped(folder: Path) -> None:
    """The whole is charged, and nothing that a trial made can be used or gone on with."""
    with Ledger.open(folder / "ledger.jsonl", readonly=True) as ledger:
        assert len(ledger.events()) == 1 and 0.9999 * EPSILON <= ledger.epsilon() <= EPSILON
    assert not (folder / "encoder.json").exists() and not (folder / "model.safetensors").exists()


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
