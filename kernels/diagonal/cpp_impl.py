"""Compiled kernel behind the diagonal family."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import threads


def diagonal_sq_norms(rows: Tensor, offsets: Tensor | None, factors: Tensor | None, out: Tensor) -> None:
    _C.diagonal_sq_norms(
        rows.detach().numpy(),
        None if factors is None else factors.detach().numpy(),
        None if offsets is None else offsets.numpy(),
        out.numpy(),
        threads(),
    )
