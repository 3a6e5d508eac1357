"""Embedding: the scatter family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.rules.outputs import owned
from synthward.engine.rules.uses import ScatterUse


class _Embedding(torch.autograd.Function):
    """``F.embedding`` whose backward keeps ids and output gradients."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding: int, anchor: Tensor, state: CaptureState, call: Any
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.state, ctx.call, ctx.num_rows = padding, state, call, len(weight)
        return owned(F.embedding(ids, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("embedding")
        (ids,) = ctx.saved_tensors
        weight_at, leading, forward = ctx.call
        ids = ids.reshape(-1).long()
        g = grad.reshape(-1, grad.shape[-1]).float().contiguous()
        if ctx.padding >= 0:
            is_padding = ids == ctx.padding
            ids = torch.where(is_padding, torch.full_like(ids, -1), ids)
            # The padded entry takes no gradient, so its rows must not count in the unit's norm either.
            g = torch.where(is_padding.unsqueeze(1), torch.zeros_like(g), g)
        ctx.state.keep(Kept("embedding", leading, forward, [(weight_at, ScatterUse(ids, g, ctx.num_rows))]))
        return None, None, None, ctx.state.anchor_grad, None, None


def embedding(
    state: CaptureState,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Handler of ``torch.nn.functional.embedding``; input ids [rows, ...]."""
    weight_at = state.target(weight)
    if weight_at is None:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None:
        state.refuse(
            weight, "embedding", "max_norm rewrites the table from the records, without noise; leave it out"
        )
    if scale_grad_by_freq:
        state.refuse(weight, "embedding", "scale_grad_by_freq couples units through the batch; leave it out")
    if sparse:
        state.refuse(weight, "embedding", "sparse=True; noise is dense, use sparse=False")
    if input.dim() < 1:
        state.refuse(weight, "embedding", "its ids have no batch axis")
    padding = -1
    if padding_idx is not None:
        padding = padding_idx if padding_idx >= 0 else padding_idx + weight.shape[0]
    call = state.call("embedding", (weight_at,), input.shape[0])
    apply: Callable[..., Tensor] = _Embedding.apply
    return apply(input, weight, padding, state.anchor, state, call)
