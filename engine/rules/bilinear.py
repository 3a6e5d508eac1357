"""Bilinear forms ``y_k = x^T W_k z + b_k``: products of three factors for the weight, diagonal family for the bias.

The per-unit gradient of W [p, d, e] is ``sum_n g_n (x) x_n (x) z_n``: an outer product of g with the rows' Kronecker
products. Its norm comes from inner products of the factors, one by one, so that none of these is formed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.layout import Layout, Length
from synthward.engine.provenance import Target
from synthward.engine.rules.outputs import owned
from synthward.engine.rules.uses import DiagonalRows, Norms, Use, Weights, diagonal_use
from synthward.kernels import outer_sum

# Memory for what is formed a few rows or units at a time.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class BilinearUse:
    """Gradient ``sum_n g_n (x) x_n (x) z_n`` [p, d, e]: left [N, d], right [N, e], output_grads [N, p].

    Memory: N (d + e + p) numbers are kept. Beyond these a norm takes, for a unit of K rows, three K x K matrices, or
    K d e numbers where the gradient itself is the cheaper way; the weighted sum takes d e numbers a row. Either is
    done some 16 MB at a time, and at least one unit or row at a time.
    """

    left: Tensor
    right: Tensor
    output_grads: Tensor

    @property
    def rows(self) -> int:
        return len(self.output_grads)

    @property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.left, self.right, self.output_grads

    @property
    def _numel(self) -> int:
        return self.left.shape[1] * self.right.shape[1] * self.output_grads.shape[1]

    def chain(self, layout: Layout) -> Length:
        # Sums are in double precision; the products of three factors that are released are rounded twice.
        return 2

    def released_chain(self, layout: Layout) -> Length:
        return layout.lengths + 2

    @property
    def evidence(self) -> Tensor:
        return self.output_grads

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        left, right, grads = (factor.double().norm(dim=1) for factor in self._factors)
        # The weighted sum has these products in single precision: where one overflows, the unit must not be there.
        lengths = (left * right).float().double() * grads
        row_sums += layout.sum_rows(lengths).float()
        if layout.is_single:
            sq_norms += lengths.square().float()
            return
        width = sum(factor.shape[1] for factor in self._factors)
        length = layout.longest
        is_formed = self._numel < length * (width + 3)
        each = 8 * length * (self._formed_width() if is_formed else width + 3 * length)
        for first, last in _chunks(layout.num_units, each):
            parts = [layout.unit_rows(factor, first, last).double() for factor in self._factors]
            if is_formed:
                sq_norms[first:last] += _form(*parts).square().sum((1, 2)).float()
                continue
            product = parts[0] @ parts[0].mT
            for part in parts[1:]:
                product *= part @ part.mT
            sq_norms[first:last] += product.sum((1, 2)).float()

    def _formed_width(self) -> int:
        """Numbers that forming a unit's gradient takes for each of its rows, about."""
        return self.left.shape[1] * (self.right.shape[1] + 1) + self.output_grads.shape[1]

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        d, e = self.left.shape[1], self.right.shape[1]
        for first, last in _chunks(self.rows, 4 * d * e):
            left, right, grads = (factor[first:last].float() for factor in self._factors)
            products = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
            outer_sum(products, grads, weights.rows[first:last], out=out.view(-1, d * e))

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        return _form(*(layout.unit_rows(f, first, last).float() for f in self._factors)).flatten(1)


def _chunks(count: int, each: int) -> Iterator[tuple[int, int]]:
    """Ranges of `count` things that take `each` bytes."""
    step = max(1, _CHUNK_BYTES // max(1, each))
    for first in range(0, count, step):
        yield first, min(count, first + step)


def _form(left: Tensor, right: Tensor, grads: Tensor) -> Tensor:
    """Gradients [U, p, d * e] of the factors of a unit's rows [U, K, ...]."""
    products = (left.unsqueeze(3) * right.unsqueeze(2)).flatten(2)
    return torch.bmm(grads.mT, products)


class _Bilinear(torch.autograd.Function):
    """``F.bilinear`` whose backward gives the gradients of its two inputs and keeps what weights need."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.save_for_backward(left, right, weight)
        ctx.state, ctx.call = state, call
        return owned(F.bilinear(left, right, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("bilinear")
        left, right, weight = ctx.saved_tensors
        weight_at, bias_at, leading, forward = ctx.call
        rows = [t.detach().reshape(-1, t.shape[-1]).float().contiguous() for t in (left, right, grad)]
        uses: list[tuple[Target, Use | DiagonalRows]] = []
        if weight_at is not None:
            uses.append((weight_at, BilinearUse(*rows)))
        if bias_at is not None:
            uses.append((bias_at, diagonal_use(ctx.state, rows[2], leading, forward)))
        ctx.state.keep(Kept("bilinear", leading, forward, uses))
        grads: list[Tensor | None] = [None, None]
        # Each is a bilinear form of the other input and the output gradient.
        for i, (other, order) in enumerate(((right, (1, 0, 2)), (left, (2, 0, 1)))):
            if ctx.needs_input_grad[i]:
                turned = weight.to(grad.dtype).permute(order)
                grads[i] = F.bilinear(grad, other.to(grad.dtype), turned)
        return *grads, None, None, ctx.state.anchor_grad, None, None


def bilinear(
    state: CaptureState, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Handler of ``torch.nn.functional.bilinear``; inputs [rows, ..., d] and [rows, ..., e]."""
    for value in (input1, input2):
        state.refuse_tracked(value, "bilinear")
    weight_at, bias_at = state.target(weight), state.target(bias)
    state.refuse_computed(weight, weight_at, bias, "bilinear")
    state.refuse_computed(bias, bias_at, weight, "bilinear")
    if input1.dim() < 2:
        state.refuse(weight if weight_at is not None else bias, "bilinear", "its input has no batch axis")
    call = state.call("bilinear", (weight_at, bias_at), input1.shape[0])
    apply: Callable[..., Tensor] = _Bilinear.apply
    return apply(input1, input2, weight, bias, state.anchor, state, call)


HANDLERS: dict[Any, Callable[..., Any]] = {F.bilinear: bilinear}
