"""Convolutions: norms, gradients of units, the clipped sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Kernel, Make, Maker, Units
from synthward.kernels import ConvShape, conv_norms, conv_sum, conv_unit_grads, sum_chain
from synthward.kernels.conv import reference

Axes = tuple[int, int, int]
ONES, ZEROS = (1, 1, 1), (0, 0, 0)

# Images; groups, channels and outputs of one; height and width, kernel, stride. The first layer of an image network,
# one of its middle, one of its end, a depthwise one, and one of sequences.
CONVOLUTIONS = [
    (128, 1, 3, 64, (224, 224), (7, 7), 2),
    (256, 1, 64, 64, (56, 56), (3, 3), 1),
    (256, 1, 512, 512, (7, 7), (3, 3), 1),
    (256, 256, 1, 1, (28, 28), (3, 3), 1),
    (512, 1, 128, 256, (1, 1024), (1, 5), 1),
]
SMALL_CONVOLUTIONS = [
    (2, 1, 3, 20, (9, 10), (7, 7), 2),
    (2, 1, 9, 70, (6, 7), (3, 3), 1),
    (2, 3, 1, 1, (6, 5), (3, 3), 1),
    (2, 1, 9, 20, (1, 150), (1, 5), 1),
]


def shape_of(
    groups: int,
    channels: int,
    outputs: int,
    size: Axes,
    kernel: Axes,
    stride: Axes = ONES,
    padding: Axes = ZEROS,
    dilation: Axes = ONES,
) -> ConvShape:
    """With as many places as fit."""
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    x, y, z = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans)
    return ConvShape(groups, channels, outputs, size, kernel, stride, padding, dilation, (x, y, z))


EDGES = [
    shape_of(1, 1, 1, (1, 1, 1), (1, 1, 1)),
    shape_of(2, 3, 4, (4, 6, 7), (3, 2, 4), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1)),
    shape_of(2, 3, 5, (1, 4, 5), (1, 3, 3), padding=(0, 1, 1)),
    # The kernel stands out over the image before its first place, and ends within it.
    shape_of(1, 2, 3, (1, 1, 8), (1, 1, 2), stride=(1, 1, 3), padding=(0, 0, 1)),
    shape_of(5, 1, 1, (1, 7, 7), (1, 3, 3), padding=(0, 1, 1)),
    # Chains of sums end within an image, and more than one block of channels and outputs.
    shape_of(1, 33, 70, (1, 1, 131), (1, 1, 3), padding=(0, 0, 1)),
]


def _rows(
    make: Maker, rows: int, v: ConvShape, dtype: torch.dtype, bad: float | None = None
) -> tuple[Tensor, Tensor]:
    x, g = make.matrix(rows, v.image_numel, dtype), make.matrix(rows, v.output_numel, dtype)
    if bad is not None:
        g[-1, 0] = bad
    return x, g


def _name(units: Units, v: ConvShape) -> str:
    size, kernel = (" x ".join(map(str, axes)) for axes in (v.size[1:], v.kernel[1:]))
    return f"{units.text} of {v.groups} x {v.channels}-{v.outputs}, {size}, {kernel}"


def _offsets(make: Maker, units: Units) -> Tensor:
    return torch.arange(units.rows + 1, device=make.device) if units.offsets is None else units.offsets


def norms(make: Maker, units: Units, v: ConvShape, dtype: torch.dtype, bad: float | None = None) -> Case:
    x, g = _rows(make, units.rows, v, dtype, bad)
    offsets, out, sums = _offsets(make, units), make.zeros(units.count), make.zeros(units.count)

    def exact() -> tuple[Tensor, Tensor]:
        found = reference.unit_grads(v, x, g, offsets, None).square().sum(1)
        return found, reference.unit_grads(v, x.abs(), g.abs(), offsets, None).square().sum(1)

    chain = sum_chain(v.places * max([1, *(units.lengths or [])]), compiled=True)
    return Case(
        *("conv_norms", _name(units, v)),
        lambda: conv_norms(v, x, g, offsets, out, sums, backend="triton"),
        *(lambda: out, exact),
        tolerance=2.0**-22 * chain,
        bytes=x.nbytes + g.nbytes,
        flops=2.0 * units.rows * v.places * v.numel,
        dtype=dtype,
        clear=[out, sums],
    )


def unit_grads(make: Maker, units: Units, v: ConvShape, dtype: torch.dtype, bad: float | None = None) -> Case:
    x, g = _rows(make, units.rows, v, dtype, bad)
    offsets, kept = _offsets(make, units), list[Tensor]()

    def run() -> None:
        kept[:] = [conv_unit_grads(v, x, g, offsets, backend="triton")]

    def exact() -> tuple[Tensor, Tensor]:
        found = reference.unit_grads(v, x, g, offsets, None)
        return found, reference.unit_grads(v, x.abs(), g.abs(), offsets, None)

    chain = sum_chain(v.places * max([1, *(units.lengths or [])]), compiled=True)
    return Case(
        *("conv_unit_grads", _name(units, v), run, lambda: kept[0], exact),
        tolerance=2.0**-23 * chain,
        bytes=x.nbytes + g.nbytes + 4.0 * units.count * v.numel,
        flops=2.0 * units.rows * v.places * v.numel,
        dtype=dtype,
    )


def clipped_sum(make: Maker, units: Units, v: ConvShape, dtype: torch.dtype, *, with_zeros: bool) -> Case:
    x, g = _rows(make, units.rows, v, dtype)
    w = make.clipped(x, g) if with_zeros else make.weights(units.rows)
    out = make.zeros(v.numel)

    def exact() -> tuple[Tensor, Tensor]:
        found, magnitude = (torch.zeros_like(out, dtype=torch.float64) for _ in range(2))
        reference.weighted_sum(v, x.double(), g.double(), w, found)
        reference.weighted_sum(v, x.double().abs(), g.double().abs(), w, magnitude)
        return found, magnitude

    return Case(
        *("conv_sum", _name(units, v)),
        lambda: conv_sum(v, x, g, w, out=out, backend="triton"),
        *(lambda: out, exact),
        tolerance=2.0**-23 * sum_chain(units.rows * v.places + 1, compiled=True),
        bytes=x.nbytes + g.nbytes + 2 * out.nbytes,
        flops=2.0 * units.rows * v.places * v.numel,
        dtype=dtype,
        clear=[out],
    )


def _unit_edges(build: Callable[..., Case], make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for v in EDGES:
        for lengths in ([1, 0, 2], [1, 1, 1], [0, 0], []):
            yield lambda v=v, n=lengths: build(make, make.units(n), v, dtype)
    for bad in (float("nan"), float("inf")):
        yield lambda bad=bad: build(make, make.units([1, 3, 0, 2]), EDGES[2], dtype, bad)


def _sum_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for v in EDGES:
        for rows in (0, 1, 5):
            yield lambda v=v, n=rows: clipped_sum(make, make.units(None, n), v, dtype, with_zeros=True)


def _large(make: Maker) -> Iterator[tuple[Units, ConvShape]]:
    for rows, groups, channels, outputs, size, kernel, step in (
        SMALL_CONVOLUTIONS if make.small else CONVOLUTIONS
    ):
        padding = (0, *(k // 2 for k in kernel))
        axes = ((1, *size), (1, *kernel), (1, step, step), padding)
        yield make.units(None, rows, text=f"{rows}"), shape_of(groups, channels, outputs, *axes)


def _unit_timed(build: Callable[..., Case], make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units, v in _large(make):
        yield lambda u=units, v=v: build(make, u, v, dtype)


def _sum_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units, v in _large(make):
        yield lambda u=units, v=v: clipped_sum(make, u, v, dtype, with_zeros=False)


KERNELS = {
    "conv_norms": Kernel(lambda *a: _unit_edges(norms, *a), lambda *a: _unit_timed(norms, *a)),
    "conv_unit_grads": Kernel(lambda *a: _unit_edges(unit_grads, *a), lambda *a: _unit_timed(unit_grads, *a)),
    "conv_sum": Kernel(_sum_edges, _sum_timed),
}
