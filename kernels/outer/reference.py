"""Plain torch: what the compiled kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels._segments import pairs_within_units


def outer_sq_norms(activations: Tensor, output_grads: Tensor, offsets: Tensor | None, units: int) -> Tensor:
    a, g = activations.double(), output_grads.double()
    s, t, unit = pairs_within_units(offsets, len(a), a.device)
    terms = (a[s] * a[t]).sum(1) * (g[s] * g[t]).sum(1)
    total = torch.zeros(units, dtype=torch.float64, device=a.device)
    return total.index_add_(0, unit, terms).float()


def scale_rows(rows: Tensor, row_weights: Tensor) -> Tensor:
    scaled = rows * row_weights.to(rows.dtype).unsqueeze(1)
    return torch.where((row_weights == 0).unsqueeze(1), torch.zeros_like(scaled), scaled)
