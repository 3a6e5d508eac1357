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


def pairs_within_units(offsets: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs (s, t) of rows of one unit and their unit, int64 [pairs] each."""
    unit = row_units(offsets, rows, device)
    if offsets is None:
        return unit, unit, unit
    lengths = offsets.diff()[unit]
    s = torch.repeat_interleave(torch.arange(rows, device=device), lengths)
    position = torch.arange(len(s), device=device) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return s, offsets[unit[s]] + position, unit[s]
