"""Sums and copies of flat tensors over all ranks, in equal slices, without waiting for them.

On a CPU the sum of a slice is taken in the order of the ranks by the one who owns it (gloo's own reduce-scatter moves
and adds all slices on every rank: twice the time, measured on two ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from synthward.engine.distributed.ranks import Ranks

# Their names before and since torch 2.13.
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """An exchange that was begun; `wait` ends it."""

    def __init__(self, ranks: Ranks, works: list[Any], then: Callable[[], None] | None = None) -> None:
        self._ranks, self._works, self._then = ranks, works, then

    def wait(self) -> None:
        """Returns when the result is there."""
        with self._ranks.exchanging():
            for work in self._works:
                work.wait()
        if self._then is not None:
            self._then()
        self._works, self._then = [], None


def start_reduce_scatter(ranks: Ranks, whole: Tensor, own: Tensor) -> Pending:
    """Put the sum over ranks of this rank's slice of `whole` [W n] into `own` [n], which may be that slice itself."""
    with ranks.exchanging():
        if ranks.backend_of(whole.device) != "gloo":
            work = _reduce_scatter(own, whole, group=ranks.group, async_op=True)
            return Pending(ranks, [work])
        received = torch.empty_like(whole)
        work = dist.all_to_all_single(received, whole, group=ranks.group, async_op=True)

    def add() -> None:
        torch.sum(received.view(ranks.world_size, -1), 0, out=own)

    return Pending(ranks, [work], add)


def start_all_gather(ranks: Ranks, whole: Tensor) -> Pending:
    """Copy each rank's slice of `whole` [W n] to all others, in place."""
    size, rank = ranks.world_size, ranks.rank
    slices = whole.view(size, -1)
    with ranks.exchanging():
        if ranks.backend_of(whole.device) != "gloo":
            return Pending(ranks, [_all_gather(whole, slices[rank], group=ranks.group, async_op=True)])
        operations = []
        for distance in range(1, size):
            to, source = (rank + distance) % size, (rank - distance) % size
            operations.append(dist.P2POp(dist.isend, slices[rank], group=ranks.group, group_peer=to))
            operations.append(dist.P2POp(dist.irecv, slices[source], group=ranks.group, group_peer=source))
        return Pending(ranks, dist.batch_isend_irecv(operations))


def sum_over(ranks: Ranks, value: Tensor) -> Tensor:
    """The sum over ranks of a small tensor, in place."""
    if ranks.group is not None:
        with ranks.exchanging():
            dist.all_reduce(value, group=ranks.group)
    return value


def copy_from_main(ranks: Ranks, tensors: list[Tensor]) -> None:
    """Give all ranks what rank 0 has in these tensors."""
    if ranks.group is None:
        return
    with ranks.exchanging(), torch.no_grad():
        for tensor in tensors:
            sent = tensor.contiguous()
            dist.broadcast(sent, group=ranks.group, group_src=0)
            if sent is not tensor:
                tensor.copy_(sent)
