"""Group norm and instance norm: the diagonal family, a row of each record with all its positions added up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.provenance import Target
from synthward.engine.rules.outputs import owned
from synthward.engine.rules.uses import DiagonalRows, Use, diagonal_use
from synthward.kernels import group_norm_backward


class _GroupNorm(torch.autograd.Function):
    """Group norm whose backward gives the input gradient alone and keeps what weights need."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:])).contiguous()
        rows, channels, length = flat.shape
        out, mean, rstd = torch.native_group_norm(flat, weight, bias, rows, channels, length, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.state, ctx.call = state, call
        return owned(out.view(x.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operation, weight_at, bias_at, leading, forward = ctx.call
        ctx.state.refuse_double(operation)
        x, weight, mean, rstd = ctx.saved_tensors
        shape = (*x.shape[:2], math.prod(x.shape[2:]))
        flat, g = x.detach().reshape(shape).contiguous(), grad.reshape(shape).contiguous()
        scale, bias = flat.new_empty((2, *shape[:2]), dtype=torch.float32).unbind()
        dx = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        weight = None if weight is None else weight.detach().float().contiguous()
        group_norm_backward(flat, g, mean.float(), rstd.float(), weight, dx=dx, scale=scale, bias=bias)
        uses: list[tuple[Target, Use | DiagonalRows]] = [
            (target, diagonal_use(ctx.state, rows, leading, forward))
            for target, rows in ((weight_at, scale), (bias_at, bias))
            if target is not None
        ]
        ctx.state.keep(Kept(operation, leading, forward, uses))
        grad_x = None if dx is None else dx.view(x.shape)
        return grad_x, None, None, None, None, ctx.state.anchor_grad, None, None


def _run(
    state: CaptureState,
    operation: str,
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    state.refuse_tracked(input, operation)
    weight_at, bias_at = state.target(weight), state.target(bias)
    state.refuse_computed(weight, weight_at, bias, operation)
    state.refuse_computed(bias, bias_at, weight, operation)
    if torch.is_autocast_enabled(input.device.type) and input.device.type == "cuda":
        input = input.float()  # as autocast does
    call = state.call(operation, (weight_at, bias_at), input.shape[0])
    apply: Callable[..., Tensor] = _GroupNorm.apply
    return apply(input, groups, weight, bias, eps, state.anchor, state, (operation, *call))


def group_norm(
    state: CaptureState,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Handler of ``torch.nn.functional.group_norm``; input [rows, channels, ...]."""
    if input.dim() < 2 or input.shape[1] % num_groups:
        return F.group_norm(input, num_groups, weight, bias, eps)  # says what is wrong
    return _run(state, "group_norm", input, num_groups, weight, bias, eps)


def instance_norm(
    state: CaptureState,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Handler of ``torch.nn.functional.instance_norm``; input [rows, channels, ...]. Running statistics are refused
    before this."""
    if not use_input_stats or input.dim() < 3 or math.prod(input.shape[2:]) == 1:
        # Torch says what is wrong.
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _run(state, "instance_norm", input, input.shape[1], weight, bias, eps)


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
}
