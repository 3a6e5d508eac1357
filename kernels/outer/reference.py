"""Plain torch: what the compiled kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond this square a row of bfloat16 activations counts as infinite: what bfloat16 can not hold of a scaled row of
# gradients (2^-134 for each of them) would not be small beside a clipping bound after the product with it.
LARGEST_SQUARE = 2.0**128


def row_squares(activations: Tensor) -> Tensor:
    """Squared norms of rows [N, d] of activations, float64 [N]."""
    squares = activations.double().square().sum(1)
    if activations.dtype != torch.bfloat16:
        return squares
    return torch.where(squares > LARGEST_SQUARE, torch.inf, squares)


def unit_sq_norm(activations: Tensor, output_grads: Tensor) -> Tensor:
    """``||g^T a||_F^2`` of the rows of one unit (or of each of a batch of units), float64.

    By the cheaper of two ways: the Gram matrices ``sum((a a^T) * (g g^T))``, T^2 (d + p) products, or the
    gradient itself, T d p.
    """
    a, g = activations.double(), output_grads.double()
    rows, d, p = a.shape[-2], a.shape[-1], g.shape[-1]
    if rows * (d + p) <= d * p:
        return ((a @ a.mT) * (g @ g.mT)).sum((-2, -1))
    return (g.mT @ a).square().sum((-2, -1))


def outer_sq_norms(activations: Tensor, output_grads: Tensor, offsets: Tensor | None, units: int) -> Tensor:
    if offsets is None:
        norms = activations.double().square().sum(1) * output_grads.double().square().sum(1)
        return norms.float()
    total = torch.zeros(units, dtype=torch.float64, device=activations.device)
    ends = offsets.tolist()
    for unit in range(units):
        rows = slice(ends[unit], ends[unit + 1])
        total[unit] = unit_sq_norm(activations[rows], output_grads[rows])
    return total.float()


def scale_rows(rows: Tensor, row_weights: Tensor) -> Tensor:
    # A factor that is rounded to half precision may be larger than it was.
    wide = rows if rows.dtype == torch.float64 else rows.float()
    scaled = wide * row_weights.to(wide.dtype).unsqueeze(1)
    return torch.where((row_weights == 0).unsqueeze(1), torch.zeros_like(scaled), scaled)


def in_bf16(rows: Tensor, terms: int) -> Tensor:
    """`rows` as sums of so many bfloat16, each the nearest to what those before it left."""
    held = torch.zeros_like(rows)
    for _ in range(terms):
        held += (rows - held).bfloat16().to(rows.dtype)
    return held
