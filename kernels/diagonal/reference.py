"""Plain torch: what the compiled kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels._segments import row_units


def diagonal_sq_norms(rows: Tensor, offsets: Tensor | None, factors: Tensor | None, units: int) -> Tensor:
    product = rows.double() if factors is None else rows.double() * factors.double()
    sums = torch.zeros(units, rows.shape[1], dtype=torch.float64, device=rows.device)
    sums.index_add_(0, row_units(offsets, len(rows), rows.device), product)
    return (sums * sums).sum(1).float()


def diagonal_weighted_sum(rows: Tensor, row_weights: Tensor, factors: Tensor | None, out: Tensor) -> None:
    product = rows.double() if factors is None else rows.double() * factors.double()
    weights = row_weights.double().unsqueeze(1)
    out += torch.where(weights == 0, torch.zeros_like(product), weights * product).sum(0).to(out.dtype)
