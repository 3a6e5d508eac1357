"""Kill -9 at random points, 200 times: nothing was released that is not charged, runs go on, no noise repeats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import environment
from tests.tinydata import write_tiny

TRAINER_KILLS, FIT_KILLS = 150, 50


def kills(folder: Path, kind: str, count: int, seed: int) -> dict[str, int]:
    """Runs `killing.py`; returns what it counted."""
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), kind, str(count), str(seed)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_a_killed_loop_never_released_more_than_is_charged(tmp_path):
    seen = kills(tmp_path, "trainer", TRAINER_KILLS, seed=5)
    assert seen["kills"] == TRAINER_KILLS
    assert seen["steps"] > 2 * TRAINER_KILLS and seen["queries"] > TRAINER_KILLS / 2, "too little was done"
    assert seen["noises"] == seen["steps"] + seen["queries"]


@pytest.mark.slow
def test_a_killed_fit_never_released_more_than_is_charged(tmp_path):
    write_tiny(tmp_path)
    seen = kills(tmp_path, "fit", FIT_KILLS, seed=6)
    assert seen["kills"] == FIT_KILLS and seen["finished"] >= 2
    assert seen["steps"] > FIT_KILLS and seen["queries"] >= seen["finished"], "too little was done"
    assert seen["noises"] == seen["steps"] + seen["queries"]
