"""Where the clipped sums of a logical step are added up: one view per parameter of one flat buffer.

With several ranks each of them adds up its own units. The buffer is cut into buckets, and each rank owns one slice of
each: there the sums of all ranks come together. A bucket is exchanged as soon as the last sum in it is complete, while
those of other buckets still form; in the same order on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from synthward.engine.distributed.exchange import Pending, start_all_gather, start_reduce_scatter
from synthward.engine.distributed.hostmem import meet, shared_zeros
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import PrivacyError

# Buckets under way at once: each needs memory of its size on a CPU.
_IN_FLIGHT = 3


class Sums(Protocol):
    """The sums of a step, by position of the parameter."""

    shapes: list[torch.Size]
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, position: int) -> Tensor:
        """What is added to, in the parameter's shape; views of it must not outlive `done`."""

    def begin_pass(self, *, is_last: bool) -> None:
        """A physical batch begins; `is_last`: no other one follows in this step on this rank."""

    def done(self, position: int) -> None:
        """Nothing more is added to this sum in this pass."""

    def end_pass(self) -> None:
        """Nothing more is added in this pass."""

    def complete(self) -> None:
        """From here on `own` holds the sums over all ranks. All ranks take part."""

    def own(self, at: int, length: int) -> Tensor:
        """A stretch of what this rank owns, 1-D: elements ``at : at + length`` of its own coordinates."""

    def release(self) -> None:
        """Everything is zero then. What this rank owns has been used and is zero already, and all ranks have met since
        they read each other's sums."""

    def drop(self) -> None:
        """Forget everything that was added."""


class Buckets:
    """The buckets of a flat buffer of `size` coordinates, and which slice of each is this rank's.

    Attributes:
        length: coordinates with padding, so that all slices of a bucket are of one length.
        bounds: first and last (exclusive) coordinate of each bucket.
    """

    def __init__(self, size: int, ranks: Ranks, align: int) -> None:
        self.ranks = ranks
        unit = align * ranks.world_size
        self.length = -(-size // unit) * unit
        step = min(max(self.length // 8, 1 << 18), 1 << 24)
        step = self.length if ranks.world_size == 1 else -(-step // unit) * unit
        self.bounds = [(start, min(start + step, self.length)) for start in range(0, self.length, step)]

    def own(self, bucket: int) -> tuple[int, int]:
        """This rank's slice of a bucket, in coordinates of the whole buffer."""
        start, stop = self.bounds[bucket]
        length = (stop - start) // self.ranks.world_size
        return start + self.ranks.rank * length, start + (self.ranks.rank + 1) * length

    def gather(self, flat: Tensor, board: Tensor | None = None) -> None:
        """Copy what each rank owns of `flat` to all others; by way of `board`, as long, if all ranks see that one."""
        if self.ranks.world_size == 1:
            return
        if board is not None:
            for bucket in range(len(self.bounds)):
                low, high = self.own(bucket)
                board[low:high] = flat[low:high]
            meet(self.ranks)
            for bucket, (start, stop) in enumerate(self.bounds):
                low, high = self.own(bucket)
                flat[start:low] = board[start:low]
                flat[high:stop] = board[high:stop]
            return
        pending: list[Pending] = []
        for start, stop in self.bounds:
            pending.append(start_all_gather(self.ranks, flat[start:stop]))
            if len(pending) > _IN_FLIGHT:
                pending.pop(0).wait()
        for exchange in pending:
            exchange.wait()


class FlatSums:
    """`Sums` of replicas: each rank holds the whole buffer.

    Args:
        ranges: first and last (exclusive) coordinate of each parameter, and its shape.
        owned: stretches of the buffer that this rank owns, in the order of its own coordinates.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int, torch.Size]],
        buckets: Buckets,
        owned: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.shapes = [shape for _, _, shape in ranges]
        # The sums of all ranks [W, length], where they see each other's.
        self._everybodys: Tensor | None = None
        if buckets.ranks.world_size > 1 and device.type == "cpu":
            self._everybodys = shared_zeros(buckets.ranks, buckets.ranks.world_size, buckets.length, dtype)
        if self._everybodys is None:
            self.flat = torch.zeros(buckets.length, dtype=dtype, device=device)
        else:
            self.flat = self._everybodys[buckets.ranks.rank]
        self._views = [self.flat[start:stop].view(shape) for start, stop, shape in ranges]
        self._buckets, self._owned = buckets, list(owned)
        self._of_position = [
            [b for b, (low, high) in enumerate(buckets.bounds) if low < stop and start < high]
            for start, stop, _ in ranges
        ]
        self._forget()

    def _forget(self) -> None:
        self._missing = [0] * len(self._buckets.bounds)
        for buckets in self._of_position:
            for bucket in buckets:
                self._missing[bucket] += 1
        # Buckets are exchanged from the back, where the backward pass begins.
        self._next = len(self._buckets.bounds) - 1
        self._is_last = False
        self._pending: list[Pending] = []

    def __getitem__(self, position: int) -> Tensor:
        return self._views[position]

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._views)

    def begin_pass(self, *, is_last: bool) -> None:
        if self._is_last:
            raise PrivacyError(
                "a physical batch came after the one that was called the last of its step (is_last=True)"
            )
        self._is_last = is_last and self._buckets.ranks.world_size > 1

    def done(self, position: int) -> None:
        if not self._is_last or self._everybodys is not None:
            return
        for bucket in self._of_position[position]:
            self._missing[bucket] -= 1
        while self._next >= 0 and self._missing[self._next] == 0:
            self._start()

    def end_pass(self) -> None:
        """Sums that no unit reached are exchanged with the rest, by `complete`."""

    def complete(self) -> None:
        if self._buckets.ranks.world_size == 1:
            return
        if self._everybodys is not None:
            meet(self._buckets.ranks)
            others = [r for r in range(len(self._everybodys)) if r != self._buckets.ranks.rank]
            for low, high in self._owned:
                for rank in others:
                    self.flat[low:high] += self._everybodys[rank, low:high]
            return
        while self._next >= 0:
            self._start()
        for exchange in self._pending:
            exchange.wait()
        self._pending.clear()

    def _start(self) -> None:
        if len(self._pending) >= _IN_FLIGHT:
            self._pending.pop(0).wait()
        start, stop = self._buckets.bounds[self._next]
        low, high = self._buckets.own(self._next)
        self._pending.append(
            start_reduce_scatter(self._buckets.ranks, self.flat[start:stop], self.flat[low:high])
        )
        self._next -= 1

    def own(self, at: int, length: int) -> Tensor:
        for start, stop in self._owned:
            if at < stop - start:
                assert at + length <= stop - start
                return self.flat[start + at : start + at + length]
            at -= stop - start
        raise IndexError(at)

    def gather(self) -> None:
        """Copy what each rank owns to all others."""
        if self._everybodys is None:
            self._buckets.gather(self.flat)
            return
        meet(self._buckets.ranks)
        size = self._buckets.ranks.world_size
        for start, stop in self._buckets.bounds:
            length = (stop - start) // size
            for rank in range(size):
                low = start + rank * length
                self.flat[low : low + length] = self._everybodys[rank, low : low + length]
        # Nobody writes to what others still copy.
        meet(self._buckets.ranks)

    def release(self) -> None:
        ranks = self._buckets.ranks
        if ranks.world_size > 1:
            for bucket, (start, stop) in enumerate(self._buckets.bounds):
                low, high = self._buckets.own(bucket)
                self.flat[start:low].zero_()
                self.flat[high:stop].zero_()
        self._forget()

    def drop(self) -> None:
        if self._pending:
            raise PrivacyError(
                "a step was given up while its sums were on their way to other ranks; end all processes and resume "
                "from the last checkpoint"
            )
        self.flat.zero_()
        self._forget()
