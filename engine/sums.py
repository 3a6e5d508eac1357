"""Where the clipped sums of a logical step are added up: one view per parameter of one flat buffer.

With several ranks each of them adds up its own units. The buffer is cut into buckets, and each rank owns one slice of
each: there the sums of all ranks come together. A bucket is exchanged as soon as the last sum in it is complete, while
those of other buckets still form; in the same order on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from synthward.engine.distributed.exchange import Pending, start_all_gather, start_reduce_scatter
from synthward.engine.distributed.hostmem import meet, shared_zeros
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import PrivacyError

# First and last (exclusive) coordinate of a parameter, and its shape.
Range: TypeAlias = tuple[int, int, torch.Size]
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

    def complete(self, agree: Callable[[], None]) -> None:
        """From here on `own` holds the sums over all ranks. All ranks take part.

        Args:
            agree: an exchange that raises on all ranks where they do not fit together, and returns when all are here;
                called where all ranks have made the same exchanges before.
        """

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
        owned: the same of this rank's slices, in the order of its own coordinates.
    """

    def __init__(self, size: int, ranks: Ranks, align: int) -> None:
        self.ranks = ranks
        unit = align * ranks.world_size
        self.length = -(-size // unit) * unit
        step = min(max(self.length // 8, 1 << 18), 1 << 24)
        step = self.length if ranks.world_size == 1 else -(-step // unit) * unit
        self.bounds = [(start, min(start + step, self.length)) for start in range(0, self.length, step)]
        self.owned = [self.own(bucket) for bucket in range(len(self.bounds))]

    def own(self, bucket: int) -> tuple[int, int]:
        """This rank's slice of a bucket, in coordinates of the whole buffer."""
        start, stop = self.bounds[bucket]
        length = (stop - start) // self.ranks.world_size
        return start + self.ranks.rank * length, start + (self.ranks.rank + 1) * length

    def gather(self, flat: Tensor) -> None:
        """Copy what each rank owns of `flat` to all others."""
        if self.ranks.world_size == 1:
            return
        pending: list[Pending] = []
        for start, stop in self.bounds:
            pending.append(start_all_gather(self.ranks, flat[start:stop]))
            if len(pending) > _IN_FLIGHT:
                pending.pop(0).wait()
        for exchange in pending:
            exchange.wait()


class Board:
    """Memory in which the ranks of one machine leave what they own for the others."""

    def __init__(self, buckets: Buckets, memory: Tensor) -> None:
        self._buckets, self._memory = buckets, memory

    def gather(self, flat: Tensor) -> None:
        """Copy what each rank owns of `flat` to all others."""
        for bucket in range(len(self._buckets.bounds)):
            low, high = self._buckets.own(bucket)
            self._memory[low:high] = flat[low:high]
        meet(self._buckets.ranks)
        for bucket, (start, stop) in enumerate(self._buckets.bounds):
            low, high = self._buckets.own(bucket)
            flat[start:low] = self._memory[start:low]
            flat[high:stop] = self._memory[high:stop]


def gatherer(buckets: Buckets, device: torch.device) -> Buckets | Board:
    """What copies parameters to all ranks: by memory that they all see, where there is some."""
    memory = _common_memory(buckets, 1, torch.float32, device)
    return buckets if memory is None else Board(buckets, memory[0])


def _common_memory(buckets: Buckets, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if buckets.ranks.world_size == 1 or device.type != "cpu":
        return None
    return shared_zeros(buckets.ranks, rows, buckets.length, dtype)


def new_sums(ranges: Sequence[Range], buckets: Buckets, dtype: torch.dtype, device: torch.device) -> FlatSums:
    """The sums of replicas, zero.

    Args:
        ranges: first and last (exclusive) coordinate of each parameter, and its shape.
    """
    memory = _common_memory(buckets, buckets.ranks.world_size, dtype, device)
    if memory is None:
        return FlatSums(ranges, buckets, torch.zeros(buckets.length, dtype=dtype, device=device))
    return HostSums(ranges, buckets, memory)


class FlatSums:
    """`Sums` of replicas: each rank holds the whole buffer `flat`."""

    def __init__(self, ranges: Sequence[Range], buckets: Buckets, flat: Tensor) -> None:
        self.flat, self.dtype, self.device = flat, flat.dtype, flat.device
        self.shapes = [shape for _, _, shape in ranges]
        self._ranges, self._buckets = ranges, buckets
        self._views = self._views_of(flat)
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
        self._is_last = self._is_complete = False
        self._pending: list[Pending] = []

    def _views_of(self, flat: Tensor) -> list[Tensor]:
        return [flat[start:stop].view(shape) for start, stop, shape in self._ranges]

    @contextmanager
    def traced(self, flat: Tensor) -> Iterator[None]:
        """Inside, sums are added up in `flat`, which stands for this buffer in a graph."""
        before, self._views = self._views, self._views_of(flat)
        try:
            yield
        finally:
            self._views = before

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
        self._check_whole()
        self._is_last = is_last and self._buckets.ranks.world_size > 1

    def done(self, position: int) -> None:
        if not self._is_last:
            return
        for bucket in self._of_position[position]:
            self._missing[bucket] -= 1
        while self._next >= 0 and self._missing[self._next] == 0:
            self._start()

    def end_pass(self) -> None:
        """Sums that no unit reached are exchanged with the rest, by `complete`."""

    def complete(self, agree: Callable[[], None]) -> None:
        if self._buckets.ranks.world_size == 1:
            return
        self._is_complete = True
        try:
            self._reduce(agree)
        except PrivacyError:
            # Raised on all ranks: nobody goes on with what was exchanged.
            self._is_complete = False
            raise

    def _reduce(self, agree: Callable[[], None]) -> None:
        while self._next >= 0:
            self._start()
        for exchange in self._pending:
            exchange.wait()
        self._pending.clear()
        # Not before: ranks that were told which pass is the last one have begun in it, others here.
        agree()

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
        for start, stop in self._buckets.owned:
            if at < stop - start:
                assert at + length <= stop - start
                return self.flat[start + at : start + at + length]
            at -= stop - start
        raise IndexError(at)

    def gather(self) -> None:
        """Copy what each rank owns to all others."""
        self._buckets.gather(self.flat)

    def release(self) -> None:
        ranks = self._buckets.ranks
        if ranks.world_size > 1:
            for bucket, (start, stop) in enumerate(self._buckets.bounds):
                low, high = self._buckets.own(bucket)
                self.flat[start:low].zero_()
                self.flat[high:stop].zero_()
        self._forget()

    def drop(self) -> None:
        self._check_whole()
        self.flat.zero_()
        self._forget()

    def _check_whole(self) -> None:
        """What others have a part of, or may still read, is not given up by one rank."""
        if self._pending or self._is_complete:
            raise PrivacyError(
                "a step was given up while its sums were with other ranks; end all processes and resume from the last "
                "checkpoint"
            )


class HostSums(FlatSums):
    """`Sums` of replicas on one machine, which see each other's: all of them, [W, length]."""

    def __init__(self, ranges: Sequence[Range], buckets: Buckets, memory: Tensor) -> None:
        super().__init__(ranges, buckets, memory[buckets.ranks.rank])
        self._memory = memory

    def done(self, position: int) -> None:
        """Others read all of it when they have met."""

    def _reduce(self, agree: Callable[[], None]) -> None:
        ranks = self._buckets.ranks
        agree()
        for low, high in self._buckets.owned:
            for rank in range(ranks.world_size):
                if rank != ranks.rank:
                    self.flat[low:high] += self._memory[rank, low:high]

    def gather(self) -> None:
        ranks = self._buckets.ranks
        meet(ranks)
        for start, stop in self._buckets.bounds:
            length = (stop - start) // ranks.world_size
            for rank in range(ranks.world_size):
                if rank != ranks.rank:
                    low = start + rank * length
                    self.flat[low : low + length] = self._memory[rank, low : low + length]
        # Nobody writes to what others still copy.
        meet(ranks)
