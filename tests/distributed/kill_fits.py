"""Kills ranks of `fit` at random points and times, and compares what was released with what is charged.

`main` runs in a process that has imported everything and forks the ranks, in the environment that `torchrun` makes. A
third process keeps their store, as torchrun's agent does; and as the agent does, the test ends a rank that can not know
that another one is gone.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from synthward import cli
from synthward.engine import Ledger, PrivateTrainer, QueryMechanism
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of
from synthward.engine.distributed import ranks as ranks_module
from synthward.engine.distributed.checkpoint import is_saved, load_sharded
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.step import DPStep
from synthward.run import training
from synthward.run.folder import RunFolder
from synthward.run.training import Training
from tests.distributed.kill_saves import Trap, ended

EPSILON, DELTA, STEPS, LEASE = 3.0, 1e-5, 48, 8
FIT = [
    *("--epsilon", str(EPSILON), "--delta", str(DELTA), "--steps", str(STEPS), "--sample-rate", "0.1"),
    *("--accountant", "rdp", "--set", "hidden=8", "--set", "blocks=1"),
]
LOST = "another process of this run stopped"
ALONE_SECONDS = 8.0
# Files of a run: at any time, and besides while one is replaced.
FILES = {
    "run.json",
    "schema.toml",
    "ledger.jsonl",
    "encoder.json",
    "model.safetensors",
    "checkpoint",
    "log.jsonl",
}
_write = os.write  # as it is before a trap is laid around it


@dataclass
class Attempt:
    """One start of the processes of a run, and what they noted."""

    number: int
    folder: Path
    size: int
    statuses: list[int] = field(default_factory=list)

    def notes(self, rank: int, kind: str) -> list[str]:
        """What was noted before the kill: `joined`, `key` (its id), `step` (its number), `query` (the noise's hash)."""
        file = self.side(rank)
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.split()[1] for line in lines if line.split()[0] == kind]

    def side(self, rank: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}-notes-{self.number}-{rank}")

    def stderr(self, rank: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}-stderr-{self.number}-{rank}")

    def told(self, rank: int) -> list[str]:
        text = self.stderr(rank).read_text()
        assert "Traceback" not in text, text[-3000:]
        return [line for line in text.splitlines() if line.startswith("synthward: error")]


def be_a_rank(attempt: Attempt, rank: int, port: int, at: int, *, resume: bool) -> int:
    """`synthward fit` on one of the ranks; what it does is noted before it is done."""
    out = os.open(attempt.stderr(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    notes = os.open(attempt.side(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(attempt.size)}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    _take_notes(notes)
    trap = Trap(at)
    places: list[tuple[Any, str]] = [
        *((os, name) for name in ("write", "fsync", "ftruncate")),
        *((Path, name) for name in ("replace", "mkdir", "unlink")),
        *((dist, name) for name in ("broadcast_object_list", "all_gather_object", "barrier")),
        (DPStep, "release"),
    ]
    for owner, name in places:
        trap.around(owner, name)
    data = attempt.folder.parent
    arguments = ["fit", data / "data.csv", "--schema", data / "schema.toml", "--out", attempt.folder, *FIT]
    return cli.main([str(word) for word in (*arguments, *(["--resume"] if resume else []))])


def _take_notes(notes: int) -> None:
    def note(kind: str, value: object) -> None:
        _write(notes, f"{kind} {value}\n".encode())

    join, begin = ranks_module._join, Training.__init__
    apply, ask = PrivateTrainer.apply, QueryMechanism.gaussian_vector

    def joined(*args: Any) -> Any:
        found = join(*args)
        note("joined", "-")
        return found

    def begun(self: Training, *args: Any, **kwargs: Any) -> None:
        note("key", args[4].key_id)
        begin(self, *args, **kwargs)

    def applied(self: PrivateTrainer) -> None:
        note("step", self.steps_done)
        apply(self)

    def asked(self: QueryMechanism, *args: Any, **kwargs: Any) -> Any:
        answer = ask(self, *args, **kwargs)
        note("query", hashlib.sha256(np.asarray(answer).tobytes()).hexdigest())
        return answer

    ranks_module._join, Training.__init__ = joined, begun  # type: ignore[method-assign]
    PrivateTrainer.apply, QueryMechanism.gaussian_vector = applied, asked  # type: ignore[method-assign]


def fork(work: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(100)
        code = work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        sys.stderr.flush()
        os._exit(code)


def keep_store(pipe: int) -> int:
    """The store of a group, as torchrun's agent keeps it; never returns."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _write(pipe, f"{store.port}\n".encode())
    while True:
        time.sleep(60)


def start(attempt: Attempt, victim: int, at: int, after: float | None) -> None:
    """Run the processes of an attempt until all have ended; one is killed at a point, or after some seconds."""
    resume = (attempt.folder / "run.json").exists()
    reading, writing = os.pipe()
    agent = fork(lambda: keep_store(writing))
    port = int(os.read(reading, 16))
    pids = [
        fork(lambda rank=rank: be_a_rank(attempt, rank, port, at if rank == victim else 0, resume=resume))
        for rank in range(attempt.size)
    ]
    began, found = time.monotonic(), dict.fromkeys(pids, -1)
    while -1 in found.values():
        if after is not None and time.monotonic() - began > after and found[pids[victim]] == -1:
            os.kill(pids[victim], signal.SIGKILL)
            after = None
        for pid in [pid for pid, status in found.items() if status == -1]:
            is_over, status = os.waitpid(pid, os.WNOHANG)
            if is_over:
                found[pid] = status
        if any(os.WIFSIGNALED(status) for status in found.values() if status != -1):
            # Who waits for a group, or for rank 0 to read the records, is ended by torchrun alone.
            is_up = all(attempt.notes(rank, "key") for rank in range(attempt.size))
            for pid in [pid for pid, status in found.items() if status == -1]:
                found[pid] = ended(pid, ALONE_SECONDS if is_up else 0.5)
        time.sleep(0.005)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    os.close(reading)
    os.close(writing)
    attempt.statuses = list(found.values())


class Run:
    """A run that is started until it is complete, and what must hold after every attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempts: list[Attempt] = []

    def attempt(self, size: int, victim: int = 0, at: int = 0, after: float | None = None) -> dict[str, int]:
        """One more start; what happened, as counts."""
        attempt = Attempt(len(self.attempts), self.folder, size)
        self.attempts.append(attempt)
        start(attempt, victim, at, after)
        what = (
            f"{self.folder.name}, attempt {attempt.number} on {size}, rank {victim}, at {at} or after {after}"
        )
        killed = os.WIFSIGNALED(attempt.statuses[victim])
        assert killed or attempt.statuses == [0] * size, (
            f"{what}: {attempt.statuses}: {[attempt.stderr(rank).read_text()[-1500:] for rank in range(size)]}"
        )
        self.check_ledger(what)
        check_files(self.folder, what)
        counts = {"kills": int(killed), "one": int(killed and size == 1)}
        if killed and size > 1:
            counts |= self.check_survivor(attempt, 1 - victim, what)
        return counts

    def check_survivor(self, attempt: Attempt, rank: int, what: str) -> dict[str, int]:
        """It has said in one line what happened and ended, or was ended before there was anything to notice."""
        status, told = attempt.statuses[rank], attempt.told(rank)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGTERM and len(told) <= 1, (
                f"{what}: the other: {status} {told}"
            )
            is_up = all(attempt.notes(r, "key") for r in range(attempt.size))
            return {"unnoticed": int(is_up)}
        if os.WEXITSTATUS(status) == 0:
            return {"done": 1}
        assert os.WEXITSTATUS(status) == cli.USER_ERROR and len(told) == 1 and LOST in told[0], (
            f"{what}: the other ended with {status}: {attempt.stderr(rank).read_text()[-3000:]}"
        )
        return {"told": 1}

    def check_ledger(self, what: str) -> None:
        """Nothing was released that is not charged; no step was taken twice; no key was used twice."""
        by_attempt, keys, queries = [], [], []
        for attempt in self.attempts:
            numbers = [[int(n) for n in attempt.notes(rank, "step")] for rank in range(attempt.size)]
            assert all(len(set(n)) == len(n) for n in numbers), f"{what}: a step was taken twice"
            by_attempt.append({step for taken in numbers for step in taken})
            found = {key for rank in range(attempt.size) for key in attempt.notes(rank, "key")}
            assert len(found) <= 1, f"{what}: the ranks have keys of their own"
            keys += list(found)
            queries += attempt.notes(0, "query")
        steps = set().union(*by_attempt)
        assert sum(map(len, by_attempt)) == len(steps), f"{what}: a step was taken again"
        assert len(set(keys)) == len(keys) and len(set(queries)) == len(queries), (
            f"{what}: a key is used twice"
        )
        path = self.folder / "ledger.jsonl"
        if not path.is_file() or not path.stat().st_size:
            assert not steps and not queries and not keys, f"{what}: released without a ledger"
            return
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        noted = [line["key_id"] for line in lines if "key_id" in line]
        assert len(set(noted)) == len(noted) and set(keys) <= set(noted), (
            f"{what}: keys {keys}, noted {noted}"
        )
        with Ledger.open(path, readonly=True) as ledger:
            events, spent = ledger.events(), ledger.epsilon(accountant="rdp")
        charged = sum(e.steps for e in events if isinstance(e, PoissonGaussianEvent))
        asked = sum(e.count for e in events if isinstance(e, GaussianEvent))
        assert charged >= len(steps) and asked >= len(queries), f"{what}: {charged} < {len(steps)}"
        assert not steps or max(steps) < STEPS
        least = [e.with_steps(len(steps)) for e in events if isinstance(e, PoissonGaussianEvent) and steps][
            :1
        ]
        least += [
            GaussianEvent(e.noise_multiplier, len(queries)) for e in events if isinstance(e, GaussianEvent)
        ][:1]
        assert spent >= epsilon_of(least, DELTA, "rdp"), what
        # A kill loses one lease, and one query, not more.
        killed = sum(any(map(os.WIFSIGNALED, attempt.statuses)) for attempt in self.attempts)
        assert charged <= len(steps) + LEASE * killed and asked <= len(queries) + killed, what

    def check_complete(self) -> int:
        """All that was planned is charged, no more; returns the steps taken."""
        with Ledger.open(self.folder / "ledger.jsonl", readonly=True) as ledger:
            charged = sum(e.steps for e in ledger.events() if isinstance(e, PoissonGaussianEvent))
            assert charged == STEPS and ledger.epsilon() <= EPSILON * (1 + 1e-9)
        names = {entry.name for entry in self.folder.iterdir()}
        assert names == FILES - {"checkpoint"} and RunFolder(self.folder).is_complete, names
        return sum(len({*a.notes(0, "step"), *a.notes(a.size - 1, "step")}) for a in self.attempts)


def allowed_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what may be kept: parameters, their moments and averages, counters."""
    run = RunFolder(folder)
    generator = run.new_generator(run.load_encoder())
    found: dict[str, tuple[int, ...]] = {"step": (), "trainer.step": ()}
    for name, parameter in generator.private_module.named_parameters():
        for part in ("parameter", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            found[f"trainer.{part}.{name}"] = tuple(parameter.shape)
        found[f"trainer.optimizer.step.{name}"] = ()
        found[f"averaged.{name}"] = found[f"generator.averaged.{name}"] = tuple(parameter.shape)
    shift = tuple(generator.logit_shift.shape)  # type: ignore[attr-defined]
    return found | {"generator.logit_shift": shift, "logit_shift": shift}


def check_files(folder: Path, what: str) -> None:
    """Only files that are known lie in a run, and only tensors that are known in them, whole or cut off by a kill."""
    if not folder.exists():
        return
    for entry in folder.iterdir():
        name = entry.name.removeprefix(".").removesuffix(".tmp")
        assert name in FILES, f"{what}: {entry.name} lies in the run"
    for file in (folder / "checkpoint").rglob("*"):
        known = file.name in ("index.json", "index.json.part") or file.suffix == ".safetensors"
        assert known or (file.is_dir() and file.name.startswith("data-")), f"{what}: {file}"
    if not (folder / "encoder.json").exists():
        return
    allowed = allowed_tensors(folder)
    if is_saved(folder / "checkpoint"):
        whole = load_sharded(folder / "checkpoint", None, Ranks.alone())
        assert "step" in whole and all(value.isfinite().all() for value in whole.values()), what
    for file in folder.rglob("*.safetensors"):
        for name, shape in shapes_of(file).items():
            assert allowed.get(name) == shape, f"{what}: {file.name} holds {name} {shape}"


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def check_shared_memory(before: set[str]) -> None:
    """What a kill leaves in memory that has a name was not written to yet: sums without noise come later."""
    for name in {p.name for p in SHARED.glob("synthward-*")} - before:
        block = (SHARED / name).read_bytes()[64:]
        (SHARED / name).unlink()
        assert not any(block), f"{name}: {len(block)} bytes were left"


SHARED = Path("/dev/shm")


def main(folder: str, kills: int, seed: int) -> dict[str, int]:
    """Kill until `kills` kills were made, then let the last run come to its end; returns counts."""
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(1)
    training.LEASE_STEPS = LEASE
    rng, before = random.Random(seed), {p.name for p in SHARED.glob("synthward-*")}
    total = dict.fromkeys(("kills", "one", "told", "done", "unnoticed", "finished", "steps", "attempts"), 0)
    baseline = Run(Path(folder) / "baseline")
    began = time.monotonic()
    baseline.attempt(2)
    seconds = time.monotonic() - began
    assert baseline.check_complete() == STEPS
    number = 0
    run = Run(Path(folder) / "run0")
    while total["kills"] < kills or (run.attempts and not is_complete(run.folder)):
        size = 1 if rng.random() < 0.2 else 2
        victim, late = rng.randrange(size), rng.random() < 0.5
        how: dict[str, Any] = (
            {"after": rng.uniform(0.0, seconds)}
            if late
            else {"at": rng.randint(1, 150 if victim == 0 else 80)}
        )
        began = time.monotonic()
        counts = run.attempt(size, victim, **(how if total["kills"] < kills else {}))
        if not counts["kills"]:
            # The machine had other work before.
            seconds = min(seconds, time.monotonic() - began)
        for name, count in counts.items():
            total[name] += count
        total["attempts"] += 1
        check_shared_memory(before)
        if is_complete(run.folder):
            total["finished"] += 1
            total["steps"] += run.check_complete()
            number += 1
            run = Run(Path(folder) / f"run{number}")
    return total


def is_complete(folder: Path) -> bool:
    return (folder / "run.json").exists() and RunFolder(folder).is_complete
