"""A small selection on the tiny data, in this process or by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synthward.engine import Ledger
from synthward.run import FitOptions, RunFolder, tune
from synthward.schema import load_schema
from tests.commandline import Outcome

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


def stopped(folder: Path) -> None:
    """The whole is charged, and nothing that a trial made can be used or gone on with."""
    with Ledger.open(folder / "ledger.jsonl", readonly=True) as ledger:
        assert len(ledger.events()) == 1 and 0.9999 * EPSILON <= ledger.epsilon() <= EPSILON
    assert not (folder / "encoder.json").exists() and not (folder / "model.safetensors").exists()
