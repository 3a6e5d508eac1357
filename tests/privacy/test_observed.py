"""What can be watched of a run is a function of settings and of releases: log and scalars under record and replay.

A seeded fit on D + x, then on D with what the mechanisms were asked in the first run, as in test_replay. x is the last
unit in the sampler's order. Times and rates aside, log and event files must then be equal to the byte.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from synthward.engine import PrivateTrainer
from synthward.engine.errors import DataError, PrivacyError
from synthward.engine.replay import recording
from synthward.observe import LOG_FILE, RunLog, TrainingObserver
from synthward.observe.events import EVENTS
from synthward.observe.scalars import TAGS
from tests.commandline import ACCOUNTANT
from tests.privacy.test_replay import UNLIKE, neighbours
from tests.tinydata import SCHEMA, table, write_csv

pytestmark = pytest.mark.slow  # whole fits

STEPS = 105
TIMES = {"speed/steps_per_second"}


def fitted(folder: Path, rows, first=None, *, seed: int | None = 5, **options):
    """The run folder, the event files' folder and what was asked of a fit, as a replay of `first` if it is given."""
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema

    folder.mkdir()
    (folder / "schema.toml").write_text(SCHEMA)
    settings = {"hidden": 16, "blocks": 1}
    fields = {"accountant": ACCOUNTANT, "steps": STEPS, "sample_rate": 0.15, "holdout": 0.25}
    chosen = FitOptions(**(fields | options), seed=seed, tensorboard=folder / "events", settings=settings)

    def fit():
        fit_run(
            write_csv(folder / "data.csv", rows),
            load_schema(folder / "schema.toml"),
            epsilon=3.0,
            delta=1e-5,
            out=folder / "run",
            options=chosen,
        )

    if seed is None:
        fit()
        return folder, None
    with recording(first) as asked:
        fit()
    return folder, asked


def log_of(folder: Path) -> bytes:
    return UNLIKE.sub(b"", (folder / "run" / LOG_FILE).read_bytes())


def scalars_of(folder: Path) -> list[bytes]:
    """Every event but its time, of scalars other than rates to the bit."""
    [file] = (folder / "events").iterdir()
    found = []
    for event in EventFileLoader(str(file)).Load():
        event.wall_time = 0.0
        if event.summary.value and event.summary.value[0].tag in TIMES:
            event.summary.value[0].Clear()
        found.append(event.SerializeToString(deterministic=True))
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    place = tmp_path_factory.mktemp("observed")
    with_x, without_x = neighbours(extra=7)
    first, asked = fitted(place / "with", with_x)
    return first, fitted(place / "without", without_x, asked)[0]


def test_the_log_is_the_same_without_a_unit(pair):
    first, second = (log_of(folder) for folder in pair)
    assert first == second
    events = [json.loads(line)["event"] for line in (pair[0] / "run" / LOG_FILE).read_text().splitlines()]
    lease = ["leased", "progress", "checkpointed"]
    assert events == ["started", *lease, *lease, *lease, "finished"]


def test_the_scalars_are_the_same_without_a_unit(pair):
    first, second = (scalars_of(folder) for folder in pair)
    assert first == second
    # One header; three lines of five scalars, but for the clip bound, which is not adapted, and one rate.
    assert len(first) == 1 + 3 * (len(TAGS) - 1)


def test_the_norms_that_are_shown_move_with_the_steps(pair):
    """Else the tests above compare constants."""
    lines = [json.loads(line) for line in (pair[0] / "run" / LOG_FILE).read_text().splitlines()]
    shown = [line for line in lines if line["event"] == "progress"]
    assert [line["step"] for line in shown] == [50, 100, 105]
    for name in ("parameter_norm", "update_norm", "epsilon"):
        assert len({line[name] for line in shown}) == 3 and all(line[name] > 0 for line in shown), name
    assert [line["epsilon"] for line in shown] == sorted(line["epsilon"] for line in shown)
    assert shown[-1]["epsilon"] == pytest.approx(lines[-1]["epsilon"]) and lines[-1]["epsilon"] <= 3.0


@pytest.mark.parametrize("what", ["loss", "draw"])
def test_a_leak_into_the_log_is_noticed(tmp_path, monkeypatch, what):
    """Put into a field that there is: by type it could be anything."""
    real, told = PrivateTrainer.backward, TrainingObserver.stepped
    seen = [0.0]

    def backward(self, losses, **rest):
        mask = rest["unit_mask"]
        seen[0] += float(losses.detach().sum()) if what == "loss" else float(mask.sum())
        real(self, losses, **rest)

    monkeypatch.setattr(PrivateTrainer, "backward", backward)
    monkeypatch.setattr(
        TrainingObserver, "stepped", lambda self, step, epsilon, rate: told(self, step, epsilon, seen[0])
    )
    with_x, without_x = neighbours(extra=7)
    first, asked = fitted(tmp_path / "with", with_x)
    second, _ = fitted(tmp_path / "without", without_x, asked)
    assert log_of(first) != log_of(second) and scalars_of(first) != scalars_of(second)


@pytest.mark.parametrize(
    "field",
    [
        *("loss", "losses", "grad_norm", "clipped_fraction", "batch_size", "num_units", "num_rows"),
        *("non_finite", "step_seconds", "accuracy", "event", "time"),
    ],
)
@pytest.mark.parametrize("name", EVENTS)
def test_a_field_outside_the_set_is_refused_by_name(tmp_path, name, field):
    log = RunLog(tmp_path / LOG_FILE, pytest.fail)
    with pytest.raises(PrivacyError, match=f"'{field}' is no field of '{name}' lines"):
        log.write(name, **{field: 0.5})
    log.close()
    assert (tmp_path / LOG_FILE).read_bytes() == b""


def test_an_error_in_training_is_told_without_its_text(tmp_path, monkeypatch):
    """It may quote a record; here it does."""
    monkeypatch.setattr(PrivateTrainer, "backward", _quote)
    with pytest.raises(DataError, match="p00007"):
        fitted(tmp_path / "place", table(60, 90), seed=None)
    lines = [json.loads(line) for line in (tmp_path / "place" / "run" / LOG_FILE).read_text().splitlines()]
    assert lines[-1].items() >= {"event": "stopped", "error": "DataError", "message": None}.items()
    assert b"p00007" not in (tmp_path / "place" / "run" / LOG_FILE).read_bytes()


def _quote(self: PrivateTrainer, losses: torch.Tensor, **rest: object) -> None:
    raise DataError("row 3: patient p00007 is strange")
