"""Segments in plain torch, for the reference implementations."""

from __future__ import annotations

import torch
from torch import Tensor


def row_units(offsets: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Unit of each row, int64 [rows]."""
    if offsets is None:
        return torch.arange(rows, device=device)
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
