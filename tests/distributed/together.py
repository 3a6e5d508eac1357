"""Many small pieces of work on one group of ranks: a start costs seconds."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from tests.distributed.launch import RanksFailedError, run_ranks

if TYPE_CHECKING:
    import pytest

Work = Mapping[str, tuple[str, tuple[Any, ...]]]


@dataclass
class Outcome:
    """What a piece of work gave on one rank, or the traceback of how it failed."""

    value: Any = None
    failed: str = ""


def on_ranks(world_size: int, work: Work, *, timeout: float = 120.0) -> Outcomes | Lost:
    """Run pieces of work in turn on one group.

    Args:
        work: by name, "module:function" and arguments.
    """
    try:
        return Outcomes(run_ranks(world_size, "tests.distributed.together:each", dict(work), timeout=timeout))
    except RanksFailedError as error:
        return Lost(world_size, str(error))


def wanted_on_ranks(
    request: pytest.FixtureRequest, world_size: int, work: Work, *, timeout: float = 120.0
) -> Outcomes | Lost | Asked:
    """All pieces on one group, unless a few of a module's tests alone were asked for."""
    wanted = [item for item in request.session.items if item.path == request.path]
    return Asked(world_size, work) if len(wanted) <= 3 else on_ranks(world_size, work, timeout=timeout)


class Outcomes:
    """Of all pieces of work, on all ranks."""

    def __init__(self, by_rank: list[dict[str, Outcome]]) -> None:
        self._by_rank = by_rank

    def __getitem__(self, name: str) -> list[Any]:
        """What a piece of work gave, by rank; `AssertionError` where it failed."""
        for rank, outcomes in enumerate(self._by_rank):
            assert not outcomes[name].failed, f"rank {rank}:\n{outcomes[name].failed}"
        return [outcomes[name].value for outcomes in self._by_rank]

    def __len__(self) -> int:
        return len(self._by_rank)


class Lost:
    """`Outcomes` of a group that failed as a whole: every test that asks says so, without another start."""

    def __init__(self, world_size: int, how: str) -> None:
        self._world_size, self._how = world_size, how

    def __getitem__(self, name: str) -> list[Any]:
        raise AssertionError(f"{name}: {self._how}")

    def __len__(self) -> int:
        return self._world_size


class Asked:
    """`Outcomes` where only a few pieces are wanted: each gets a group of its own when it is asked for."""

    def __init__(self, world_size: int, work: Work) -> None:
        self._world_size, self._work = world_size, work
        self._found: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._found:
            self._found[name] = on_ranks(self._world_size, {name: self._work[name]})[name]
        return self._found[name]

    def __len__(self) -> int:
        return self._world_size


def each(work: Work) -> dict[str, Outcome]:
    """What a rank does. Work that fails on all ranks does not end the others."""
    found: dict[str, Outcome] = {}
    for name, (function, arguments) in work.items():
        # What stands last when a rank hangs.
        print(name, file=sys.stderr, flush=True)
        try:
            found[name] = Outcome(call(function, *arguments))
        except Exception:
            found[name] = Outcome(failed=traceback.format_exc())
        failed: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failed, found[name].failed)
        # Where some went on and some did not, what follows can not be trusted.
        if any(failed) and not all(failed):
            raise AssertionError(f"{name}: not all ranks failed\n" + "\n".join(failed))
    return found


def call(function: str, *arguments: Any) -> Any:
    """Call what is named "module:function"."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments)
