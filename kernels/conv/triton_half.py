"""Triton kernels of convolutions of bf16 or fp16, on tensor cores. images [N, size..., groups * channels], output_grads
[N, out..., groups * outputs]: the channels last, so that what one program reads of a place lies side by side.

A term is a place of an image. The gradient of a group, [taps * channels, outputs], is then a product of terms: those of
the images are never in memory, each is read where its place meets the tap. Channels are filled up with zeros to an even
number, so that an element's neighbour is read with it.

Products are exact in fp32. HALF_TERMS of them, one step, are one chain of additions in a tensor core, and chains are
added up in fp32 outside of it: `half_chain` counts them. Squares are added up in fp64, but for 16 at a time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._triton import FUSED, add_totals, block, ceil_div, exact_dot, segment
from synthward.kernels.conv.shape import HALF_TERMS, ConvShape
from synthward.kernels.diagonal.triton_impl import add_pieces

# Most pieces that a weighted sum's steps are cut into, programs beyond which it is cut no further, and fewest steps of
# a piece.
_PIECES, _PROGRAMS, _STEPS = 128, 1024, 8
# Programs that keep a large GPU busy.
_FULL = 256
# Outputs that stay apart while squares are added up in fp32.
_APART = tl.constexpr(8)


class HalfBlocks(NamedTuple):
    """Shape of one program: columns (tap, channel) x outputs of a group's gradient. It follows from shapes, never from
    a timing: same input, same bits."""

    columns: int
    outputs: int
    terms: int
    warps: int
    stages: int


def half_blocks(shape: ConvShape, terms: int, gradients: int = _FULL) -> HalfBlocks:
    """For so many gradients of a group, of about `terms` terms each."""
    # Hopper's products take 64 rows for every 4 warps, and any multiple of 8 columns.
    columns = block(shape.taps * _filled(shape.channels), 64, 128)
    outputs = block(shape.outputs, 16, 128)
    # Few gradients of few pieces leave processors idle: smaller pieces do not.
    while gradients * _pieces(shape, columns, outputs) < _FULL and max(columns, outputs) > 64:
        columns, outputs = (columns // 2, outputs) if columns >= outputs else (columns, outputs // 2)
    return HalfBlocks(columns, outputs, block(terms, 16, HALF_TERMS), 8 if columns * outputs > 8192 else 4, 3)


def is_worth_while(shape: ConvShape) -> bool:
    """Whether enough of the smallest product, 64 x 16, is not of zeros: tensor cores take as long for 16 products as
    others do for one. Depthwise convolutions are none."""
    used = shape.taps * shape.channels * shape.outputs
    blocks = half_blocks(shape, HALF_TERMS)
    return 16 * used >= _pieces(shape, blocks.columns, blocks.outputs) * blocks.columns * blocks.outputs


def _pieces(shape: ConvShape, columns: int, outputs: int) -> int:
    return ceil_div(shape.taps * _filled(shape.channels), columns) * ceil_div(shape.outputs, outputs)


@triton.jit
def _sizes(place, o1, o2, s0, s1, s2):
    """Where a place [BT] begins in the padded image, along each axis."""
    line = place // o2
    return line // o1 * s0, line % o1 * s1, place % o2 * s2


@triton.jit
def _product(
    images_ptr, output_grads_ptr, row, place, live, group, j, i,
    groups, channels, outputs, places, taps, d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
    IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Columns j, outputs i of a group's gradient over one step's terms (row, place), fp32 [BC, BO]."""
    tap = j // channels  # [BC]
    x0 = tap // (k1 * k2) * r0 - p0
    x1 = tap // k2 % k1 * r1 - p1
    x2 = tap % k2 * r2 - p2
    column = ((x0 * d1 + x1) * d2 + x2) * (groups * channels) + (group * channels + j % channels)
    z0, z1, z2 = _sizes(place, o1, o2, s0, s1, s2)
    g = tl.load(
        output_grads_ptr
        + ((row * places + place) * (groups * outputs))[:, None]
        + (group * outputs + i)[None, :],
        mask=live[:, None] & (i < outputs)[None, :],
        other=0.0,
    )  # [BT, BO]
    seen = live[:, None] & (j < taps * channels)[None, :]
    if not IN0:
        seen = seen & (x0[None, :] + z0[:, None] >= 0) & (x0[None, :] + z0[:, None] < d0)
    if not IN1:
        seen = seen & (x1[None, :] + z1[:, None] >= 0) & (x1[None, :] + z1[:, None] < d1)
    if not IN2:
        seen = seen & (x2[None, :] + z2[:, None] >= 0) & (x2[None, :] + z2[:, None] < d2)
    pixel = row * (d0 * d1 * d2) + ((z0 * d1 + z1) * d2 + z2)
    x = tl.load(
        images_ptr + (pixel * (groups * channels))[:, None] + column[None, :], mask=seen, other=0.0
    )  # [BT, BC]
    return exact_dot(tl.trans(x), g, tl.zeros((BC, BO), tl.float32))


@triton.jit
def _at(group, j, i, channels, outputs, taps, true_channels, true_outputs):
    """Places of columns j, outputs i in a gradient [groups, outputs, taps, channels], and which of them there are."""
    c = j % channels
    place = (group * true_outputs + i)[None, :] * (taps * true_channels) + (
        j // channels * true_channels + c
    )[:, None]
    return place, ((j < taps * channels) & (c < true_channels))[:, None] & (i < true_outputs)[None, :]


@triton.jit
def _conv_half_tile_kernel(
    images_ptr, output_grads_ptr, offsets_ptr, order_ptr, partials_ptr, grads_ptr, rows, tiles, across, gain, numel,
    groups, chunks, bundles, true_channels, true_outputs, places, taps,
    d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
    IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr, VC: tl.constexpr, VO: tl.constexpr,
    BC: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One piece [BC, BO] of a unit's gradient in one group, formed on the chip; squared, or kept, or both.

    gain: 1; a number that the compiler does not know keeps it from one chain over all steps.
    """
    work = tl.program_id(0).to(tl.int64)
    tile = (work % tiles).to(tl.int32)
    group = (work // tiles % groups).to(tl.int32)
    unit = work // tiles // groups
    channels = chunks * VC
    outputs = bundles * VO
    first, last = segment(offsets_ptr, unit, rows)
    j = tile % across * BC + tl.arange(0, BC)
    i = tile // across * BO + tl.arange(0, BO)
    terms = (last - first) * places
    acc = tl.zeros((BC, BO), tl.float32)
    for at in range(0, terms, BT):
        # One division in 64 bits for all terms of a step.
        image = at // places
        place = (at - image * places).to(tl.int32) + tl.arange(0, BT)  # [BT]
        row = first + image + place // places
        live = at + tl.arange(0, BT) < terms
        if order_ptr is not None:
            row = tl.load(order_ptr + row, mask=live, other=0)
            row = tl.minimum(tl.maximum(row, 0), rows - 1)
        step = _product(
            images_ptr, output_grads_ptr, row, place % places, live, group, j, i,
            groups, channels, outputs, places, taps,
            d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2, IN0, IN1, IN2, BO, BC,
        )  # fmt: skip
        acc += gain * step
    if grads_ptr is not None:
        place, there = _at(group, j, i, channels, outputs, taps, true_channels, true_outputs)
        tl.store(grads_ptr + unit * numel + place, acc, mask=there)
    if partials_ptr is not None:
        # At most 16 squares in fp32: a conversion to fp64 takes as long as dozens of products.
        squares = tl.sum(tl.reshape(acc * acc, (BC, BO // _APART, _APART)), axis=1).to(tl.float64)  # [BC, 8]
        tl.store(partials_ptr + work, tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit
def _conv_half_sum_kernel(
    images_ptr, output_grads_ptr, weights_ptr, partials_ptr, tiles, across, length, steps, total, numel,
    groups, chunks, bundles, true_channels, true_outputs, places, taps,
    d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2,
    IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr, VC: tl.constexpr, VO: tl.constexpr,
    BC: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One piece [BC, BO] of a group's weighted sum over `length` of `total` steps, counted through all images."""
    work = tl.program_id(0).to(tl.int64)
    tile = (work % tiles).to(tl.int32)
    group = (work // tiles % groups).to(tl.int32)
    piece = work // tiles // groups
    channels = chunks * VC
    outputs = bundles * VO
    j = tile % across * BC + tl.arange(0, BC)
    i = tile // across * BO + tl.arange(0, BO)
    begin = piece * length
    acc = tl.zeros((BC, BO), tl.float32)
    for at in range(begin, tl.minimum(begin + length, total)):
        # A step is of one image, and so of one weight, which the products need not be rounded for.
        row = at // steps
        place = ((at - row * steps) * BT).to(tl.int32) + tl.arange(0, BT)  # [BT]
        w = tl.load(weights_ptr + row)
        # An image of weight zero is not read: what it holds may not be finite.
        live = place < tl.where(w != 0.0, places, 0)  # (and no comparison of a scalar with `&`: Triton 3.6)
        step = _product(
            images_ptr, output_grads_ptr, row, place, live, group, j, i,
            groups, channels, outputs, places, taps,
            d0, d1, d2, k1, k2, s0, s1, s2, p0, p1, p2, r0, r1, r2, o1, o2, IN0, IN1, IN2, BO, BC,
        )  # fmt: skip
        acc += w * step
    place, there = _at(group, j, i, channels, outputs, taps, true_channels, true_outputs)
    tl.store(partials_ptr + piece * numel + place, acc.to(tl.float64), mask=there)


def norms(
    shape: ConvShape, x: Tensor, g: Tensor, offsets: Tensor, order: Tensor | None, sq_norms: Tensor
) -> None:
    """Add squared norms of the units' gradients; x and g of one type, as `shape` says."""
    blocks = _unit_blocks(shape, len(x), len(sq_norms))
    programs = len(sq_norms) * shape.groups * _tiles(shape, blocks)
    partials = torch.empty(programs, dtype=torch.float64, device=x.device)
    _form_units(shape, blocks, x, g, offsets, order, partials, None)
    add_totals(sq_norms, partials)


def unit_grads(
    shape: ConvShape, x: Tensor, g: Tensor, offsets: Tensor, order: Tensor | None, grads: Tensor
) -> None:
    """Gradients of units to `grads` float32 [U, numel], written."""
    _form_units(shape, _unit_blocks(shape, len(x), len(grads)), x, g, offsets, order, None, grads)


def weighted_sum(shape: ConvShape, x: Tensor, g: Tensor, row_weights: Tensor, out: Tensor) -> None:
    """As `synthward.kernels.conv_sum`: a number of pieces that the shapes alone decide, added up in their order."""
    blocks = half_blocks(shape, shape.places)
    tiles, steps = _tiles(shape, blocks), ceil_div(shape.places, blocks.terms)
    total = len(x) * steps
    pieces = min(_PIECES, max(1, _PROGRAMS // (shape.groups * tiles)), ceil_div(total, _STEPS))
    length = ceil_div(total, pieces)
    pieces = ceil_div(total, length)
    # The weights, which tell what is read, come as long before.
    blocks = blocks._replace(stages=2 * blocks.stages - 1)
    (x, g), sizes = _last(shape, x, g), (_across(shape, blocks), length, steps, total, shape.numel)
    partials = torch.empty(pieces, shape.numel, dtype=torch.float64, device=x.device)
    _conv_half_sum_kernel[(pieces * shape.groups * tiles,)](
        *(x, g, row_weights.contiguous(), partials, tiles, *sizes, *_numbers(shape)),
        **_choices(shape, blocks),
    )
    add_pieces(out, partials)


def _form_units(
    shape: ConvShape,
    blocks: HalfBlocks,
    x: Tensor,
    g: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    partials: Tensor | None,
    grads: Tensor | None,
) -> None:
    tiles = _tiles(shape, blocks)
    offsets, order = offsets.contiguous(), None if order is None else order.contiguous()
    x, g = _last(shape, x, g)
    _conv_half_tile_kernel[((len(offsets) - 1) * shape.groups * tiles,)](
        *(x, g, offsets, order, partials, grads, len(x), tiles, _across(shape, blocks), 1.0, shape.numel),
        *_numbers(shape),
        **_choices(shape, blocks),
    )


def _filled(channels: int) -> int:
    """Channels of a group with the zeros behind them: what lies side by side is then read 4, 8 or 16 bytes at once."""
    each = 2 if channels <= 2 else 4 if channels < 32 else 8
    return ceil_div(channels, each) * each


def _last(shape: ConvShape, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return (
        _channels_last(x, shape, shape.channels, math.prod(shape.size)),
        _channels_last(g, shape, shape.outputs, shape.places),
    )


def _channels_last(x: Tensor, shape: ConvShape, channels: int, places: int) -> Tensor:
    """[N, places, groups * filled channels], contiguous; x itself if it is that already."""
    rows, groups, filled = len(x), shape.groups, _filled(channels)
    x = x.detach()
    if shape.channels_last:
        x = x.reshape(rows, places, groups, channels)
    else:
        x = x.reshape(rows, groups, channels, places).permute(0, 3, 1, 2)
    if filled == channels:
        return x.contiguous()
    out = x.new_zeros(rows, places, groups, filled)
    out[..., :channels] = x
    return out


def _unit_blocks(shape: ConvShape, rows: int, units: int) -> HalfBlocks:
    return half_blocks(shape, ceil_div(rows, units) * shape.places, units * shape.groups)


def _across(shape: ConvShape, blocks: HalfBlocks) -> int:
    return ceil_div(shape.taps * _filled(shape.channels), blocks.columns)


def _tiles(shape: ConvShape, blocks: HalfBlocks) -> int:
    return _pieces(shape, blocks.columns, blocks.outputs)


def _vectors(shape: ConvShape) -> tuple[int, int]:
    """Channels, and outputs, that lie side by side wherever a group's begin: what the compiler is told."""
    return math.gcd(_filled(shape.channels), 8), math.gcd(_filled(shape.outputs), 8)


def _numbers(shape: ConvShape) -> tuple[int, ...]:
    """In the order of the kernels' arguments."""
    v, (of_channels, of_outputs) = shape, _vectors(shape)
    return (
        *(
            v.groups,
            _filled(v.channels) // of_channels,
            _filled(v.outputs) // of_outputs,
            v.channels,
            v.outputs,
        ),
        *(v.places, v.taps, *v.size, *v.kernel[1:], *v.stride, *v.padding, *v.dilation, *v.out[1:]),
    )


def _choices(shape: ConvShape, blocks: HalfBlocks) -> dict[str, Any]:
    spans = zip(shape.size, shape.reach, shape.padding, strict=True)
    within = [before == 0 and reach <= size for size, reach, before in spans]
    of_channels, of_outputs = _vectors(shape)
    return {
        **{f"IN{axis}": value for axis, value in enumerate(within)},
        **{"VC": of_channels, "VO": of_outputs},
        **{"BC": blocks.columns, "BO": blocks.outputs, "BT": blocks.terms},
        **{"num_warps": blocks.warps, "num_stages": blocks.stages},
        **FUSED,
    }
