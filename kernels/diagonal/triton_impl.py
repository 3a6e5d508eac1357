"""Triton kernels of the diagonal family. rows and factors [N, p], offsets [U + 1]; every sum in fp64.

Reading the rows takes longer than the fp64 additions, so that they cost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import FUSED, add_totals, block, ceil_div, on, segment

# Most pieces that the rows of a weighted sum are cut into.
_PIECES = 128


@triton.jit
def _load(rows_ptr, factors_ptr, place, mask):
    x = tl.load(rows_ptr + place, mask=mask, other=0.0).to(tl.float64)
    if factors_ptr is not None:
        x *= tl.load(factors_ptr + place, mask=mask, other=0.0).to(tl.float64)
    return x


@triton.jit
def _rows_kernel(rows_ptr, factors_ptr, out_ptr, rows, p, BR: tl.constexpr, BP: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    total = tl.zeros((BR,), tl.float64)
    for k in range(0, p, BP):
        col = k + tl.arange(0, BP)
        x = _load(rows_ptr, factors_ptr, n[:, None] * p + col, (n[:, None] < rows) & (col < p))  # [BR, BP]
        total += tl.sum(x * x, axis=1)
    before = tl.load(out_ptr + n, mask=n < rows, other=0.0)
    tl.store(out_ptr + n, before + total.to(tl.float32), mask=n < rows)


@triton.jit
def _units_kernel(
    rows_ptr, factors_ptr, offsets_ptr, partials_ptr, rows, p, across, BR: tl.constexpr, BP: tl.constexpr
):
    """Sum of a unit's rows over BP columns, squared."""
    work = tl.program_id(0).to(tl.int64)
    first, last = segment(offsets_ptr, work // across, rows)
    col = work % across * BP + tl.arange(0, BP)
    total = tl.zeros((BP,), tl.float64)
    for at in range(first, last, BR):
        n = at + tl.arange(0, BR)
        x = _load(rows_ptr, factors_ptr, n[:, None] * p + col, (n[:, None] < last) & (col < p))  # [BR, BP]
        total += tl.sum(x, axis=0)
    tl.store(partials_ptr + work, tl.sum(total * total, axis=0))


@triton.jit
def _pieces_kernel(
    rows_ptr,
    factors_ptr,
    weights_ptr,
    partials_ptr,
    rows,
    p,
    across,
    length,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """Weighted sum over `length` rows and BP columns."""
    work = tl.program_id(0).to(tl.int64)
    piece = work // across
    col = work % across * BP + tl.arange(0, BP)
    last = tl.minimum((piece + 1) * length, rows)
    total = tl.zeros((BP,), tl.float64)
    for at in range(piece * length, last, BR):
        n = at + tl.arange(0, BR)
        w = tl.load(weights_ptr + n, mask=n < last, other=0.0)
        # A row of weight zero is not read: what it holds may not be finite.
        live = w != 0.0
        x = _load(rows_ptr, factors_ptr, n[:, None] * p + col, live[:, None] & (col < p))  # [BR, BP]
        total += tl.sum(x * w.to(tl.float64)[:, None], axis=0)
    tl.store(partials_ptr + piece * p + col, total, mask=col < p)


@triton.jit
def _columns_kernel(partials_ptr, out_ptr, pieces, p, BP: tl.constexpr):
    """Add the pieces to `out`, in the order of the rows."""
    col = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    total = tl.load(out_ptr + col, mask=col < p, other=0.0).to(tl.float64)
    place = partials_ptr + col
    for _piece in range(pieces):
        total += tl.load(place, mask=col < p, other=0.0)
        place += p
    tl.store(out_ptr + col, total.to(tl.float32), mask=col < p)


def diagonal_sq_norms(rows: Tensor, offsets: Tensor | None, factors: Tensor | None, out: Tensor) -> None:
    rows, factors = rows.detach().contiguous(), _contiguous(factors)
    count, p, units = len(rows), rows.shape[1], len(out)
    if 0 in (count, p, units):
        return
    with on(rows):
        if offsets is None:
            _rows_kernel[(ceil_div(count, 8),)](
                *(rows, factors, out, count, p), BR=8, BP=block(p, 16, 256), **FUSED
            )
        else:
            width = block(p, 16, 64)
            across = ceil_div(p, width)
            partials = torch.empty(units * across, dtype=torch.float64, device=rows.device)
            _units_kernel[(units * across,)](
                *(rows, factors, offsets, partials, count, p, across),
                BR=block(ceil_div(count, units), 1, 64),
                BP=width,
                **FUSED,
            )
            add_totals(out, partials)
    written(out)


def diagonal_weighted_sum(rows: Tensor, row_weights: Tensor, factors: Tensor | None, out: Tensor) -> None:
    rows, factors = rows.detach().contiguous(), _contiguous(factors)
    count, p = len(rows), rows.shape[1]
    if 0 in (count, p):
        return
    width = block(p, 16, 128)
    across = ceil_div(p, width)
    length = ceil_div(count, _PIECES)
    pieces = ceil_div(count, length)
    with on(rows):
        partials = torch.empty(pieces, p, dtype=torch.float64, device=rows.device)
        _pieces_kernel[(pieces * across,)](
            *(rows, factors, row_weights.contiguous(), partials, count, p, across, length),
            BR=block(length, 1, 32),
            BP=width,
            **FUSED,
        )
        add_pieces(out, partials)
    written(out)


def add_pieces(out: Tensor, partials: Tensor) -> None:
    """Add to ``out`` float32 [p] the rows of `partials` float64 [pieces, p], in their order."""
    pieces, p = partials.shape
    width = block(p, 16, 128)
    _columns_kernel[(ceil_div(p, width),)](partials, out, pieces, p, BP=width, **FUSED)


def _contiguous(factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.detach().contiguous()
