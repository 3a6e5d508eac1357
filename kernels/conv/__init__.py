"""Convolutions: the outer family with patches of images as rows, which are never unfolded in memory.

Images are [N, groups * channels * size...], output gradients [N, groups * outputs * out...], both contiguous and flat,
or with their channels behind their places (`ConvShape.channels_last`); a privacy unit owns whole images. Weight
gradients have the channels last, [groups * outputs, taps, channels] flat: the order in which they are formed.

The compiled kernels of the CPU take float32 alone; what is not runs as the reference there, in double. Those of a GPU
read bfloat16 and float16 as they are, both operands of one type, and multiply them exactly; two types become float32.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, Choice, choose, is_shape, uses_triton
from synthward.kernels.conv import cpp_impl, reference
from synthward.kernels.conv.shape import HALF_TERMS
from synthward.kernels.conv.shape import ConvShape as ConvShape

Method = Literal["gram", "tile"]


def conv_norms(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor,
    *,
    order: Tensor | None = None,
    method: Method = "tile",
    backend: Backend = "auto",
) -> None:
    """Add each unit's squared norm to `sq_norms`, and to `row_sums` a bound of the sum of the norms of the gradients
    of its places.

    Args:
        shape: the convolution's sizes.
        images: floating point [N, image_numel].
        output_grads: floating point [N, output_numel].
        offsets: int64 [U + 1].
        sq_norms: float32 [U].
        row_sums: float32 [U].
        order: int64 [N], the images in unit order; None where they are.
        method: "gram", products of pairs of places (stride 1, one image a unit, N = U), which only the compiled
            kernels know, others form the gradient; or "tile", the gradient itself, squared and forgotten.
        backend: who executes.
    """
    units = _check_rows(shape, images, output_grads, offsets, order)
    _check.flat_float(sq_norms, "sq_norms", units)
    _check.flat_float(row_sums, "row_sums", units)
    if method not in ("gram", "tile"):
        raise ValueError(f"method: got {method!r}, expected 'gram' or 'tile'")
    if method == "gram" and (
        shape.stride != (1, 1, 1) or order is not None or not _is_single(offsets, images)
    ):
        raise ValueError("method: 'gram' needs one image a unit and stride 1")
    chosen = _choose(shape, backend, images, output_grads, offsets, order, written=(sq_norms, row_sums))
    if chosen == "triton":
        from synthward.kernels.conv import triton_impl

        triton_impl.norms(shape, images, output_grads, offsets, order, sq_norms, row_sums)
        return
    operands = shape.channels_first(images, output_grads)
    if chosen == "cpp" and len(images):
        cpp_impl.norms(*operands, offsets, order, sq_norms, row_sums, None, method)
    elif chosen != "shapes":
        reference.norms(*operands, offsets, order, sq_norms, row_sums)


def conv_unit_grads(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    *,
    order: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Gradient of each unit, float32 [U, numel], channels last. Arguments as in `conv_norms`."""
    units = _check_rows(shape, images, output_grads, offsets, order)
    grads = torch.empty(units, shape.numel, dtype=torch.float32, device=images.device)
    chosen = _choose(shape, backend, images, output_grads, offsets, order)
    if chosen == "triton":
        from synthward.kernels.conv import triton_impl

        triton_impl.unit_grads(shape, images, output_grads, offsets, order, grads)
        return grads
    operands = shape.channels_first(images, output_grads)
    if chosen == "cpp" and len(images):
        cpp_impl.norms(*operands, offsets, order, None, None, grads, "tile")
        return grads
    if chosen == "shapes":
        return grads
    return grads.copy_(reference.unit_grads(*operands, offsets, order))


def conv_sum(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    row_weights: Tensor,
    *,
    out: Tensor,
    backend: Backend = "auto",
) -> None:
    """``out += sum_n w_n G_n`` float32 [numel], channels last; row_weights float32 [N]. An image of weight zero is not
    there, whatever it holds. The order of the additions depends on the shapes alone. A float64 ``out`` is summed in
    float64."""
    offsets = torch.arange(len(images) + 1, device=images.device)
    _check_rows(shape, images, output_grads, offsets)
    _check.flat_float(row_weights, "row_weights", len(images))
    _check.flat_sum(out, "out", shape.numel)
    chosen = _choose(shape, backend, images, output_grads, row_weights, written=(out,))
    if chosen == "triton":
        from synthward.kernels.conv import triton_impl

        triton_impl.weighted_sum(shape, images, output_grads, row_weights, out)
        return
    operands = shape.channels_first(images, output_grads)
    if chosen == "cpp":
        if len(images):
            cpp_impl.weighted_sum(*operands, row_weights, out)
    elif chosen != "shapes":
        reference.weighted_sum(*operands, row_weights, out)


def prefers_channels_last(shape: ConvShape, images: Tensor, output_grads: Tensor) -> bool:
    """Whether `auto` runs kernels that take these with their channels last, and would make copies of others."""
    if images.dtype != output_grads.dtype or images.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not (_is_counted(shape) and uses_triton(images, output_grads)):
        return False
    from synthward.kernels.conv import triton_half

    return triton_half.is_worth_while(shape)


@overload
def half_chain(shape: ConvShape, images: int) -> int: ...
@overload
def half_chain(shape: ConvShape, images: int | Tensor) -> int | Tensor: ...
def half_chain(shape: ConvShape, images: int | Tensor) -> int | Tensor:
    """As `synthward.kernels.sum_chain`, for a sum over all places of so many images of bfloat16 or float16 on a GPU.

    A tensor core adds up 8 products and more at once, and cuts the sum off instead of rounding it (Fasi et al. 2021,
    Numerical behavior of NVIDIA tensor cores): what that takes is counted as two additions for each product. Squares of
    a formed gradient are added up in single precision 16 at a time, as much as 8 additions in the gradient would take.
    """
    terms = shape.places * images
    within = terms.clamp(max=HALF_TERMS) if isinstance(terms, Tensor) else min(terms, HALF_TERMS)
    return 2 * within + images * -(-shape.places // HALF_TERMS) + 8


def _choose(
    shape: ConvShape, backend: Backend, *inputs: Tensor | None, written: tuple[Tensor, ...] = ()
) -> Choice:
    return choose(backend, *inputs, written=written, triton=_is_counted(shape))


def _is_counted(shape: ConvShape) -> bool:
    """Whether the Triton kernels can take it, which count in 32 bits within one image."""
    axes = (*shape.reach, *shape.size, *(abs(p) for p in shape.padding))
    return max(shape.image_numel, shape.output_numel, shape.numel, *axes) < 1 << 30


def _is_single(offsets: Tensor, images: Tensor) -> bool:
    if len(offsets) != len(images) + 1:
        return False
    # On a device it would take waiting to know; what runs there takes any units.
    return offsets.device.type != "cpu" or is_shape(offsets) or bool((offsets.diff() == 1).all())


def _check_rows(
    shape: ConvShape, images: Tensor, output_grads: Tensor, offsets: Tensor, order: Tensor | None = None
) -> int:
    _check.matrix(images, "images")
    _check.matrix(output_grads, "output_grads")
    _check.same_rows(output_grads, len(images), "output_grads")
    _check.shape(images, (len(images), shape.image_numel), "images")
    _check.shape(output_grads, (len(images), shape.output_numel), "output_grads")
    if order is not None:
        if order.dtype != torch.int64:
            raise TypeError(f"order: has dtype {order.dtype}, expected torch.int64")
        _check.shape(order, (len(images),), "order")
    return _check.unit_count(offsets, len(images))
