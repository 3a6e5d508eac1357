"""Shared checks of arguments at the Python entry."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(tensor: Tensor, name: str) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected two dimensions")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: has dtype {tensor.dtype}, expected floating point")


def same_rows(tensor: Tensor, rows: int, name: str) -> None:
    if len(tensor) != rows:
        raise ValueError(f"{name}: has {len(tensor)} rows, expected {rows}")


def flat_float(tensor: Tensor, name: str, length: int | None = None) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: has dtype {tensor.dtype}, expected torch.float32")
    if tensor.ndim != 1 or (length is not None and len(tensor) != length):
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected [{'P' if length is None else length}]")


def unit_count(offsets: Tensor | None, rows: int) -> int:
    """Number of units; checks that the offsets run from 0 to the number of rows without decreasing."""
    if offsets is None:
        return rows
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or len(offsets) < 1:
        raise ValueError("offsets: expected int64 of shape [U + 1]")
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((offsets.diff() < 0).any()):
        raise ValueError("offsets: must run from 0 to the number of rows and never decrease")
    return len(offsets) - 1


def unit_output(out: Tensor | None, units: int, like: Tensor) -> Tensor:
    """The accumulator float32 [U], zeros if the caller gave none."""
    if out is None:
        return torch.zeros(units, dtype=torch.float32, device=like.device)
    flat_float(out, "out", units)
    return out
