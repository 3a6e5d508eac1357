"""Kill -9 at random points: the ledger that is left never reports less than what was released."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of

KILLS = 25
DELTA = 1e-5
STEP = PoissonGaussianEvent(0.05, 2.0, 1)
QUERY = GaussianEvent(10.0, 1)

# Reports each release to a side file (unbuffered) only after the ledger let it pass.
CHILD = """
import os, random, sys
from synthward.engine import Ledger
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent
path, side, first, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
out = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
step = PoissonGaussianEvent(0.05, 2.0, 1)
rng = random.Random(seed)
ledger = Ledger.open(path)
ledger.add_key(f"{seed:032x}")
print("ready", flush=True)
while True:
    if rng.random() < 0.2:
        ledger.append_event(GaussianEvent(10.0, 1), note="a query")
        os.write(out, b"q")
    steps = rng.randint(1, 6)
    ledger.lease(step, first, steps)
    used = rng.randint(0, steps)
    for i in range(used):
        assert ledger.covers(first + i, step)
        os.write(out, b"s")
        if rng.random() < 0.1:
            ledger.append_event(GaussianEvent(10.0, 1), note="a query in the middle")
            os.write(out, b"q")
    ledger.close_lease(used)
    first += used
"""


def charged(ledger: Ledger) -> tuple[int, int]:
    """Training steps and queries that the ledger charges."""
    events = ledger.events()
    steps = sum(e.steps for e in events if isinstance(e, PoissonGaussianEvent))
    return steps, sum(e.count for e in events if isinstance(e, GaussianEvent))


def run_and_kill(path: Path, side: Path, first: int, seed: int, after: float) -> None:
    """A child that writes as fast as it can, killed `after` seconds from its first line on."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(side), str(first), str(seed)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_process_never_released_more_than_is_charged(tmp_path):
    path, side, rng = tmp_path / "ledger.jsonl", tmp_path / "released", random.Random(5)
    Ledger.create(path, run_id="r", unit="patient", delta=DELTA, key_id="ab" * 16, private=True).close()
    side.write_bytes(b"")
    for kill in range(KILLS):
        with Ledger.open(path, readonly=True) as ledger:
            first = charged(ledger)[0]
        run_and_kill(path, side, first, kill, rng.uniform(0.0, 0.05))
        released = side.read_bytes()
        with Ledger.open(path) as ledger:
            steps, queries = charged(ledger)
        assert steps >= released.count(b"s") and queries >= released.count(b"q"), f"kill {kill}"
    assert released.count(b"s") > KILLS and b"q" in released, "the children did too little to show anything"
    truth = [PoissonGaussianEvent(0.05, 2.0, released.count(b"s")), GaussianEvent(10.0, released.count(b"q"))]
    with Ledger.open(path) as ledger:
        # One lease of at most 6 steps and one query may be lost to each kill, not more.
        assert steps <= released.count(b"s") + 6 * KILLS and queries <= released.count(b"q") + KILLS
        assert ledger.epsilon(accountant="rdp") >= epsilon_of(truth, DELTA, "rdp")
