"""What the benchmarks of kernels share: who executes, units of equal length, and how near a result has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.rates import median_seconds
from synthward.kernels import cpu_isa

# The best instruction set and plain torch, where the fixture would give every instruction set.
best_executors = pytest.mark.parametrize("executor", [cpu_isa(), "torch"], indirect=True)


def offsets_of(units: int, rows: int) -> Tensor:
    """Bounds of units of `rows` rows each."""
    return torch.arange(0, units * rows + 1, rows)


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Within 1e-5 of the largest of the float64 results."""
    assert exact.dtype == torch.float64 and found.shape == exact.shape
    assert float((found.double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


def fastest(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Of several ways to one result, the one that is quickest here."""
    return min(calls, key=lambda call: median_seconds(call, rounds=3))
