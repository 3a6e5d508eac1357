"""A kernel at one shape, as `benchmarks.gpu` runs it, and its operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    `run` leaves its result in `result`; `exact` gives what it should be, float64, and the size of the terms that were
    added up, which the error is measured in.
    """

    name: str
    shape: str
    run: Callable[[], object]
    result: Callable[[], Tensor]
    exact: Callable[[], tuple[Tensor, Tensor]]
    tolerance: float
    bytes: float
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    operations: float = 0.0
    clear: list[Tensor] = field(default_factory=list)


class Maker:
    """Random operands on one device, the same for the same seed."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = device, small
        self.generator = torch.Generator(device).manual_seed(0)

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator, device=self.device).to(dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def weights(self, rows: int) -> Tensor:
        return torch.rand(rows, generator=self.generator, device=self.device)

    def offsets(self, units: int, length: int, ragged: bool) -> Tensor:
        if not ragged:
            return torch.arange(units + 1, device=self.device) * length
        cuts = torch.randint(
            0, units * length + 1, (units - 1,), generator=self.generator, device=self.device
        )
        ends = torch.tensor([0, units * length], device=self.device)
        return torch.cat([ends[:1], cuts.sort().values, ends[1:]])
