"""Kill any rank of a fit at any time: the others stop, nothing is released that is not charged, the run goes on.

`kill_fits.py` kills ranks that are forked, which is fast enough for many kills and notes what every rank releases; the
last test kills processes of `torchrun` itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import PoissonGaussianEvent
from tests.commandline import environment, run
from tests.distributed.launch import run_ranks
from tests.tinydata import write_tiny

KILLS, TORCHRUN_KILLS = 32, 3
STEPS, PATIENCE = 300, 300.0


@pytest.mark.slow
def test_a_fit_of_two_ranks_is_killed_at_random_points(tmp_path):
    write_tiny(tmp_path)
    (seen,) = run_ranks(
        1, "tests.distributed.kill_fits:main", str(tmp_path), KILLS, 11, timeout=540.0, join=False
    )
    assert seen["kills"] == KILLS and seen["finished"] >= 2 and seen["steps"] > KILLS, seen
    # Alone on one rank; and of two, the one that was left said so itself, but for the rare one that gloo keeps waiting.
    assert seen["one"] and seen["told"] > 5 * seen["unnoticed"], seen


def workers(agent: int) -> list[int]:
    """Ids of the processes that a process has started."""
    try:
        return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    except FileNotFoundError:
        return []


def await_(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def fit_arguments(folder: Path) -> list[str]:
    where = ["fit", folder / "data.csv", "--schema", folder / "schema.toml", "--out", folder / "run"]
    how = ["--epsilon", 3, "--delta", 1e-5, "--steps", STEPS, "--accountant", "rdp", "--sample-rate", 0.1]
    resume = ["--resume"] if (folder / "run" / "run.json").exists() else []
    return [str(word) for word in (*where, *how, *resume)]


def charged(folder: Path) -> tuple[int, list[str]]:
    """Steps that the run's ledger charges, and the keys that it notes."""
    path = folder / "run" / "ledger.jsonl"
    if not path.exists() or not path.stat().st_size:
        return 0, []
    with Ledger.open(path, readonly=True) as ledger:
        steps = sum(event.steps for event in ledger.events() if isinstance(event, PoissonGaussianEvent))
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return steps, [line["key_id"] for line in lines if "key_id" in line]


@pytest.mark.slow
def test_torchrun_ends_all_when_one_is_killed_and_the_run_goes_on(tmp_path):
    write_tiny(tmp_path)
    rng = random.Random(3)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    before, noted = 0, []
    for number in range(TORCHRUN_KILLS):
        log = tmp_path / f"log{number}"
        with log.open("wb") as err:
            agent = subprocess.Popen(
                [*torchrun, "-m", "synthward", *fit_arguments(tmp_path)],
                stdout=err,
                stderr=err,
                env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
                start_new_session=True,
            )
        try:
            await_(lambda pid=agent.pid: len(workers(pid)) == 2, PATIENCE, "torchrun has started nothing")
            if number:
                # One is killed while it starts, the others when steps are taken.
                await_(lambda least=before: charged(tmp_path)[0] > least, PATIENCE, "no step was charged")
            time.sleep(rng.uniform(0.0, 0.3))
            victims = workers(agent.pid)
            os.kill(victims[rng.randrange(2)], signal.SIGKILL)
            assert agent.wait(60) != 0, "torchrun calls it a success"
            assert not any(Path(f"/proc/{pid}").exists() for pid in victims), "a rank was left running"
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
        said = [line for line in log.read_text().splitlines() if line.startswith("synthward: ")]
        assert len(said) <= 1 and all("another process of this run stopped" in line for line in said), said
        steps, keys = charged(tmp_path)
        assert before <= steps < STEPS and len(set(keys)) == len(keys) and keys[: len(noted)] == noted
        before, noted = steps, keys
    done = run(*fit_arguments(tmp_path))
    assert done.code == 0, done.stderr[-2000:]
    steps, keys = charged(tmp_path)
    assert steps == STEPS and keys[:-1] == noted and len(set(keys)) == len(keys) and len(noted) > 1
    assert (tmp_path / "run" / "model.safetensors").is_file()
