"""Plain torch: what the compiled kernels are held to, and what runs where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels._segments import row_units


def _input_grad(h: Tensor, normalised: Tensor, rstd: Tensor, *, is_centred: bool) -> Tensor:
    """Gradient through a normalisation over the last axis; h is the gradient at the normalised input."""
    inner = h - normalised * (h * normalised).mean(-1, keepdim=True)
    if is_centred:
        inner = inner - h.mean(-1, keepdim=True)
    return inner * rstd


def layer_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    units: int,
    written: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    g, r = output_grads.float(), rstd.unsqueeze(1)
    normalised = (x.float() if mean is None else x.float() - mean.unsqueeze(1)) * r
    dx, scale, bias = written
    if dx is not None:
        dx.copy_(_input_grad(g if weight is None else g * weight, normalised, r, is_centred=mean is not None))
    in_order = row_units(offsets, len(x), x.device)
    for out, rows in ((scale, g * normalised), (bias, g)):
        if out is not None:
            sorted_rows = rows if order is None else rows.index_select(0, order)
            sums = torch.zeros(units, x.shape[1], dtype=torch.float64, device=x.device)
            out.copy_(sums.index_add_(0, in_order, sorted_rows.double()))


def group_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    scale: Tensor,
    bias: Tensor,
) -> None:
    (rows, channels, length), groups = x.shape, mean.shape[1]
    shape = (rows, groups, channels // groups, length)
    g, r = output_grads.float(), rstd.view(rows, groups, 1, 1)
    normalised = (x.float().reshape(shape) - mean.view(rows, groups, 1, 1)) * r
    if dx is not None:
        h = g if weight is None else g * weight.unsqueeze(1)
        inside = _input_grad(
            h.reshape(rows, groups, channels // groups * length),
            normalised.flatten(2),
            rstd.unsqueeze(2),
            is_centred=True,
        )
        dx.copy_(inside.reshape(dx.shape))
    scale.copy_((g.reshape(shape) * normalised).sum(3, dtype=torch.float64).view(rows, channels))
    bias.copy_(g.sum(2, dtype=torch.float64))
