"""Plain torch: what the compiled kernels are held to. In double precision, some images at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.kernels._segments import row_units
from synthward.kernels.conv.shape import ConvShape

# Elements of unfolded patches at a time.
_CHUNK = 1 << 24


def _image_grads(shape: ConvShape, images: Tensor, output_grads: Tensor) -> Tensor:
    """Gradient of each image, float64 [n, groups * outputs * taps * channels]."""
    rows = len(images)
    x = images.double().reshape(rows, shape.groups * shape.channels, *shape.size)
    pads: list[int] = []
    for axis in (2, 1, 0):
        before = shape.padding[axis]
        pads += [before, shape.reach[axis] - before - shape.size[axis]]
    x = F.pad(x, pads)
    for axis in range(3):
        # Every tap of the kernel along one axis: [..., reach, ...] -> [..., out, ..., tap].
        taps = torch.arange(shape.kernel[axis], device=x.device) * shape.dilation[axis]
        places = torch.arange(shape.out[axis], device=x.device) * shape.stride[axis]
        index = (places.unsqueeze(1) + taps).flatten()
        x = x.index_select(2 + axis, index)
        sizes = [*x.shape[: 2 + axis], shape.out[axis], shape.kernel[axis], *x.shape[3 + axis :]]
        x = x.view(sizes).movedim(3 + axis, -1)
    x = x.reshape(rows, shape.groups, shape.channels, shape.places, shape.taps)
    g = output_grads.double().reshape(rows, shape.groups, shape.outputs, shape.places)
    return torch.einsum("ngcpk,ngop->ngokc", x, g).reshape(rows, shape.numel)


def unit_grads(
    shape: ConvShape, images: Tensor, output_grads: Tensor, offsets: Tensor, order: Tensor | None
) -> Tensor:
    units = row_units(offsets, len(images), images.device)
    if order is not None:
        images, output_grads = images[order], output_grads[order]
    total = torch.zeros(len(offsets) - 1, shape.numel, dtype=torch.float64, device=images.device)
    each = shape.groups * shape.channels * shape.places * shape.taps
    chunk = max(1, _CHUNK // each)
    for first in range(0, len(images), chunk):
        rows = slice(first, first + chunk)
        total.index_add_(0, units[rows], _image_grads(shape, images[rows], output_grads[rows]))
    return total


def norms(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    sq_norms: Tensor,
    row_sums: Tensor,
) -> None:
    grads = unit_grads(shape, images, output_grads, offsets, order)
    sq_norms += grads.square().sum(1).float()
    squares = shape.taps * images.double().square().sum(1) * output_grads.double().square().sum(1)
    lengths = squares.sqrt() * shape.groups**0.5
    units = row_units(offsets, len(images), images.device)
    row_sums.index_add_(0, units, (lengths if order is None else lengths[order]).float())


def weighted_sum(
    shape: ConvShape, images: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor
) -> None:
    each = shape.groups * shape.channels * shape.places * shape.taps
    chunk = max(1, _CHUNK // each)
    for first in range(0, len(images), chunk):
        rows = slice(first, first + chunk)
        grads = _image_grads(shape, images[rows], output_grads[rows])
        weights = row_weights[rows].double().unsqueeze(1)
        out += torch.where(weights == 0, torch.zeros_like(grads), weights * grads).sum(0).to(out.dtype)
