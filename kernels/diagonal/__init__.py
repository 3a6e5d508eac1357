"""Diagonal family: per-unit gradient ``sum_n rows_n * factors_n`` (biases, scales of normalisation layers)."""

from __future__ import annotations

from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, use_cpp
from synthward.kernels.diagonal import cpp_impl, reference


def diagonal_sq_norms(
    rows: Tensor,
    offsets: Tensor | None = None,
    *,
    factors: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add each unit's ``||sum_n rows_n * factors_n||^2`` to ``out``.

    Args:
        rows: [N, p] output gradients.
        offsets: int64 [U + 1], or None where every row is a unit.
        factors: [N, p] normalised activations, or None for ones (a bias).
        out: float32 [U], accumulated into; zeros if None.
        backend: who executes.
    """
    _check.matrix(rows, "rows")
    if factors is not None and factors.shape != rows.shape:
        raise ValueError(f"factors: has shape {list(factors.shape)}, expected {list(rows.shape)}")
    units = _check.unit_count(offsets, len(rows))
    out = _check.unit_output(out, units, rows)
    if use_cpp(backend, rows, factors, offsets, out):
        cpp_impl.diagonal_sq_norms(rows, offsets, factors, out)
    else:
        out += reference.diagonal_sq_norms(rows, offsets, factors, units)
    return out


def diagonal_weighted_sum(rows: Tensor, row_weights: Tensor, *, factors: Tensor | None = None, out: Tensor) -> Tensor:
    """``out += sum_n w_n rows_n * factors_n``; rows [N, p], row_weights float32 [N], out float32 [p].

    The caller makes rows of weight zero finite (see `scale_rows`).
    """
    _check.matrix(rows, "rows")
    _check.flat_float(row_weights, "row_weights", len(rows))
    _check.flat_float(out, "out", rows.shape[1])
    product = rows if factors is None else rows * factors
    return out.addmv_(product.to(out.dtype).t(), row_weights)
