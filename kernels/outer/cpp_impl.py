"""Compiled kernels behind the outer family."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written
from synthward.kernels.outer.reference import unit_sq_norm


def outer_sq_norms(activations: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    arrays = (view(activations), view(output_grads), maybe_view(offsets), view(out))
    longest = _C.outer_sq_norms(*arrays, threads())
    written(out)
    if offsets is None or longest <= _C.LONGEST_GRAM:
        return
    # The kernel's work grows with the square of a unit's rows; it leaves long units to dense products.
    for unit in (offsets.diff() > _C.LONGEST_GRAM).nonzero().flatten().tolist():
        first, last = int(offsets[unit]), int(offsets[unit + 1])
        out[unit] += unit_sq_norm(activations[first:last], output_grads[first:last]).float()


def scale_rows(rows: Tensor, row_weights: Tensor, out: Tensor) -> None:
    _C.scale_rows(view(rows), view(row_weights), view(out), threads())
    written(out)
