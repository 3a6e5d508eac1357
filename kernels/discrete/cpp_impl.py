"""Compiled integer noise."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import threads, view, written


def rounded_gaussian(out: Tensor, key: bytes, stream: int, step: int, start: int, scale: float) -> None:
    _C.rounded_gaussian(view(out), key, stream, step, start, scale, threads())


def discrete_release_(
    sums: Tensor, out: Tensor, key: bytes, stream: int, step: int, start: int, grid: float, noise_std: float
) -> None:
    _C.discrete_release(view(sums), view(out), key, stream, step, start, grid, noise_std, threads())
    written(sums, out)
