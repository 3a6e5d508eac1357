"""Triton kernels of the outer family's clipped sum, ``out += sum_n w_n g_n a_n^T``. See README.md beside this file.

Rows are taken in blocks. Where all rows of a block have one weight, the product is one of the operands as they are,
and the weight is applied to what such blocks in a row add up to; elsewhere each scaled row of g is held in a few bf16,
or in fp32. Which block is which is decided on the device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import FUSED, block, ceil_div, exact_dot, on, processors, to_bf16
from synthward.kernels.diagonal.triton_impl import diagonal_weighted_sum

# Products and bytes a second on which the number of parts is decided, an H200's. They are constants, and not measured,
# so that the same shapes give the same bits.
_HALF_RATE, _SINGLE_RATE, _BYTE_RATE = 6e14, 4e13, 4e12
_LAUNCH, _MOST_PARTS = 4e-6, 256

# Rows of a block of operands of half precision.
ROWS = 64
# Kinds of a block of rows: of weight zero all of it, of one other weight all of it, or neither.
_DEAD, _SHARED, _MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Columns that leave the registers at once.
_SLICE = tl.constexpr(64)


class SumBlocks(NamedTuple):
    """Shape of one program: p x d of the sum, so many rows at a time. It follows from shapes, never from a timing."""

    p: int
    d: int
    rows: int
    warps: int
    stages: int


def sum_blocks(bytes_each: int, d: int, p: int, *, terms: int, is_sorted: bool) -> SumBlocks:
    """`is_sorted`: blocks of one weight are found and taken first, which needs a second accumulator."""
    if bytes_each != 2:
        return SumBlocks(block(p, 16, 128), block(d, 16, 64), 16, 4, 3)
    wide = 256 if terms == 1 and not is_sorted else 128
    high, across = block(p, 16, 128), block(d, 16, wide)
    return SumBlocks(high, across, ROWS, 8 if high * across >= 128 * 128 else 4, 5)


@functools.lru_cache(maxsize=4096)
def parts_of(tiles: int, steps: int, seconds: float, piece: float, places: int) -> int:
    """Into how many parts the rows of every tile are cut, so that `places` programs at a time have the least to do:
    steps of so many seconds, and pieces of so many bytes that are written and read again."""

    def cost(parts: int) -> float:
        waves = ceil_div(tiles * parts, places)
        seams = 0.0 if parts == 1 else _LAUNCH + 2.0 * parts * tiles * piece / _BYTE_RATE
        return waves * ceil_div(steps, parts) * seconds + seams

    costs = [cost(parts) for parts in range(1, max(min(steps, _MOST_PARTS), 1) + 1)]
    # The fewest of those that are as good: pieces take memory.
    return next(parts for parts, seconds in enumerate(costs, 1) if seconds <= 1.03 * min(costs))


@triton.jit
def _kinds_kernel(weights_ptr, kinds_ptr, rows, blocks, BK: tl.constexpr, BLOCK: tl.constexpr):
    """Kind of each block of BK rows."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = b.to(tl.int64)[:, None] * BK + tl.arange(0, BK)[None, :]
    w = tl.load(weights_ptr + n, mask=n < rows, other=0.0)
    first = tl.load(weights_ptr + b.to(tl.int64) * BK, mask=b < blocks, other=0.0)
    # What is not a number equals nothing, itself included.
    alike = tl.sum((w == first[:, None]).to(tl.int32), axis=1) == BK
    kind = tl.where(alike, tl.where(first == 0.0, _DEAD, _SHARED), _MIXED)
    tl.store(kinds_ptr + b, kind.to(tl.int32), mask=b < blocks)


@triton.jit
def _order_kernel(
    kinds_ptr, weights_ptr, order_ptr, shared_ptr, counts_ptr, blocks, BK: tl.constexpr, BLOCK: tl.constexpr
):
    """Numbers of the shared blocks, then of the mixed ones, both ascending; how many of each; the shared ones'
    weights, with a NaN behind the last."""
    shared = 0
    mixed = 0
    for at in range(0, blocks, BLOCK):
        kind = tl.load(
            kinds_ptr + at + tl.arange(0, BLOCK), mask=at + tl.arange(0, BLOCK) < blocks, other=_DEAD
        )
        shared += tl.sum((kind == _SHARED).to(tl.int32), axis=0)
        mixed += tl.sum((kind == _MIXED).to(tl.int32), axis=0)
    tl.store(counts_ptr, shared)
    tl.store(counts_ptr + 1, mixed)
    tl.store(shared_ptr + shared, float("nan"))
    of_shared = 0
    of_mixed = shared
    for at in range(0, blocks, BLOCK):
        b = at + tl.arange(0, BLOCK)
        kind = tl.load(kinds_ptr + b, mask=b < blocks, other=_DEAD)
        is_shared = (kind == _SHARED).to(tl.int32)
        is_mixed = (kind == _MIXED).to(tl.int32)
        place = of_shared + tl.cumsum(is_shared, axis=0) - 1
        w = tl.load(weights_ptr + b.to(tl.int64) * BK, mask=is_shared != 0, other=0.0)
        tl.store(shared_ptr + place, w, mask=is_shared != 0)
        tl.store(order_ptr + place, b, mask=is_shared != 0)
        tl.store(order_ptr + of_mixed + tl.cumsum(is_mixed, axis=0) - 1, b, mask=is_mixed != 0)
        of_shared += tl.sum(is_shared, axis=0)
        of_mixed += tl.sum(is_mixed, axis=0)


@triton.jit
def _corner(tile, tiles, across, BP: tl.constexpr, BD: tl.constexpr):
    """First row and column of a tile. Tiles that run at once are near each other in both directions, 8 in a column, so
    that what they read is read by others, too."""
    strip = tile // (8 * across)
    high = tl.minimum(tiles // across - strip * 8, 8)
    within = tile % (8 * across)
    return (strip * 8 + within % high) * BP, within // high * BD


@triton.jit
def _leave(
    part, out_ptr, stride, high, wide, at: tl.constexpr, ADD: tl.constexpr,
    BP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write columns at, at + 1, ... of a tile, or add to them; some at a time, so that what they are added to does not
    need as many registers as they do."""
    if WIDTH > _SLICE:
        left, right = tl.split(tl.permute(tl.reshape(part, (BP, 2, WIDTH // 2)), (0, 2, 1)))
        _leave(left, out_ptr, stride, high, wide, at, ADD, BP, WIDTH // 2)
        _leave(right, out_ptr, stride, high, wide, at + WIDTH // 2, ADD, BP, WIDTH // 2)
    else:
        i = tl.arange(0, BP)[:, None]
        j = at + tl.arange(0, WIDTH)[None, :]
        place = out_ptr + (i * stride + j)
        if ADD:
            inside = (i < high) & (j < wide)
            tl.store(place, tl.load(place, mask=inside, other=0.0) + part, mask=inside)
        else:
            tl.store(place, part)


@triton.jit
def _sum_kernel(
    a_ptr, g_ptr, weights_ptr, order_ptr, shared_ptr, counts_ptr, out_ptr, fragments_ptr,
    rows, d, p, across, tiles, blocks, parts, a_stride, g_stride,
    BP: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr, COST: tl.constexpr,
):  # fmt: skip
    """One part of the rows of one tile [BP, BD]; all tiles of a part are next to each other, and read the same rows.

    order_ptr: as `_order_kernel` leaves it; None: all blocks are mixed. A mixed block costs COST shared ones.
    fragments_ptr: None if there is one part.
    """
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if order_ptr is None:
        shared = 0
        mixed = blocks
    else:
        shared = tl.load(counts_ptr)
        mixed = tl.load(counts_ptr + 1)
    # (An argument that is 1 is no tensor.)
    zero = tl.zeros((), tl.int64)
    length = zero + shared + mixed * COST
    begin = (part * length // parts).to(tl.int32)
    end = ((part + 1) * length // parts).to(tl.int32)
    top, left = _corner(tile, tiles, across, BP, BD)
    i = top + tl.arange(0, BP)
    j = left + tl.arange(0, BD)
    k = tl.arange(0, BK)
    of_g = k[None, :] * g_stride + i[:, None]  # [BP, BK]
    of_a = k[:, None] * a_stride + j[None, :]  # [BK, BD]
    total = tl.zeros((BP, BD), tl.float32)
    if order_ptr is not None:
        last = tl.minimum(end, shared)
        acc = tl.zeros((BP, BD), tl.float32)
        for s in range(begin, last):
            row = tl.load(order_ptr + s).to(tl.int64) * BK
            w = tl.load(shared_ptr + s)
            following = tl.load(shared_ptr + s + 1)
            g = tl.load(g_ptr + row * g_stride + of_g, mask=(i < g_stride)[:, None], other=0.0)
            a = tl.load(a_ptr + row * a_stride + of_a, mask=(j < a_stride)[None, :], other=0.0)
            acc = exact_dot(g, a, acc)
            if (following != w) | (s + 1 == last):
                total += w * acc
                acc = tl.zeros((BP, BD), tl.float32)
    # A mixed block belongs to the part in which the first of its COST begins.
    first = tl.cdiv(tl.maximum(begin - shared, 0), COST)
    for m in range(first, tl.cdiv(tl.maximum(end - shared, 0), COST)):
        row = ((zero + m) if order_ptr is None else tl.load(order_ptr + shared + m).to(tl.int64)) * BK
        n = row + k
        w = tl.load(weights_ptr + n, mask=n < rows, other=0.0)
        # What a row of weight zero holds may not be finite.
        live = w != 0.0
        g = tl.load(
            g_ptr + row * g_stride + of_g, mask=(n < rows)[None, :] & (i < g_stride)[:, None], other=0.0
        )
        a = tl.load(a_ptr + row * a_stride + of_a, mask=live[:, None] & (j < a_stride)[None, :], other=0.0)
        scaled = tl.where(live[None, :], g.to(tl.float32) * w[None, :], 0.0)
        total = _add_product(scaled, a, total, TERMS)
    if fragments_ptr is None:
        corner = (zero + top) * d + left
        _leave(total, out_ptr + corner, d, p - top, d - left, 0, True, BP, BD)
    else:
        fragment = tl.program_id(0).to(tl.int64) * (BP * BD)
        _leave(total, fragments_ptr + fragment, BD, BP, BD, 0, False, BP, BD)


@triton.jit
def _add_product(scaled, a, total, TERMS: tl.constexpr):
    """``total + scaled @ a`` with scaled fp32 in so many bf16 (three hold all 24 bits), or as it is if TERMS is 0."""
    if TERMS == 0:
        total = exact_dot(scaled, a.to(tl.float32), total)
    else:
        high = to_bf16(scaled)
        if TERMS > 1:
            rest = scaled - high.to(tl.float32)
            middle = to_bf16(rest)
            if TERMS > 2:
                total = _add_half(to_bf16(rest - middle.to(tl.float32)), a, total)
            total = _add_half(middle, a, total)
        total = _add_half(high, a, total)
    return total


@triton.jit
def _add_half(x, a, total):
    """``total + x @ a``, x bf16. An fp16 number is the sum of two bf16."""
    if a.dtype == tl.float16:
        wide = a.to(tl.float32)
        upper = to_bf16(wide)
        total = exact_dot(x, to_bf16(wide - upper.to(tl.float32)), total)
        total = exact_dot(x, upper, total)
    else:
        total = exact_dot(x, a, total)
    return total


@triton.jit
def _join_kernel(
    fragments_ptr, out_ptr, d, p, across, tiles, parts, BP: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Add the parts of some rows of a tile, in the order of the parts."""
    tile = tl.program_id(0) // (BP // BR)
    row = tl.program_id(0) % (BP // BR) * BR
    place = (row + tl.arange(0, BR))[:, None] * BD + tl.arange(0, BD)[None, :]
    zero = tl.zeros((), tl.int64)
    acc = tl.zeros((BR, BD), tl.float32)
    for part in range(parts):
        fragment = ((zero + part) * tiles + tile) * (BP * BD)
        acc += tl.load(fragments_ptr + fragment + place)
    top, left = _corner(tile, tiles, across, BP, BD)
    i = top + row + tl.arange(0, BR)
    j = left + tl.arange(0, BD)
    inside = (i < p)[:, None] & (j < d)[None, :]
    target = out_ptr + i.to(tl.int64)[:, None] * d + j[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit
def _scale_kernel(x_ptr, weights_ptr, out_ptr, total, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    w = tl.load(weights_ptr + place // width, mask=inside, other=0.0)
    x = tl.load(x_ptr + place, mask=inside & (w != 0.0), other=0.0)
    scaled = x.to(tl.float32) * w
    tl.store(out_ptr + place, tl.where(w != 0.0, scaled, tl.zeros_like(scaled)), mask=inside)


def outer_sum(
    activations: Tensor,
    output_grads: Tensor,
    row_weights: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    terms: int = 3,
    run: int | None = None,
) -> None:
    """``out += sum_n w_n g_n a_n^T``, and ``bias += sum_n w_n g_n``, if given, by a pass of its own.

    terms: bf16 that a scaled row of bf16 gradients is held in where its block has several weights; for fp16, three.
    run: rows in a row that have one weight, if that is known; blocks of one weight are not looked for if it is less
    than a block.
    """
    a, g = half_or_single(activations, output_grads)
    if bias is not None:
        diagonal_weighted_sum(output_grads.contiguous(), row_weights, None, bias)
    p, d = out.shape
    rows = len(a)
    if 0 in (rows, d, p):
        return
    is_half, is_fp16 = a.element_size() == 2, a.dtype == torch.float16
    terms = (3 if is_fp16 else terms) if is_half else 0
    is_sorted = is_half and (run is None or run >= ROWS)
    shape = sum_blocks(a.element_size(), d, p, terms=terms, is_sorted=is_sorted)
    across, blocks, weights = ceil_div(d, shape.d), ceil_div(rows, shape.rows), row_weights.contiguous()
    tiles, cost = ceil_div(p, shape.p) * across, max(terms, 1) * (2 if is_fp16 else 1)
    # Of small programs several fit on a processor.
    places = processors(a) * (1 if shape.warps == 8 else 3)
    rate = (_HALF_RATE if is_half else _SINGLE_RATE) / places
    area = shape.p * shape.d
    seconds = 2.0 * area * shape.rows * (1 if is_sorted else cost) / rate
    parts = parts_of(tiles, blocks, seconds, 4.0 * area, places)
    with on(a):
        found = _sorted_blocks(weights, blocks, shape.rows) if is_sorted else (None, None, None)
        fragments = None
        if parts > 1:
            fragments = torch.empty(parts * tiles * area, dtype=torch.float32, device=a.device)
        _sum_kernel[(parts * tiles,)](
            *(a, g, weights, *found, out, fragments, rows, d, p, across, tiles, blocks, parts),
            *(a.shape[1], g.shape[1]),
            BP=shape.p,
            BD=shape.d,
            BK=shape.rows,
            TERMS=terms,
            COST=cost,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **FUSED,
        )
        if parts > 1:
            few = min(shape.p, 8)
            _join_kernel[(tiles * (shape.p // few),)](
                *(fragments, out, d, p, across, tiles, parts), BP=shape.p, BD=shape.d, BR=few, **FUSED
            )
    written(out)


def _sorted_blocks(weights: Tensor, blocks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the blocks that count, those of one weight first; their weights; how many of either kind."""
    kinds, order = torch.empty(2, blocks, dtype=torch.int32, device=weights.device)
    shared = torch.empty(blocks + 1, device=weights.device)
    counts = torch.empty(2, dtype=torch.int32, device=weights.device)
    _kinds_kernel[(ceil_div(blocks, 32),)](weights, kinds, len(weights), blocks, BK=size, BLOCK=32, **FUSED)
    _order_kernel[(1,)](
        kinds, weights, order, shared, counts, blocks, BK=size, BLOCK=block(blocks, 32, 1024), **FUSED
    )
    return order, shared, counts


def half_or_single(
    activations: Tensor, output_grads: Tensor, *, is_padded: bool = True
) -> tuple[Tensor, Tensor]:
    """Contiguous operands of one dtype. Rows of half precision start at multiples of 32 bytes, with zeros behind them:
    a thread then loads 16 bytes at once and not two."""
    if activations.dtype != output_grads.dtype:
        activations, output_grads = activations.float(), output_grads.float()
    a, g = (
        _aligned(t.detach()) if is_padded else t.detach().contiguous() for t in (activations, output_grads)
    )
    return a, g


def _aligned(rows: Tensor) -> Tensor:
    missing = -rows.shape[1] % 16 if rows.element_size() == 2 else 0
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


def scale_rows(rows: Tensor, row_weights: Tensor) -> Tensor:
    """As `synthward.kernels.scale_rows`."""
    x = rows.contiguous()
    out = torch.empty_like(x, dtype=torch.float32)
    if out.numel():
        with on(x):
            _scale_kernel[(ceil_div(x.numel(), 1024),)](
                x, row_weights.contiguous(), out, x.numel(), x.shape[1], BLOCK=1024, **FUSED
            )
    return out
