"""LayerNorm: the diagonal family; the rows of the scale are output gradient times normalised input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.provenance import Target
from synthward.engine.rules.uses import DiagonalRows, Use, diagonal_use


class _LayerNorm(torch.autograd.Function):
    """``F.layer_norm`` whose backward gives the input gradient alone and keeps what weights need."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape, ctx.state, ctx.call = shape, state, call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("layer_norm")
        x, weight, bias, mean, rstd = ctx.saved_tensors
        weight_at, bias_at, leading, forward = ctx.call
        width = math.prod(ctx.shape)
        grad = grad.contiguous()
        g = grad.reshape(-1, width).float()
        uses: list[tuple[Target, Use | DiagonalRows]] = []
        if weight_at is not None:
            # The factor 1 / std of a row goes into the sum over the unit's rows: one pass less.
            deviation = torch.sub(x.detach(), mean, out=ctx.state.workspace(x.shape)).mul_(grad)
            uses.append(
                (
                    weight_at,
                    diagonal_use(ctx.state, deviation.view(-1, width), leading, forward, rstd.flatten()),
                )
            )
        if bias_at is not None:
            uses.append((bias_at, diagonal_use(ctx.state, g, leading, forward)))
        ctx.state.keep(Kept("layer_norm", leading, forward, uses))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return grad_x, None, None, None, None, ctx.state.anchor_grad, None, None


def layer_norm(
    state: CaptureState,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Handler of ``torch.nn.functional.layer_norm``; input [rows, ..., *normalized_shape]."""
    state.refuse_tracked(input, "layer_norm")
    weight_at, bias_at = state.target(weight), state.target(bias)
    if weight_at is None and bias_at is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    state.refuse_computed(weight, weight_at, bias, "layer_norm")
    state.refuse_computed(bias, bias_at, weight, "layer_norm")
    shape = [int(n) for n in normalized_shape]
    if input.dim() <= len(shape):
        state.refuse(weight if weight_at is not None else bias, "layer_norm", "its input has no batch axis")
    call = state.call("layer_norm", (weight_at, bias_at), input.shape[0])
    apply: Callable[..., Tensor] = _LayerNorm.apply
    return apply(input, shape, weight, bias, eps, state.anchor, state, call)
