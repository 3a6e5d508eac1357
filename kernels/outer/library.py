"""The outer family's clipped sum of fp32 operands by the library's product of matrices (cuBLAS, on a GPU).

The weight goes on the smaller operand; the other one's rows of weight zero are made zeros, as 0 * inf would be NaN.
Both are copies, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from synthward.kernels._select import Backend
from synthward.kernels.diagonal import diagonal_weighted_sum

# What an H200 is taken to do in a second, by this and by the Triton kernel: constants, so that the same shapes go the
# same way.
_LIBRARY_RATE, _KERNEL_RATE, _BYTE_RATE = 5e13, 4e13, 4e12
# Of memory for the copies of some rows.
_COPIED_BYTES = 256 << 20


def pays(rows: int, d: int, p: int) -> bool:
    """Whether a faster product makes up for reading both operands once more and writing them."""
    saved = 2.0 * rows * d * p * (1.0 / _KERNEL_RATE - 1.0 / _LIBRARY_RATE)
    return saved > 8.0 * rows * (d + p) / _BYTE_RATE


def outer_sum(
    activations: Tensor,
    output_grads: Tensor,
    row_weights: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> None:
    """As `synthward.kernels.outer_sum` of fp32 operands; `backend` scales the rows."""
    # The kernels' package imports this module's.
    from synthward.kernels.outer import scale_rows

    if bias is not None:
        diagonal_weighted_sum(output_grads, row_weights, out=bias, backend=backend)
    d, p = activations.shape[1], output_grads.shape[1]
    ones = (row_weights != 0).to(row_weights.dtype)
    of_a, of_g = (ones, row_weights) if p <= d else (row_weights, ones)
    step = max(_COPIED_BYTES // (4 * max(d + p, 1)), 1)
    with _ieee():
        for at in range(0, len(row_weights), step):
            rows = slice(at, at + step)
            g = scale_rows(output_grads[rows], of_g[rows], backend=backend)
            out.addmm_(g.t(), scale_rows(activations[rows], of_a[rows], backend=backend))


@contextmanager
def _ieee() -> Iterator[None]:
    """No TF32 inside, whatever was set."""
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    place.fp32_precision = "ieee"
    try:
        yield
    finally:
        place.fp32_precision = before
