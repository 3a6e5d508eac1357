"""Compiled kernels behind the outer family."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import threads


def outer_sq_norms(activations: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    a, g = activations.detach().numpy(), output_grads.detach().numpy()
    _C.outer_sq_norms(a, g, None if offsets is None else offsets.numpy(), out.numpy(), threads())


def scale_rows(rows: Tensor, row_weights: Tensor, out: Tensor) -> None:
    _C.scale_rows(rows.detach().numpy(), row_weights.numpy(), out.numpy(), threads())
