"""Linear: the outer family for the weight, the diagonal family for the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.provenance import Target
from synthward.engine.rules.outputs import owned
from synthward.engine.rules.row_values import measured_type
from synthward.engine.rules.uses import DiagonalRows, OuterUse, Use, diagonal_use


class _Linear(torch.autograd.Function):
    """``F.linear`` whose backward gives the input gradient alone and keeps what weights need."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.state, ctx.call = state, call
        return owned(state.products.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("linear")
        x, weight = ctx.saved_tensors
        weight_at, bias_at, leading, forward = ctx.call
        dtype = measured_type(grad)
        g = grad.reshape(-1, grad.shape[-1]).to(dtype).contiguous()
        uses: list[tuple[Target, Use | DiagonalRows]] = []
        if weight_at is not None:
            # As autocast takes it.
            a = x.detach().reshape(-1, x.shape[-1]).to(dtype).contiguous()
            # What has a gradient function of its own was computed on the way; the rest may be the caller's
            # data.
            is_shared = x.grad_fn is None or x._is_view()
            uses.append((weight_at, OuterUse(a, g, is_shared)))
        if bias_at is not None and weight_at is not None:
            uses.append((bias_at, DiagonalRows(g, is_bias_of_outer=True)))
        elif bias_at is not None:
            uses.append((bias_at, diagonal_use(ctx.state, g, leading, forward)))
        ctx.state.keep(Kept("linear", leading, forward, uses))
        grad_x = ctx.state.products.input_grad(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, ctx.state.anchor_grad, None, None


def linear(state: CaptureState, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Handler of ``torch.nn.functional.linear``; input [rows, ..., d]."""
    state.refuse_tracked(input, "linear")
    weight_at, bias_at = state.target(weight), state.target(bias)
    if weight_at is None and bias_at is None:
        return F.linear(input, weight, bias)
    state.refuse_computed(weight, weight_at, bias, "linear")
    state.refuse_computed(bias, bias_at, weight, "linear")
    if input.dim() < 2:
        state.refuse(weight if weight_at is not None else bias, "linear", "its input has no batch axis")
    call = state.call("linear", (weight_at, bias_at), input.shape[0])
    apply: Callable[..., Tensor] = _Linear.apply
    return apply(input, weight, bias, state.anchor, state, call)
