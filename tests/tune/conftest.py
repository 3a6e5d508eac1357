"""Fixtures of selections: records, and a number of trials that is not random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthward.run import tune
from tests.tinydata import write_tiny


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
