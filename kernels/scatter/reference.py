"""Plain torch: what the compiled kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels._segments import pairs_within_units


def scatter_sq_norms(ids: Tensor, output_grads: Tensor, offsets: Tensor | None, units: int) -> Tensor:
    g = output_grads.double()
    s, t, unit = pairs_within_units(offsets, len(ids), g.device)
    same = (ids[s] == ids[t]) & (ids[s] >= 0)
    s, t, unit = s[same], t[same], unit[same]
    total = torch.zeros(units, dtype=torch.float64, device=g.device)
    return total.index_add_(0, unit, (g[s] * g[t]).sum(1)).float()
