"""Kills one of two ranks while they save checkpoints, again and again, and looks at what is left.

Run as a script: folder, number of kills, seed. The ranks are forked from a process that has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synthward.engine.distributed.checkpoint import is_saved, load_sharded, read_index, save_sharded
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import RankLostError

SIZE, WIDTH = 2, 200_000
LOST, PATIENCE, ALONE_SECONDS = 3, 30.0, 8.0


class Trap:
    """Kills its own process at the n-th call that changes a folder; never if n is 0."""

    def __init__(self, at: int) -> None:
        self.left = at

    def point(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """Points before and after every call."""
        original: Callable[..., Any] = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            self.point()
            result = original(*args, **kwargs)
            self.point()
            return result

        setattr(owner, name, trapped)


def tensors(number: int) -> dict[str, torch.Tensor]:
    """A checkpoint in which every element tells which one it is of."""
    return {f"t{i}": torch.full((WIDTH + i,), number, dtype=torch.int64) for i in range(4)}


def keep_saving(path: Path, store: Path, rank: int, side: int, at: int) -> None:
    """Save checkpoints, each numbered one more than the last, for ever; killed at a point, or, if it is below 0, at one
    of the replacement of the index alone."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=PATIENCE),
    )
    ranks = Ranks.current()
    ranks.barrier()
    ready(store, rank).touch()
    trap = Trap(abs(at))
    for owner, name in (
        (Path, "replace"),
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (shutil, "rmtree"),
    ):
        if at > 0 or name == "replace":
            trap.around(owner, name)
    number = ranks.lead(lambda: read_index(path).info["number"] if is_saved(path) else 0)
    while True:
        number += 1
        save_sharded(path, tensors(number), ranks, {"number": number})
        os.write(side, f"{number}\n".encode())


def ready(store: Path, rank: int) -> Path:
    """Is there when a rank has its group: before, there is none to lose."""
    return store.with_name(f"{store.name}-{rank}")


def start(path: Path, store: Path, rank: int, side: Path, at: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(90)
        keep_saving(path, store, rank, os.open(side, os.O_WRONLY | os.O_CREAT | os.O_APPEND), at)
    except RankLostError:
        code = LOST
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def once(folder: Path, number: int, rng: random.Random) -> dict[str, int]:
    """Start two ranks, kill one; what was found then, as counts."""
    path, side, store = folder / "kept", folder / "returned", folder / f"store{number}"
    last = read_index(path).info["number"] if is_saved(path) else 0
    victim, by_time = rng.randrange(SIZE), rng.random() < 0.4
    at = 0 if by_time else rng.randint(1, 40 if victim == 0 else 12)
    if number % 6 == 0:
        # Right before the index is replaced, and right after.
        victim, by_time, at = 0, False, -1 - number // 6 % 2
    pids = [start(path, store, rank, side, at if rank == victim else 0) for rank in range(SIZE)]
    if by_time:
        end = time.monotonic() + PATIENCE
        while not all(ready(store, rank).exists() for rank in range(SIZE)):
            assert time.monotonic() < end, "the ranks found no group"
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.5))
        os.kill(pids[victim], signal.SIGKILL)
    status = os.waitpid(pids[victim], 0)[1]
    other = ended(pids[1 - victim], ALONE_SECONDS)
    what = f"kill {number} of rank {victim} ({'by time' if by_time else f'at point {at}'})"
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{what}: {status}"
    lost = os.WIFEXITED(other) and os.WEXITSTATUS(other) == LOST
    assert lost or os.WTERMSIG(other) == signal.SIGTERM, f"{what}: the other ended with {other}"
    returned = max([last, *(int(line) for line in side.read_text().split())]) if side.exists() else last
    if is_saved(path):
        found = read_index(path).info["number"]
        values = load_sharded(path, None, Ranks.alone())
        assert all(torch.equal(values[name], wanted) for name, wanted in tensors(found).items()), what
    else:
        found = 0
    assert returned <= found <= returned + 1, f"{what}: {found} is kept, {returned} was returned"
    left = [p for p in path.glob("data-*") if not is_saved(path) or p.name != data_of(path)]
    return {"old": found == returned, "new": found == returned + 1, "leftovers": bool(left), "lost": lost}


def ended(pid: int, seconds: float) -> int:
    """How a rank ends that was left alone; who does not see it within some seconds is ended, as by `torchrun`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    return os.waitpid(pid, 0)[1]


def data_of(path: Path) -> str:
    return next(iter(read_index(path).files)).split("/")[0]


def main(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    total = {"kills": 0, "old": 0, "new": 0, "leftovers": 0, "lost": 0}
    for number in range(kills):
        for name, count in once(folder, number, rng).items():
            total[name] += count
        total["kills"] += 1
    path = folder / "kept"
    save_sharded(path, tensors(0), Ranks.alone(), {"number": 0})
    assert sorted(p.name for p in path.iterdir()) == [data_of(path), "index.json"], "something was left lying"
    print(json.dumps(total))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
