"""Backward passes of normalisations that also give each unit's gradients of scale and bias, from the same reading."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.normalize import cpp_impl, reference


def layer_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    order: Tensor | None = None,
    dx: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Layer norm (over rows) and RMS norm (`mean` None): input gradient and per-unit gradients.

    Args:
        x: inputs [N, p], as are output_grads.
        mean: float32 [N]; None for RMS norm.
        rstd: float32 [N], one over each row's deviation.
        weight: scale [p], or None for ones.
        offsets: int64 [U + 1], or None where every row is a unit.
        order: int64 [N], the rows in unit order; None where they are.
        dx: written, [N, p]: gradient of the input.
        scale: written, float32 [U, p]: ``sum_n g_n * (x_n - mean_n) * rstd_n``.
        bias: written, float32 [U, p]: ``sum_n g_n``.
        backend: who executes.

    Guarantees: a non-finite row shows in its own row of `dx` and its own unit alone.
    """
    _check.matrix(x, "x")
    _check.matrix(output_grads, "output_grads")
    _check.shape(output_grads, tuple(x.shape), "output_grads")
    rows, width = x.shape
    for name, vector, length in (("mean", mean, rows), ("rstd", rstd, rows), ("weight", weight, width)):
        if vector is not None:
            _check.flat_float(vector, name, length)
    if order is not None:
        if order.dtype != torch.int64:
            raise TypeError(f"order: has dtype {order.dtype}, expected torch.int64")
        _check.shape(order, (rows,), "order")
    units = _check.unit_count(offsets, rows)
    _check_outputs(dx, tuple(x.shape), (scale, bias), (units, width))
    written = (dx, scale, bias)
    arguments = (x, output_grads, mean, rstd, weight, offsets, order)
    chosen = choose(backend, *arguments, written=written)
    if chosen == "reference":
        reference.layer_norm_backward(*arguments, units, written)
    elif chosen == "shapes":
        return
    elif not x.numel():
        _zero(written)
    elif chosen == "cpp":
        cpp_impl.layer_norm_backward(*arguments, written)
    else:
        from synthward.kernels.normalize import triton_impl

        triton_impl.layer_norm_backward(*arguments, units, written)


def group_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    scale: Tensor,
    bias: Tensor,
    dx: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Group norm and, with a group for each channel, instance norm: input gradient and per-row gradients.

    Args:
        x: inputs [N, C, L], as are output_grads.
        mean: float32 [N, groups], as is rstd.
        weight: scale [C], or None for ones.
        scale: written, float32 [N, C]: sums over L of ``g * (x - mean) * rstd``.
        bias: written, float32 [N, C]: sums over L of ``g``.
        dx: written, [N, C, L]: gradient of the input.
        backend: who executes.

    Guarantees: a non-finite row shows in its own row alone.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: has shape {list(x.shape)}, expected three dimensions of floating point")
    _check.shape(output_grads, tuple(x.shape), "output_grads")
    _check.matrix(mean, "mean")
    rows, channels, _ = x.shape
    groups = mean.shape[1]
    _check.shape(mean, (rows, groups), "mean")
    _check.shape(rstd, (rows, groups), "rstd")
    if groups < 1 or channels % groups:
        raise ValueError(f"mean: has {groups} groups, which do not divide {channels} channels")
    if weight is not None:
        _check.flat_float(weight, "weight", channels)
    _check_outputs(dx, tuple(x.shape), (scale, bias), (rows, channels))
    inputs, outputs = (x, output_grads, mean, rstd, weight), (dx, scale, bias)
    chosen = choose(backend, *inputs, written=outputs)
    if chosen == "reference":
        reference.group_norm_backward(*inputs, *outputs)
    elif chosen == "shapes":
        return
    elif not x.numel():
        _zero(outputs)
    elif chosen == "cpp":
        cpp_impl.group_norm_backward(*inputs, *outputs)
    else:
        from synthward.kernels.normalize import triton_impl

        triton_impl.group_norm_backward(*inputs, *outputs)


def _check_outputs(
    dx: Tensor | None,
    dx_shape: tuple[int, ...],
    sums: tuple[Tensor | None, ...],
    sums_shape: tuple[int, ...],
) -> None:
    if dx is not None:
        _check.shape(dx, dx_shape, "dx")
    for name, tensor in zip(("scale", "bias"), sums, strict=True):
        if tensor is not None:
            _check.shape(tensor, sums_shape, name)
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: has dtype {tensor.dtype}, expected torch.float32")


def _zero(tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()
