"""Triton kernels of convolutions. images [N, groups * channels * size...], output_grads [N, groups * outputs * out...].

A unit's terms are numbered: term e is place ``e % places`` of its image ``e // places``. The gradient of a group is
then a product [outputs, terms] x [terms, taps * channels] whose right side is never in memory: where in the images a
term meets a column (tap, channel) is the sum of an offset of the term and one of the column.

Products are IEEE's own in fp32, never TF32. SPAN of them are one chain of additions, and the chains are added up: as
`synthward.kernels.sum_chain` counts, and the engine's bound on rounding with it. Squares are added up in fp64.
bf16 and fp16 are read as they are; what tensor cores take of them is in `triton_half`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import FUSED, add_totals, block, ceil_div, exact_dot, on, segment
from synthward.kernels.conv import triton_half
from synthward.kernels.conv.shape import ConvShape
from synthward.kernels.diagonal.triton_impl import add_pieces
from synthward.kernels.outer.dense import SUM_BLOCK

# Most pieces that a weighted sum's terms are cut into, programs beyond which it is cut no further, and fewest terms of
# a piece.
_PIECES, _PROGRAMS, _TERMS = 128, 1024, 4 * SUM_BLOCK
_HALF = (torch.bfloat16, torch.float16)
# Elements of a row whose squares one program adds up.
_SQUARES = 8192


class Blocks(NamedTuple):
    """Shape of one program. It follows from shapes, never from a timing: same input, same bits."""

    outputs: int
    columns: int
    terms: int
    warps: int
    stages: int


def gradient_blocks(shape: ConvShape, terms: int) -> Blocks:
    """Outputs x columns of a group's gradient, from so many of about `terms` terms at a time."""
    # A depthwise convolution has one output in a group.
    outputs, columns = block(shape.outputs, 1, 64), block(shape.taps * shape.channels, 16, 64)
    each = block(terms, 16, 32)
    # What a thread holds of the operands and their addresses must fit in its registers.
    return Blocks(outputs, columns, each, max(1, min(4, (outputs + columns) * each // 1024)), 3)


@triton.jit
def _form(
    images_ptr, output_grads_ptr, order_ptr, weights_ptr, rows, first, begin, end, group, i, j,
    groups, channels, outputs, places, width, d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
    IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Outputs i, columns j of a group's gradient, fp32 [BO, BC]: terms begin to end, counted from image `first`."""
    tl.static_assert(SPAN % BT == 0)
    pixels = d0 * d1 * d2
    tap = j // channels  # [BC]
    x0 = tap // (k1 * k2) * r0 - p0
    x1 = tap // k2 % k1 * r1 - p1
    x2 = tap % k2 * r2 - p2
    column = (group * channels + j % channels) * pixels + (x0 * d1 + x1) * d2 + x2
    output = (group * outputs + i) * places  # [BO]
    acc = tl.zeros((BO, BC), tl.float32)
    chain = tl.zeros((BO, BC), tl.float32)
    for at in range(begin, end, BT):
        # One division in 64 bits for all terms of a step.
        image = at // places
        place = (at - image * places + tl.arange(0, BT)).to(tl.int32)  # [BT]
        row = first + image + place // places
        place = place % places
        live = at + tl.arange(0, BT) < end
        if order_ptr is not None:
            row = tl.load(order_ptr + row, mask=live, other=0)
            row = tl.minimum(tl.maximum(row, 0), rows - 1)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + row, mask=live, other=0.0)
            # An image of weight zero is not read: what it holds may not be finite.
            live = live & (w != 0.0)
        g = tl.load(
            output_grads_ptr + (row * (groups * outputs * places) + place) + output[:, None],
            mask=live & (i[:, None] < outputs),
            other=0.0,
        ).to(tl.float32)  # [BO, BT]
        if weights_ptr is not None:
            g = g * w
        line = place // o2
        z0 = line // o1 * s0  # [BT]
        z1 = line % o1 * s1
        z2 = place % o2 * s2
        seen = live & (j[:, None] < width)
        if not IN0:
            seen = seen & (x0[:, None] + z0 >= 0) & (x0[:, None] + z0 < d0)
        if not IN1:
            seen = seen & (x1[:, None] + z1 >= 0) & (x1[:, None] + z1 < d1)
        if not IN2:
            seen = seen & (x2[:, None] + z2 >= 0) & (x2[:, None] + z2 < d2)
        term = row * (groups * channels * pixels) + (z0 * d1 + z1) * d2 + z2
        x = tl.load(images_ptr + term + column[:, None], mask=seen, other=0.0)  # [BC, BT]
        chain = exact_dot(g, tl.trans(x.to(tl.float32)), chain)
        if (at - begin + BT) % SPAN == 0:
            acc += chain
            chain = tl.zeros((BO, BC), tl.float32)
    return acc + chain


@triton.jit
def _conv_tile_kernel(
    images_ptr, output_grads_ptr, offsets_ptr, order_ptr, partials_ptr, grads_ptr, rows, tiles, across,
    groups, channels, outputs, places, width, d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
    IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One piece [BO, BC] of a unit's gradient in one group, formed on the chip; squared, or kept, or both."""
    work = tl.program_id(0).to(tl.int64)
    tile = (work % tiles).to(tl.int32)
    group = (work // tiles % groups).to(tl.int32)
    unit = work // tiles // groups
    first, last = segment(offsets_ptr, unit, rows)
    i = tile // across * BO + tl.arange(0, BO)
    j = tile % across * BC + tl.arange(0, BC)
    acc = _form(
        images_ptr, output_grads_ptr, order_ptr, None, rows, first, 0, (last - first) * places, group, i, j,
        groups, channels, outputs, places, width, d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
        IN0, IN1, IN2, BO, BC, BT, SPAN,
    )  # fmt: skip
    if grads_ptr is not None:
        place = (unit * groups + group) * outputs * width + i[:, None] * width + j
        tl.store(grads_ptr + place, acc, mask=(i[:, None] < outputs) & (j < width))
    if partials_ptr is not None:
        exact = acc.to(tl.float64)
        tl.store(partials_ptr + work, tl.sum(tl.sum(exact * exact, axis=1), axis=0))


@triton.jit
def _conv_sum_kernel(
    images_ptr, output_grads_ptr, weights_ptr, partials_ptr, tiles, across, length, terms,
    groups, channels, outputs, places, width, d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
    IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One piece [BO, BC] of a group's weighted sum over `length` terms, counted through all images."""
    work = tl.program_id(0).to(tl.int64)
    tile = (work % tiles).to(tl.int32)
    group = (work // tiles % groups).to(tl.int32)
    piece = work // tiles // groups
    begin = piece * length
    end = tl.minimum(begin + length, terms)
    i = tile // across * BO + tl.arange(0, BO)
    j = tile % across * BC + tl.arange(0, BC)
    acc = _form(
        images_ptr, output_grads_ptr, None, weights_ptr, 0, 0, begin, end, group, i, j,
        groups, channels, outputs, places, width, d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
        IN0, IN1, IN2, BO, BC, BT, SPAN,
    )  # fmt: skip
    place = (piece * groups + group) * outputs * width + i[:, None] * width + j
    tl.store(partials_ptr + place, acc.to(tl.float64), mask=(i[:, None] < outputs) & (j < width))


@triton.jit
def _conv_squares_kernel(
    x_ptr, partials_ptr, rows, width, across, SPAN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """Squares of SPAN elements of some rows of x [rows, width], added up."""
    work = tl.program_id(0).to(tl.int64)
    n = work // across * BR + tl.arange(0, BR)  # [BR]
    begin = (work % across * SPAN).to(tl.int32)
    total = tl.zeros((BR,), tl.float64)
    for at in range(begin, tl.minimum(begin + SPAN, width), BK):
        col = at + tl.arange(0, BK)
        inside = (n[:, None] < rows) & (col < width)
        x = tl.load(x_ptr + n[:, None] * width + col, mask=inside, other=0.0).to(tl.float64)  # [BR, BK]
        total += tl.sum(x * x, axis=1)
    tl.store(partials_ptr + n * across + work % across, total, mask=n < rows)


def norms(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    sq_norms: Tensor,
    row_sums: Tensor,
) -> None:
    """As `synthward.kernels.conv_norms`, by pieces of each unit's gradient that never leave the chip."""
    rows, units = len(images), len(sq_norms)
    if 0 in (rows, units, shape.numel):
        return
    shape, x, g = _operands(shape, images, output_grads)
    with on(x):
        if on_tensor_cores(shape, x.dtype):
            triton_half.norms(shape, x, g, offsets, order, sq_norms)
        else:
            blocks = _unit_blocks(shape, rows, units)
            programs = units * shape.groups * _tiles(shape, blocks)
            partials = torch.empty(programs, dtype=torch.float64, device=x.device)
            _form_units(shape, blocks, x, g, offsets, order, partials, None)
            add_totals(sq_norms, partials)
        # A pixel is in at most as many patches as the kernel has places (Cauchy and Schwarz for the rest). Where the
        # channels come last, all groups are one piece: no less (Cauchy and Schwarz again).
        pieces = 1 if shape.channels_last else shape.groups
        squares = _squares(x, rows * pieces) * _squares(g, rows * pieces)
        lengths = (shape.taps * squares).sqrt().view(rows, pieces).sum(1)
        if order is not None:
            lengths = lengths.index_select(0, order)
        add_totals(row_sums, lengths, offsets=offsets, rows=rows)
    written(sq_norms, row_sums)


def unit_grads(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    grads: Tensor,
) -> None:
    """Gradients of units to `grads` float32 [U, numel], written."""
    if len(images) == 0:
        grads.zero_()
    elif grads.numel():
        shape, x, g = _operands(shape, images, output_grads)
        with on(x):
            if on_tensor_cores(shape, x.dtype):
                triton_half.unit_grads(shape, x, g, offsets, order, grads)
            else:
                blocks = _unit_blocks(shape, len(x), len(grads))
                _form_units(shape, blocks, x, g, offsets, order, None, grads)


def weighted_sum(
    shape: ConvShape, images: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor
) -> None:
    """As `synthward.kernels.conv_sum`: a number of pieces that the shapes alone decide, added up in their order."""
    terms = len(images) * shape.places
    if 0 in (terms, shape.numel):
        return
    shape, x, g = _operands(shape, images, output_grads)
    with on(x):
        if on_tensor_cores(shape, x.dtype):
            triton_half.weighted_sum(shape, x, g, row_weights, out)
        else:
            _weighted_sum(shape, x, g, row_weights, out)
    written(out)


def on_tensor_cores(shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether operands of this type are multiplied there, and are best given with their channels last. Not fp32; nor
    groups so small, depthwise ones above all, that most of the smallest product would be of zeros."""
    return dtype in _HALF and triton_half.is_worth_while(shape)


def _weighted_sum(shape: ConvShape, x: Tensor, g: Tensor, row_weights: Tensor, out: Tensor) -> None:
    terms = len(x) * shape.places
    blocks = gradient_blocks(shape, terms)
    tiles = _tiles(shape, blocks)
    pieces = min(_PIECES, max(1, _PROGRAMS // (shape.groups * tiles)), ceil_div(terms, _TERMS))
    length = ceil_div(ceil_div(terms, pieces), SUM_BLOCK) * SUM_BLOCK
    pieces = ceil_div(terms, length)
    partials = torch.empty(pieces, shape.numel, dtype=torch.float64, device=x.device)
    _conv_sum_kernel[(pieces * shape.groups * tiles,)](
        *(x, g, row_weights.contiguous(), partials, tiles, _across(shape, blocks), length, terms),
        *_numbers(shape),
        **_choices(shape, blocks),
    )
    add_pieces(out, partials)


def _form_units(
    shape: ConvShape,
    blocks: Blocks,
    x: Tensor,
    g: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    partials: Tensor | None,
    grads: Tensor | None,
) -> None:
    tiles = _tiles(shape, blocks)
    offsets, order = offsets.contiguous(), None if order is None else order.contiguous()
    _conv_tile_kernel[((len(offsets) - 1) * shape.groups * tiles,)](
        *(x, g, offsets, order, partials, grads, len(x), tiles, _across(shape, blocks)),
        *_numbers(shape),
        **_choices(shape, blocks),
    )


def _operands(shape: ConvShape, images: Tensor, output_grads: Tensor) -> tuple[ConvShape, Tensor, Tensor]:
    """Contiguous, of one type, and in the order of channels that the kernels for that type take."""
    x, g = images.detach(), output_grads.detach()
    if x.dtype != g.dtype or x.dtype not in _HALF:
        x, g = x.float(), g.float()
    if not on_tensor_cores(shape, x.dtype):
        shape, x, g = shape.channels_first(x, g)
    return shape, x.contiguous(), g.contiguous()


def _unit_blocks(shape: ConvShape, rows: int, units: int) -> Blocks:
    return gradient_blocks(shape, ceil_div(rows, units) * shape.places)


def _across(shape: ConvShape, blocks: Blocks) -> int:
    return ceil_div(shape.taps * shape.channels, blocks.columns)


def _tiles(shape: ConvShape, blocks: Blocks) -> int:
    return ceil_div(shape.outputs, blocks.outputs) * _across(shape, blocks)


def _numbers(shape: ConvShape) -> tuple[int, ...]:
    """In the order of the kernels' arguments."""
    v = shape
    return (
        *(v.groups, v.channels, v.outputs, v.places, v.taps * v.channels),
        *(*v.size, *v.kernel[1:], *v.stride, *v.padding, *v.dilation, *v.out[1:]),
    )


def _choices(shape: ConvShape, blocks: Blocks) -> dict[str, Any]:
    spans = zip(shape.size, shape.reach, shape.padding, strict=True)
    within = [before == 0 and reach <= size for size, reach, before in spans]
    return {
        **{f"IN{axis}": value for axis, value in enumerate(within)},
        **{"BO": blocks.outputs, "BC": blocks.columns, "BT": blocks.terms, "SPAN": SUM_BLOCK},
        **{"num_warps": blocks.warps, "num_stages": blocks.stages},
        **FUSED,
    }


def _squares(x: Tensor, rows: int) -> Tensor:
    """Squared norm of each of `rows` equal pieces of x, float64 [rows]."""
    width = x.numel() // rows
    across, columns = ceil_div(width, _SQUARES), block(width, 16, 1024)
    together = 1024 // columns
    partials = torch.empty(rows, across, dtype=torch.float64, device=x.device)
    _conv_squares_kernel[(ceil_div(rows, together) * across,)](
        *(x, partials, rows, width, across), SPAN=_SQUARES, BR=together, BK=columns, **FUSED
    )
    return partials.sum(1)
