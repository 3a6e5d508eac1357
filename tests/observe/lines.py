"""Lines of a log, and an observer of invented training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from synthward.engine import PrivacyPlan
from synthward.observe import LOG_FILE, TrainingObserver

PROGRESS: dict[str, Any] = {
    "step": 50,
    "steps": 1000,
    "steps_per_second": 12.5,
    "seconds_left": 76,
    "epsilon": 0.75,
    "learning_rate": 1e-3,
    "noise_multiplier": 1.1,
    "parameter_norm": 10.0,
    "update_norm": 0.5,
    "clip_bound": None,
}

INFO: dict[str, Any] = {
    "run_id": "00ff00ff00ff00ff",
    "generator": "diffusion",
    "epsilon": 3.0,
    "delta": 1e-5,
    "accountant": "rdp",
    "unit": "patient",
    "relation": "add_or_remove_one",
    "private": True,
    "max_grad_norm": 1.0,
    "physical_batch_size": 256,
    "num_rows": 4711,
}


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run folder's log, without their times."""
    found = []
    for line in (folder / LOG_FILE).read_text().splitlines():
        data = json.loads(line)
        assert data.pop("time").endswith("+00:00")
        found.append(data)
    return found


def plan(steps: int = 12, **fields: Any) -> PrivacyPlan:
    settings = {
        "sample_rate": 0.1,
        "noise_multiplier": 1.1,
        "max_grad_norm": 1.0,
        "expected_batch_size": 10.0,
    }
    return PrivacyPlan(steps=steps, **(settings | fields))


def train(
    observer: TrainingObserver,
    clock: Clock,
    parameters: list[torch.nn.Parameter],
    *,
    first: int = 0,
    steps: int = 12,
) -> None:
    """Steps of half a second, each of which adds its number to every entry."""
    observer.started(INFO, plan(steps), parameters, step=first)
    observer.leased(first, steps - first)
    for step in range(first + 1, steps + 1):
        clock.now += 0.5
        with torch.no_grad():
            for parameter in parameters:
                parameter += step
        observer.stepped(step, 0.1 * step, 1e-3)
    observer.checkpointed(steps)
    observer.finished(steps, 1.2)
    observer.close()
