"""Compiled kernels behind the scatter family."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written


def scatter_sq_norms(ids: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    _C.scatter_sq_norms(view(ids), view(output_grads), maybe_view(offsets), view(out), threads())
    written(out)


def scatter_weighted_sum(ids: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor) -> None:
    _C.scatter_weighted_sum(view(ids), view(output_grads), view(row_weights), view(out), threads())
    written(out)
