"""Plain torch: what the compiled kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels._segments import row_units
from synthward.kernels.outer.reference import scale_rows


def scatter_sq_norms(ids: Tensor, output_grads: Tensor, offsets: Tensor | None, units: int) -> Tensor:
    kept = ids >= 0
    rows = output_grads[kept].double()
    keys = torch.stack((row_units(offsets, len(ids), ids.device)[kept], ids[kept]), 1)
    # One row for each pair of unit and id that occurs.
    pairs, place = torch.unique(keys, dim=0, return_inverse=True)
    sums = torch.zeros(len(pairs), rows.shape[1], dtype=torch.float64, device=rows.device).index_add_(
        0, place, rows
    )
    total = torch.zeros(units, dtype=torch.float64, device=rows.device)
    return total.index_add_(0, pairs[:, 0], sums.square().sum(1)).float()


def scatter_weighted_sum(ids: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor) -> None:
    if bool((ids >= len(out)).any()):
        raise ValueError("ids: name a row beyond the table")
    kept = ids >= 0
    rows = output_grads[kept].double() if out.dtype == torch.float64 else output_grads[kept]
    out.index_add_(0, ids[kept], scale_rows(rows, row_weights[kept]).to(out.dtype))
