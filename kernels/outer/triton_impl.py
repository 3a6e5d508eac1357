"""Triton kernels of the outer family. Shapes: activations a [N, d], output_grads g [N, p], offsets [U + 1].

Products of fp32 are IEEE's own, never TF32: an error of 3e-4 in a norm would be one in the sensitivity. Products of
bf16 or fp16 are exact in the fp32 accumulator. Squares are added up in fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import (
    FUSED,
    add_totals,
    block,
    ceil_div,
    exact_dot,
    on,
    segment,
    slot_rows,
    slots,
)
from synthward.kernels.outer.reference import LARGEST_SQUARE
from synthward.kernels.outer.triton_sum import half_or_single
from synthward.kernels.outer.triton_sum import outer_sum as outer_sum
from synthward.kernels.outer.triton_sum import scale_rows as scale_rows


class Blocks(NamedTuple):
    """Shape of one program of a kernel. It follows from shapes, never from a timing: same input, same bits."""

    p: int
    d: int
    rows: int
    warps: int
    stages: int


def gradient_blocks(bytes_each: int, d: int, p: int) -> Blocks:
    """Of `tile_norms`: p x d of the gradient, from so many rows at a time."""
    if bytes_each == 2:
        high, across = block(p, 16, 128), block(d, 16, 128)
        return Blocks(high, across, 64, 8 if high * across == 128 * 128 else 4, 3)
    return Blocks(block(p, 16, 128), block(d, 16, 64), 16, 4, 3)


def gram_blocks(bytes_each: int, rows: int, units: int) -> Blocks:
    """Of `gram_norms`: rows against rows of a unit, so many columns of either operand at a time."""
    length = ceil_div(rows, units)
    if bytes_each == 2:
        if length >= 256:
            return Blocks(64, 64, 128, 8, 3)
        return Blocks(64, 64, block(length, 16, 64), 4, 4)
    size = block(length, 16, 64)
    return Blocks(32, 32, size, 8 if size == 64 else 4, 3)


# See `LARGEST_SQUARE`.
_LARGEST = tl.constexpr(LARGEST_SQUARE)
# What an inner product of n terms may lose to underflow is below n times this (flushed to zero, or denormal).
_TINY = 2.0**-126


@triton.jit
def _sixteenths(x, BP: tl.constexpr, BD: tl.constexpr):
    """Sums of 16 columns each of x [BP, BD] in fp32, of two chains of three additions: few enough for what follows in
    fp64 to cost little."""
    x = tl.sum(tl.reshape(x, (BP, 4, BD // 4)), axis=1)
    return tl.sum(tl.reshape(x, (BP, 4, BD // 16)), axis=1).to(tl.float64)


@triton.jit
def _row_squares(x_ptr, n, inside, width, BR: tl.constexpr, BK: tl.constexpr):
    """Squared norm of each of some rows, fp64 [BR]: squares of fp32 may vanish where those of the other operand are
    large."""
    acc = tl.zeros((BR, BK), tl.float64)
    rows = x_ptr + n[:, None] * width
    for k in range(0, width, BK):
        col = k + tl.arange(0, BK)[None, :]
        x = tl.load(rows + col, mask=inside[:, None] & (col < width), other=0.0).to(tl.float64)
        acc += x * x
    return tl.sum(acc, axis=1)


@triton.jit
def _rank1_kernel(
    a_ptr, g_ptr, products_ptr, roots_ptr, squares_ptr, rows, d, p, BR: tl.constexpr, BK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    inside = n < rows
    of_g = _row_squares(g_ptr, n, inside, p, BR, BK)
    of_a = _row_squares(a_ptr, n, inside, d, BR, BK)
    if a_ptr.dtype.element_ty == tl.bfloat16:
        of_a = tl.where(of_a > _LARGEST, float("inf"), of_a)
    product = of_a * of_g
    if products_ptr is not None:
        before = tl.load(products_ptr + n, mask=inside, other=0.0)
        tl.store(products_ptr + n, before + product.to(tl.float32), mask=inside)
    if squares_ptr is not None:
        # One row a unit: its own sum is complete.
        if roots_ptr is not None:
            before = tl.load(roots_ptr + n, mask=inside, other=0.0)
            tl.store(roots_ptr + n, before + tl.sqrt(product).to(tl.float32), mask=inside)
        tl.store(squares_ptr + n, of_g.to(tl.float32), mask=inside)
    elif roots_ptr is not None:
        tl.store(roots_ptr + n, tl.sqrt(product), mask=inside)


@triton.jit
def _gram(x_ptr, y_ptr, s_rows, t_rows, width, BT: tl.constexpr, BK: tl.constexpr):
    """Inner products of BT rows from x_ptr with BT rows from y_ptr, of which so many are there, fp32 [BT, BT]; with
    themselves, read once, if y_ptr is None."""
    acc = tl.zeros((BT, BT), tl.float32)
    row = tl.arange(0, BT)[:, None]
    for k in range(0, width, BK):
        col = k + tl.arange(0, BK)[None, :]
        x = tl.load(x_ptr + (row * width + col), mask=(row < s_rows) & (col < width), other=0.0)
        if y_ptr is None:
            acc = exact_dot(x, tl.trans(x), acc)
        else:
            y = tl.load(y_ptr + (row * width + col), mask=(row < t_rows) & (col < width), other=0.0)
            acc = exact_dot(x, tl.trans(y), acc)
    return acc


@triton.jit
def _products(aa, gg, lost_a, lost_g):
    """Products of inner products, and what underflow may have taken from them: as if it were there."""
    return aa * gg + (lost_a * (tl.abs(gg) + 1.0) + lost_g * (tl.abs(aa) + 1.0))


@triton.jit
def _gram_kernel(
    a_ptr, g_ptr, offsets_ptr, slots_ptr, partials_ptr, rows, units, d, p, lost_a, lost_g,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One strip of the upper triangle: BT rows of a unit against themselves and all later rows of it."""
    slot = tl.program_id(0).to(tl.int64)
    top, first, last = slot_rows(slots_ptr, offsets_ptr, slot, rows, units, BT)
    if top >= last:
        tl.store(partials_ptr + slot, 0.0)
    elif last - first == 1:
        n = first + tl.arange(0, 1)
        whole = _row_squares(a_ptr, n, n < last, d, 1, 128) * _row_squares(g_ptr, n, n < last, p, 1, 128)
        tl.store(partials_ptr + slot, tl.sum(whole, axis=0))
    else:
        s_a, s_g, s_rows = a_ptr + top * d, g_ptr + top * p, (last - top).to(tl.int32)
        aa = _gram(s_a, None, s_rows, 0, d, BT, BK)  # [BT, BT]
        gg = _gram(s_g, None, s_rows, 0, p, BT, BK)  # [BT, BT]
        later = tl.arange(0, BT)[None, :] - tl.arange(0, BT)[:, None]
        term = _products(aa, gg, lost_a, lost_g)
        total = _sixteenths(tl.where(later > 0, 2.0 * term, tl.where(later == 0, term, 0.0)), BT, BT)
        for bottom in range(top + BT, last, BT):
            t_rows = (last - bottom).to(tl.int32)
            aa = _gram(s_a, a_ptr + bottom * d, s_rows, t_rows, d, BT, BK)
            gg = _gram(s_g, g_ptr + bottom * p, s_rows, t_rows, p, BT, BK)
            total += _sixteenths(2.0 * _products(aa, gg, lost_a, lost_g), BT, BT)
        tl.store(partials_ptr + slot, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def _tile_kernel(
    a_ptr, g_ptr, offsets_ptr, partials_ptr, grads_ptr, rows, d, p, tiles, across,
    BP: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One piece [BP, BD] of a unit's gradient, formed in registers, squared, and forgotten if `grads_ptr` is None."""
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first, last = segment(offsets_ptr, unit, rows)
    i = tile // across * BP + tl.arange(0, BP)  # columns of g
    j = tile % across * BD + tl.arange(0, BD)  # columns of a
    k = tl.arange(0, BT)
    of_g = k[None, :] * p + i[:, None]  # [BP, BT]
    of_a = k[:, None] * d + j[None, :]  # [BT, BD]
    acc = tl.zeros((BP, BD), tl.float32)
    for at in range(0, (last - first).to(tl.int32), BT):
        left = (last - first).to(tl.int32) - at
        g = tl.load(g_ptr + (first + at) * p + of_g, mask=(k < left)[None, :] & (i < p)[:, None], other=0.0)
        a = tl.load(a_ptr + (first + at) * d + of_a, mask=(k < left)[:, None] & (j < d)[None, :], other=0.0)
        acc = exact_dot(g, a, acc)
    if grads_ptr is not None:
        place = unit * d * p + i[:, None] * d + j[None, :]
        tl.store(grads_ptr + place, acc, mask=(i < p)[:, None] & (j < d)[None, :])
    # What a square loses to underflow is less than 2^-126, as in every norm that is rounded to fp32.
    squares = _sixteenths(acc * acc, BP, BD)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


def outer_sq_norms(activations: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """By the cheapest way at the units' mean length, which the shapes tell; lengths stay on the device."""
    a, g = half_or_single(activations, output_grads)
    rows, d, p = len(a), a.shape[1], g.shape[1]
    if offsets is None:
        _rows(a, g, products=out)
        written(out)
        return
    units = max(len(out), 1)
    method = (
        tile_norms
        if _tile_cost(rows / units, d, p) < _gram_cost(a.element_size(), rows / units, d, p)
        else gram_norms
    )
    method(a, g, offsets, out)


def rank1_norms(activations: Tensor, output_grads: Tensor, sq_norms: Tensor, row_sums: Tensor) -> Tensor:
    """As `synthward.kernels.rank1_norms`."""
    a, g = half_or_single(activations, output_grads)
    squares = torch.empty(len(a), dtype=torch.float32, device=a.device)
    _rows(a, g, products=sq_norms, roots=row_sums, squares=squares)
    written(sq_norms, row_sums)
    return squares


def gram_norms(
    activations: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor | None = None,
) -> None:
    """Add squared norms, and ``sum_n |a_n| |g_n|`` if asked for, by upper triangles that never leave the chip."""
    a, g = half_or_single(activations, output_grads)
    rows, d, p, units = len(a), a.shape[1], g.shape[1], len(sq_norms)
    if 0 in (rows, d, p, units):
        return
    shape = gram_blocks(a.element_size(), rows, units)
    size = shape.rows
    with on(a):
        of_slots = slots(offsets, rows, size)
        partials = torch.empty(len(of_slots), dtype=torch.float64, device=a.device)
        _gram_kernel[(len(of_slots),)](
            *(a, g, offsets, of_slots, partials, rows, units, d, p, d * _TINY, p * _TINY),
            BT=size,
            BK=shape.d,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **FUSED,
        )
        add_totals(sq_norms, partials, offsets=offsets, rows=rows, step=size)
        _add_row_sums(a, g, offsets, row_sums)
    written(sq_norms, row_sums)


def tile_norms(
    activations: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor | None = None,
    grads: Tensor | None = None,
) -> None:
    """As `gram_norms` by pieces of each unit's gradient, which are kept only in `grads` float32 [U, p * d]."""
    a, g = half_or_single(activations, output_grads, is_padded=grads is None)
    rows, d, p, units = len(a), a.shape[1], g.shape[1], len(sq_norms)
    if 0 in (d, p, units):
        return
    shape = gradient_blocks(a.element_size(), d, p)
    across = ceil_div(d, shape.d)
    tiles = ceil_div(p, shape.p) * across
    with on(a):
        partials = torch.empty(units * tiles, dtype=torch.float64, device=a.device)
        _tile_kernel[(units * tiles,)](
            *(a, g, offsets, partials, grads, rows, d, p, tiles, across),
            BP=shape.p,
            BD=shape.d,
            BT=shape.rows,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **FUSED,
        )
        add_totals(sq_norms, partials)
        _add_row_sums(a, g, offsets, row_sums)
    written(sq_norms, row_sums)


def _rows(
    a: Tensor,
    g: Tensor,
    products: Tensor | None = None,
    roots: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    rows, d, p = len(a), a.shape[1], g.shape[1]
    if rows:
        with on(a):
            _rank1_kernel[(ceil_div(rows, 8),)](
                *(a, g, products, roots, squares, rows, d, p), BR=8, BK=block(max(d, p), 16, 128), **FUSED
            )


def _add_row_sums(a: Tensor, g: Tensor, offsets: Tensor, row_sums: Tensor | None) -> None:
    if row_sums is not None and len(a):
        roots = torch.empty(len(a), dtype=torch.float64, device=a.device)
        _rows(a, g, roots=roots)
        add_totals(row_sums, roots, offsets=offsets, rows=len(a))


def _gram_cost(bytes_each: int, length: float, d: int, p: int) -> float:
    """Multiply-adds of a unit of `length` rows, whole tiles of the upper triangle counted."""
    size = gram_blocks(bytes_each, math.ceil(length), 1).rows
    strips = -(-length // size)
    return strips * (strips + 1) / 2 * size * size * (d + p)


def _tile_cost(length: float, d: int, p: int) -> float:
    return -(-length // 16) * 16 * (ceil_div(p, 16) * 16) * (ceil_div(d, 16) * 16)
