"""Compiled kernels behind the diagonal family."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written


def diagonal_sq_norms(rows: Tensor, offsets: Tensor | None, factors: Tensor | None, out: Tensor) -> None:
    _C.diagonal_sq_norms(view(rows), maybe_view(factors), maybe_view(offsets), view(out), threads())
    written(out)


def diagonal_weighted_sum(rows: Tensor, row_weights: Tensor, factors: Tensor | None, out: Tensor) -> None:
    _C.diagonal_weighted_sum(view(rows), maybe_view(factors), view(row_weights), view(out), threads())
    written(out)
