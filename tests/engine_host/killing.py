"""A warm process that forks children, kills them with SIGKILL, and looks at what each one left. Run as a script.

A child trains for real: by a ledger and a trainer in a loop of its own, or by a whole `fit`. It notes in a side file,
by one write each, what was released, after it was released, and which noise it was released with. A kill strikes at a
random time, or at one of the points where something becomes durable or known: before or after a write, a flush, a
rename or a release. The parent is warm: all is imported, and the accountant's answers are remembered. Torch has one
thread and starts no others, and Arrow begins with new ones after a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimizers' constructors import it, in seconds

from synthward.engine import KeySchedule, Ledger, PrivacyPlan, PrivateTrainer, QueryMechanism
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of
from synthward.engine.checkpoint import load_checkpoint, save_checkpoint
from synthward.engine.step import DPStep
from synthward.run import FitOptions, fit_run, training
from synthward.schema import load_schema

DELTA, RATE, SIGMA, QUERY_SIGMA = 1e-5, 0.05, 2.0, 10.0
LEASE, FIT_STEPS, FIT_LEASE = 5, 60, 12
Child = Callable[[Path, int], None]


class Trap:
    """Kills its own process at the n-th point; never if n is 0."""

    def __init__(self, at: int) -> None:
        self.left = at

    def point(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """Points before and after every call of ``owner.name``."""
        original = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            self.point()
            result = original(*args, **kwargs)
            self.point()
            return result

        setattr(owner, name, trapped)


def note(side: int, kind: str, noise: bytes) -> None:
    """One release, as one line by one unbuffered write."""
    _write(side, f"{kind} {hashlib.sha256(noise).hexdigest()}\n".encode())


_write = os.write  # as it is before a trap is laid around it


def train(folder: Path, side: int) -> None:
    """A loop of one's own: leases, steps, queries, checkpoints, for ever."""
    path, kept = folder / "ledger.jsonl", folder / "checkpoint.safetensors"
    keys = KeySchedule.from_os()
    module = torch.nn.Linear(4, 8)
    plan = PrivacyPlan(
        sample_rate=RATE, noise_multiplier=SIGMA, max_grad_norm=1.0, steps=10**6, expected_batch_size=4
    )
    tensors, info = load_checkpoint(kept) if kept.is_file() else (None, {})
    if path.is_file() and path.stat().st_size:
        ledger = Ledger.open(path, expected_head=info.get("ledger_head"))
        ledger.add_key(keys.key_id)
    else:
        ledger = Ledger.create(
            path, run_id="r", unit="patient", delta=DELTA, key_id=keys.key_id, private=True, accountant="rdp"
        )
    trainer = PrivateTrainer(
        module, torch.optim.SGD(module.parameters(), lr=0.1), plan, keys=keys, ledger=ledger
    )
    if tensors is not None:
        trainer.load_state_dict(tensors)
    trainer.advance_to(charged(ledger)[0])
    queries = QueryMechanism(ledger, keys)
    while True:
        answer = queries.gaussian_vector(
            np.zeros(8), l2_sensitivity=1.0, noise_multiplier=QUERY_SIGMA, note="a query"
        )
        note(side, "query", answer.tobytes())
        first = trainer.steps_done
        ledger.lease(plan.event(1), first, LEASE)
        for _ in range(LEASE):
            note(side, "step", one_step(trainer, module))
        save_checkpoint(kept, trainer.state_dict(), {"ledger_head": ledger.head})
        ledger.close_lease(LEASE)


def one_step(trainer: PrivateTrainer, module: torch.nn.Linear) -> bytes:
    """A step over four invented units; returns the noise on weights whose input is always 0."""
    inputs = torch.randn(4, 4)
    inputs[:, 3] = 0.0
    with torch.no_grad():
        module.weight[:, 3] = 0.0
    with trainer.capture():
        losses = module(inputs).square().sum(1)
    trainer.backward(losses, rows_per_unit=1)
    trainer.apply()
    return module.weight[:, 3].detach().numpy().tobytes()


def fit(folder: Path, side: int) -> None:
    """The whole of `synthward fit`; steps and queries are noted as they come back."""
    apply, ask = PrivateTrainer.apply, QueryMechanism.gaussian_vector

    def applied(self: PrivateTrainer) -> None:
        step = self.steps_done
        apply(self)
        note(side, "step", noise_key.get("key", b"") + step.to_bytes(8, "big"))

    def asked(self: QueryMechanism, *args: Any, **kwargs: Any) -> Any:
        answer = ask(self, *args, **kwargs)
        note(side, "query", np.asarray(answer).tobytes())
        return answer

    noise_key: dict[str, bytes] = {}
    from_os = KeySchedule.from_os

    def drawn() -> KeySchedule:
        keys = from_os()
        noise_key["key"] = keys.key("noise")
        return keys

    PrivateTrainer.apply, QueryMechanism.gaussian_vector = applied, asked  # type: ignore[method-assign]
    KeySchedule.from_os = staticmethod(drawn)  # type: ignore[assignment]
    whole_fit(folder)


def whole_fit(folder: Path) -> None:
    options = FitOptions(
        accountant="rdp", steps=FIT_STEPS, sample_rate=0.1, settings={"hidden": 8, "blocks": 1}
    )
    data = folder.parent
    budget = data / "budget.jsonl"
    fit_run(
        data / "data.csv",
        load_schema(data / "schema.toml"),
        epsilon=3.0,
        delta=DELTA,
        out=folder,
        options=options,
        resume=True,
        budget_file=budget if budget.exists() else None,
    )


def charged(ledger: Ledger) -> tuple[int, int]:
    """Training steps and queries that a ledger charges."""
    events = ledger.events()
    steps = sum(e.steps for e in events if isinstance(e, PoissonGaussianEvent))
    return steps, sum(e.count for e in events if isinstance(e, GaussianEvent))


def run_child(child: Child, folder: Path, side: Path, *, at: int = 0, after: float | None = None) -> int:
    """Fork, and kill at the ``at``-th point or ``after`` seconds; returns the status of `os.waitpid`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            trap = Trap(at)
            for owner, name in (
                (os, "write"),
                (os, "fsync"),
                (os, "ftruncate"),
                (Path, "replace"),
                (DPStep, "release"),
            ):
                trap.around(owner, name)
            child(folder, os.open(side, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def check(path: Path, side: Path, what: str) -> tuple[int, int]:
    """The ledger charges at least what was released; returns what was."""
    lines = side.read_text().split("\n") if side.exists() else []
    steps, queries = (sum(line.startswith(kind) for line in lines) for kind in ("step ", "query "))
    if path.is_file() and path.stat().st_size:
        with Ledger.open(path, readonly=True) as ledger:
            found, spent = charged(ledger), ledger.epsilon(accountant="rdp")
            events = ledger.events()
        assert found[0] >= steps and found[1] >= queries, f"{what}: {found} < {(steps, queries)}"
        cheapest = [e.with_steps(steps) for e in events if isinstance(e, PoissonGaussianEvent)][:1]
        asked = [GaussianEvent(e.noise_multiplier, queries) for e in events if isinstance(e, GaussianEvent)]
        assert spent >= epsilon_of([*cheapest, *asked[:1]], DELTA, "rdp"), what
    else:
        assert not steps and not queries, f"{what}: released without a ledger"
    return steps, queries


def trainer_kills(folder: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Runs of the loop, each killed 15 times."""
    total = {"kills": 0, "steps": 0, "queries": 0, "noises": 0}
    noises: set[str] = set()
    for number in range(kills):
        run = folder / f"run{number // 15}"
        run.mkdir(exist_ok=True)
        side = run / "released"
        how: dict[str, Any] = {"after": rng.uniform(0.0, 0.12)} if number % 2 else {"at": rng.randint(1, 120)}
        status = run_child(train, run, side, **how)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"kill {number}: {status}"
        total["kills"] += 1
        released = check(run / "ledger.jsonl", side, f"kill {number} {how}")
        if number % 15 == 14 or number == kills - 1:
            total["steps"] += released[0]
            total["queries"] += released[1]
            with Ledger.open(run / "ledger.jsonl", readonly=True) as ledger:
                ours = charged(ledger)
            # A kill may lose one lease and one query, not more.
            assert ours[0] <= released[0] + LEASE * 15 and ours[1] <= released[1] + 15
            noises |= distinct(side, noises)
    total["noises"] = len(noises)
    return total


def fit_kills(folder: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Runs of `fit`, killed until one comes to its end; the killed one goes on where it stopped."""
    total = {"kills": 0, "steps": 0, "queries": 0, "noises": 0, "finished": 0}
    noises: set[str] = set()
    whole_fit(folder / "warm")
    number = 0
    while total["kills"] < kills:
        run, side = folder / f"run{number}", folder / f"released{number}"
        # Late kills are at times; early ones, where most that is delicate happens, at points.
        how: dict[str, Any] = (
            {"after": rng.uniform(0.0, 1.2)} if rng.random() < 0.5 else {"at": rng.randint(1, 90)}
        )
        status = run_child(fit, run, side, **how)
        killed = os.WIFSIGNALED(status)
        assert (os.WTERMSIG(status) == signal.SIGKILL) if killed else status == 0, f"{number} {how}: {status}"
        total["kills"] += killed
        released = check(run / "ledger.jsonl", side, f"fit {number} {how}")
        if not killed:
            total["finished"] += 1
        elif total["kills"] < kills:
            continue
        else:
            assert run_child(fit, run, side) == 0, "the last run can not be finished"
            total["finished"] += 1
            released = check(run / "ledger.jsonl", side, "the last run")
        with Ledger.open(run / "ledger.jsonl", readonly=True) as ledger:
            assert charged(ledger)[0] == FIT_STEPS and ledger.epsilon() <= 3.0 * (1 + 1e-9)
        assert (run / "model.safetensors").is_file()
        total["steps"] += released[0]
        total["queries"] += released[1]
        noises |= distinct(side, noises)
        number += 1
    total["noises"] = len(noises)
    return total


def distinct(side: Path, before: set[str]) -> set[str]:
    """The noises of a run, which nothing was released with before."""
    found = [line.split()[1] for line in side.read_text().splitlines()] if side.exists() else []
    assert len(set(found)) == len(found) and not before & set(found), f"{side}: noise was used twice"
    return set(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    training.LEASE_STEPS = FIT_LEASE
    where, kind, count, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    loop = {"trainer": trainer_kills, "fit": fit_kills}[kind]
    print(json.dumps(loop(where, count, random.Random(seed))))
