"""The helper that starts ranks: results, errors, hangs, and nothing left running."""

from __future__ import annotations

import os
import re
import sys
import time

import pytest

from tests.distributed.launch import RanksFailedError, run_ranks, started


def add_up(first: int, fail: str) -> tuple[int, int]:
    """The sum of all ranks' numbers, and this process's id."""
    import torch
    import torch.distributed as dist

    print("process", os.getpid(), file=sys.stderr, flush=True)
    if fail == "raise" and dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    if fail == "hang" and dist.get_rank() == 1:
        time.sleep(600)
    total = torch.tensor(first + dist.get_rank())
    dist.all_reduce(total)
    return int(total), os.getpid()


def named() -> list[str]:
    return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "EXTRA")]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_by_rank():
    assert [total for total, _ in run_ranks(2, add_up, 10, "")] == [21, 21]
    assert run_ranks(1, "tests.distributed.test_launch:named", join=False, environment={"EXTRA": "e"}) == [
        ["0", "0", "1", "1", "e"]
    ]


def test_an_error_is_shown_with_its_rank():
    with pytest.raises(RanksFailedError, match=r"(?s)rank 0 ended.*rank 1 ended with 1.*had enough"):
        run_ranks(2, add_up, 10, "raise")


def test_a_rank_that_hangs_is_shown_and_killed():
    with pytest.raises(RanksFailedError, match=r"(?s)rank 1 did not end in 15 s.*Timeout.*File ") as caught:
        run_ranks(2, add_up, 10, "hang", timeout=15.0)
    pids = [int(found) for found in re.findall(r"process (\d+)", str(caught.value))]
    assert len(pids) == 2 and not any(is_running(pid) for pid in pids)


def test_a_killed_rank_ends_the_others_and_the_block_ends_all():
    with started(3, add_up, 10, "hang") as group:
        deadline = time.monotonic() + 60
        while "process" not in group.stderr(1) and time.monotonic() < deadline:
            time.sleep(0.05)
        group.kill(1)
        assert group.wait(30)[1] == -9 and all(group.statuses())
    with started(1, add_up, 10, "hang", join=False) as group:
        pid = group.processes[0].pid
        assert is_running(pid)
    assert not is_running(pid)
