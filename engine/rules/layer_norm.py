"""Layer norm and RMS norm: the diagonal family; a scale's rows are output gradient times normalised input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.layout import Layout
from synthward.engine.provenance import Target
from synthward.engine.rules.outputs import owned
from synthward.engine.rules.uses import DiagonalRows, DiagonalUse, Use, is_compiled
from synthward.kernels import layer_norm_backward, uses_triton


def _backward(
    ctx: Any,
    operation: str,
    x: Tensor,
    grad: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    *,
    with_dx: bool,
) -> Tensor | None:
    """Keep the uses of scale and bias and give the input gradient, from one reading of x and grad [N, width]."""
    state: CaptureState = ctx.state
    weight_at, bias_at, leading, forward = ctx.call
    known = state.call_layout(len(x), leading, forward)
    layout = known or Layout.uniform(len(x), 1, x.device)

    def sums(target: Target | None) -> Tensor | None:
        wanted = (layout.num_units, x.shape[1])
        return None if target is None else torch.empty(wanted, dtype=torch.float32, device=x.device)

    scale, bias = sums(weight_at), sums(bias_at)
    dx = torch.empty_like(x) if with_dx else None
    arguments = (x, grad, mean, rstd, weight, layout.offsets)
    layer_norm_backward(*arguments, order=layout.order, dx=dx, scale=scale, bias=bias)
    kind = DiagonalRows if known is None else DiagonalUse
    uses: list[tuple[Target, Use | DiagonalRows]] = [
        (target, kind(rows)) for target, rows in ((weight_at, scale), (bias_at, bias)) if rows is not None
    ]
    state.keep(Kept(operation, leading, forward, uses))
    return dx


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
        width, grad, wants_dx = math.prod(ctx.shape), grad.contiguous(), ctx.needs_input_grad[0]
        flat, g = x.detach().reshape(-1, width).contiguous(), grad.view(-1, width)
        # In the reference a pass of its own; torch's kernel is faster, and keeps the bits of float64.
        fused = is_compiled(flat, g) or uses_triton(flat, g)
        scale = None if weight is None else weight.detach().float().reshape(width)
        norm = (mean.float().flatten(), rstd.float().flatten(), scale)
        grad_x = _backward(ctx, "layer_norm", flat, g, *norm, with_dx=wants_dx and fused)
        if grad_x is not None:
            grad_x = grad_x.view(x.shape)
        elif wants_dx:
            arguments = (grad, x, ctx.shape, mean, rstd, weight, bias)
            grad_x = torch.ops.aten.native_layer_norm_backward(*arguments, [True, False, False])[0]
        return grad_x, None, None, None, None, ctx.state.anchor_grad, None, None


class _RMSNorm(torch.autograd.Function):
    """``F.rms_norm`` whose backward gives the input gradient alone and keeps what the scale needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        eps: float | None,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.state, ctx.call = shape, state, call
        ctx.eps = torch.finfo(x.dtype).eps if eps is None else eps
        return owned(F.rms_norm(x, shape, weight, eps))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("rms_norm")
        x, weight = ctx.saved_tensors
        width = math.prod(ctx.shape)
        flat = x.detach().reshape(-1, width).contiguous()
        rstd = flat.float().square().mean(1).add_(ctx.eps).rsqrt_()
        scale = None if weight is None else weight.detach().float().reshape(width)
        g = grad.reshape(-1, width).contiguous()
        grad_x = _backward(ctx, "rms_norm", flat, g, None, rstd, scale, with_dx=ctx.needs_input_grad[0])
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, None, None, None, ctx.state.anchor_grad, None, None


def _check_axes(
    state: CaptureState, input: Tensor, shape: list[int], parameter: object, operation: str
) -> None:
    if input.dim() <= len(shape):
        state.refuse(parameter, operation, "its input has no batch axis")


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
    _check_axes(state, input, shape, weight if weight_at is not None else bias, "layer_norm")
    call = state.call("layer_norm", (weight_at, bias_at), input.shape[0])
    apply: Callable[..., Tensor] = _LayerNorm.apply
    return apply(input, shape, weight, bias, eps, state.anchor, state, call)


def rms_norm(
    state: CaptureState,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Handler of ``torch.nn.functional.rms_norm``; input [rows, ..., *normalized_shape]."""
    state.refuse_tracked(input, "rms_norm")
    weight_at = state.target(weight)
    shape = [int(n) for n in normalized_shape]
    _check_axes(state, input, shape, weight, "rms_norm")
    call = state.call("rms_norm", (weight_at, None), input.shape[0])
    apply: Callable[..., Tensor] = _RMSNorm.apply
    return apply(input, shape, weight, eps, state.anchor, state, call)


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}
