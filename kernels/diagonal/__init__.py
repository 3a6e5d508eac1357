"""Diagonal family: per-unit gradient ``sum_n rows_n * factors_n`` (biases, scales of normalisations)."""

from __future__ import annotations

from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
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

    Returns:
        ``out``. A non-finite row shows in its own unit alone.
    """
    _check.matrix(rows, "rows")
    if factors is not None:
        _check.matrix(factors, "factors")
        _check.shape(factors, tuple(rows.shape), "factors")
    units = _check.unit_count(offsets, len(rows))
    out = _check.unit_output(out, units, rows)
    chosen = choose(backend, rows, factors, offsets, written=(out,))
    if chosen == "cpp":
        cpp_impl.diagonal_sq_norms(rows, offsets, factors, out)
    elif chosen == "triton":
        from synthward.kernels.diagonal import triton_impl

        triton_impl.diagonal_sq_norms(rows, offsets, factors, out)
    elif chosen == "reference":
        out += reference.diagonal_sq_norms(rows, offsets, factors, units)
    return out


def diagonal_weighted_sum(
    rows: Tensor,
    row_weights: Tensor,
    *,
    factors: Tensor | None = None,
    out: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """``out += sum_n w_n rows_n * factors_n`` and return it.

    Args:
        rows: [N, p], as are factors.
        row_weights: float32 [N].
        factors: None for ones.
        out: float32 [p], or float64: summed in float64 then.
        backend: who executes.

    Guarantees: a row of weight zero adds nothing, whatever it holds.
    """
    _check.matrix(rows, "rows")
    if factors is not None:
        _check.matrix(factors, "factors")
        _check.shape(factors, tuple(rows.shape), "factors")
    _check.flat_float(row_weights, "row_weights", len(rows))
    _check.flat_sum(out, "out", rows.shape[1])
    chosen = choose(backend, rows, row_weights, factors, written=(out,))
    if chosen == "cpp":
        cpp_impl.diagonal_weighted_sum(rows, row_weights, factors, out)
    elif chosen == "triton":
        from synthward.kernels.diagonal import triton_impl

        triton_impl.diagonal_weighted_sum(rows, row_weights, factors, out)
    elif chosen == "reference":
        reference.diagonal_weighted_sum(rows, row_weights, factors, out)
    return out
