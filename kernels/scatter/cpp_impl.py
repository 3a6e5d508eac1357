"""Compiled kernel behind the scatter family."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import threads


def scatter_sq_norms(ids: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    _C.scatter_sq_norms(
        ids.numpy(),
        output_grads.detach().numpy(),
        None if offsets is None else offsets.numpy(),
        out.numpy(),
        threads(),
    )
