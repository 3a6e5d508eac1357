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
    """Of `tile_norms` and `outer_sum`: p x d of the gradient, from so many rows at a time."""
    if bytes_each == 2:
        across = block(d, 16, 128)
        return Blocks(block(p, 16, 64), across, 32, 8 if across == 128 else 4, 3)
    return Blocks(block(p, 16, 64), block(d, 16, 64), 16, 4, 3)


def gram_blocks(rows: int, units: int) -> Blocks:
    """Of `gram_norms`: rows against rows of a unit, 32 columns of either operand at a time."""
    size = block(ceil_div(rows, units), 16, 64)
    return Blocks(32, 32, size, 8 if size == 64 else 4, 3)


# What an inner product of n terms may lose to underflow is below n times this (flushed to zero, or denormal).
_TINY = 2.0**-126


@triton.jit
def _rank1_kernel(
    a_ptr, g_ptr, products_ptr, roots_ptr, squares_ptr, rows, d, p, BR: tl.constexpr, BK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    inside = n < rows
    of_a = tl.zeros((BR,), tl.float64)
    for k in range(0, d, BK):
        col = k + tl.arange(0, BK)
        x = tl.load(a_ptr + n[:, None] * d + col, mask=inside[:, None] & (col < d), other=0.0).to(tl.float64)
        of_a += tl.sum(x * x, axis=1)
    of_g = tl.zeros((BR,), tl.float64)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        x = tl.load(g_ptr + n[:, None] * p + col, mask=inside[:, None] & (col < p), other=0.0).to(tl.float64)
        of_g += tl.sum(x * x, axis=1)
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
def _gram(x_ptr, s, t, s_inside, t_inside, width, BT: tl.constexpr, BK: tl.constexpr):
    """Inner products of rows s with rows t, fp32 [BT, BT]."""
    acc = tl.zeros((BT, BT), tl.float32)
    for k in range(0, width, BK):
        col = k + tl.arange(0, BK)
        x = tl.load(x_ptr + s[:, None] * width + col, mask=s_inside[:, None] & (col < width), other=0.0)
        y = tl.load(
            x_ptr + t[None, :] * width + col[:, None], mask=t_inside & (col[:, None] < width), other=0.0
        )
        acc = exact_dot(x, y, acc)
    return acc


@triton.jit
def _row_square(x_ptr, row, width, BK: tl.constexpr):
    acc = tl.zeros((BK,), tl.float64)
    for k in range(0, width, BK):
        col = k + tl.arange(0, BK)
        x = tl.load(x_ptr + row * width + col, mask=col < width, other=0.0).to(tl.float64)
        acc += x * x
    return tl.sum(acc, axis=0)


@triton.jit
def _gram_kernel(
    a_ptr, g_ptr, offsets_ptr, slots_ptr, partials_ptr, rows, units, d, p, lost_a, lost_g,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One strip of the upper triangle: BT rows of a unit against themselves and all later rows of it."""
    slot = tl.program_id(0).to(tl.int64)
    top, first, last = slot_rows(slots_ptr, offsets_ptr, slot, rows, units, BT)
    if last - first == 1:
        if top == first:
            whole = _row_square(a_ptr, first, d, BK) * _row_square(g_ptr, first, p, BK)
            tl.store(partials_ptr + slot, whole)
        else:
            tl.store(partials_ptr + slot, 0.0)
    else:
        s = top + tl.arange(0, BT)
        total = tl.zeros((BT,), tl.float64)
        for bottom in range(top, last, BT):
            t = bottom + tl.arange(0, BT)
            aa = _gram(a_ptr, s, t, s < last, t < last, d, BT, BK).to(tl.float64)  # [BT, BT]
            gg = _gram(g_ptr, s, t, s < last, t < last, p, BT, BK).to(tl.float64)  # [BT, BT]
            # What underflow may have taken from either product counts as if it were there.
            term = aa * gg + (lost_a * tl.abs(gg) + lost_g * tl.abs(aa))
            later = t[None, :] - s[:, None]
            total += tl.sum(tl.where(later > 0, 2.0 * term, tl.where(later == 0, term, 0.0)), axis=1)
        tl.store(partials_ptr + slot, tl.sum(total, axis=0))


@triton.jit
def _tile_kernel(
    a_ptr, g_ptr, offsets_ptr, partials_ptr, grads_ptr, rows, d, p, tiles, across,
    BP: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One piece [BP, BD] of a unit's gradient, formed in registers, squared, and forgotten if `grads_ptr` is None."""
    work = tl.program_id(0).to(tl.int64)
    unit = work // tiles
    tile = work % tiles
    first, last = segment(offsets_ptr, unit, rows)
    i = tile // across * BP + tl.arange(0, BP)  # columns of g
    j = tile % across * BD + tl.arange(0, BD)  # columns of a
    acc = tl.zeros((BP, BD), tl.float32)
    for at in range(first, last, BT):
        n = at + tl.arange(0, BT)
        g = tl.load(
            g_ptr + n[None, :] * p + i[:, None], mask=(n < last) & (i[:, None] < p), other=0.0
        )  # [BP, BT]
        a = tl.load(a_ptr + n[:, None] * d + j, mask=(n[:, None] < last) & (j < d), other=0.0)  # [BT, BD]
        acc = exact_dot(g, a, acc)
    if grads_ptr is not None:
        place = unit * d * p + i[:, None] * d + j
        tl.store(grads_ptr + place, acc, mask=(i[:, None] < p) & (j < d))
    exact = acc.to(tl.float64)
    tl.store(partials_ptr + work, tl.sum(tl.sum(exact * exact, axis=1), axis=0))


def outer_sq_norms(activations: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """By the cheapest way at the units' mean length, which the shapes tell; lengths stay on the device."""
    a, g = _pair(activations, output_grads)
    rows, d, p = len(a), a.shape[1], g.shape[1]
    if offsets is None:
        _rows(a, g, products=out)
        written(out)
        return
    units = max(len(out), 1)
    method = tile_norms if _tile_cost(rows / units, d, p) < _gram_cost(rows / units, d, p) else gram_norms
    method(a, g, offsets, out)


def rank1_norms(activations: Tensor, output_grads: Tensor, sq_norms: Tensor, row_sums: Tensor) -> Tensor:
    """As `synthward.kernels.rank1_norms`."""
    a, g = _pair(activations, output_grads)
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
    a, g = _pair(activations, output_grads)
    rows, d, p, units = len(a), a.shape[1], g.shape[1], len(sq_norms)
    if 0 in (rows, d, p, units):
        return
    shape = gram_blocks(rows, units)
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
    a, g = _pair(activations, output_grads)
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


def _pair(activations: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous operands of one dtype."""
    if activations.dtype != output_grads.dtype:
        activations, output_grads = activations.float(), output_grads.float()
    return activations.detach().contiguous(), output_grads.detach().contiguous()


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


def _gram_cost(length: float, d: int, p: int) -> float:
    """Multiply-adds of a unit of `length` rows, whole tiles of the upper triangle counted."""
    size = gram_blocks(math.ceil(length), 1).rows
    strips = -(-length // size)
    return strips * (strips + 1) / 2 * size * size * (d + p)


def _tile_cost(length: float, d: int, p: int) -> float:
    return -(-length // 16) * 16 * (ceil_div(p, 16) * 16) * (ceil_div(d, 16) * 16)
