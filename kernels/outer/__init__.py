"""Outer family: per-unit gradient ``sum_n g_n a_n^T`` (linear layers). See README.md beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.outer import cpp_impl, reference


def outer_sq_norms(
    activations: Tensor,
    output_grads: Tensor,
    offsets: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add each unit's ``||sum_n g_n a_n^T||_F^2`` to ``out``.

    Args:
        activations: [N, d], floating point.
        output_grads: [N, p], the same dtype.
        offsets: int64 [U + 1], or None where every row is a unit.
        out: float32 [U], accumulated into; zeros if None.
        backend: who executes.

    Returns:
        ``out``, float32 [U]. A non-finite row shows in its own unit alone.
    """
    _check.matrix(activations, "activations")
    _check.matrix(output_grads, "output_grads")
    _check.same_rows(output_grads, len(activations), "output_grads")
    units = _check.unit_count(offsets, len(activations))
    out = _check.unit_output(out, units, activations)
    chosen = choose(backend, activations, output_grads, offsets, written=(out,))
    if chosen == "cpp":
        cpp_impl.outer_sq_norms(activations, output_grads, offsets, out)
    elif chosen == "triton":
        from synthward.kernels.outer import triton_impl

        triton_impl.outer_sq_norms(activations, output_grads, offsets, out)
    elif chosen == "reference":
        out += reference.outer_sq_norms(activations, output_grads, offsets, units)
    return out


def outer_weighted_sum(
    activations: Tensor, output_grads: Tensor, row_weights: Tensor, *, out: Tensor, backend: Backend = "auto"
) -> Tensor:
    """``out += sum_n w_n g_n a_n^T``: the smaller operand is scaled, then one GEMM accumulates in place.

    A row of weight zero adds nothing, whatever the scaled operand holds in it; the caller makes the other
    operand finite in such rows (see `scale_rows`), which the Triton kernel does not need.
    activations [N, d], output_grads [N, p], row_weights float32 [N], out float32 [p, d].
    """
    _check.matrix(activations, "activations")
    _check.matrix(output_grads, "output_grads")
    _check.same_rows(output_grads, len(activations), "output_grads")
    _check.flat_float(row_weights, "row_weights", len(activations))
    _check.matrix(out, "out")
    _check.shape(out, (output_grads.shape[1], activations.shape[1]), "out")
    if choose(backend, activations, output_grads, row_weights, written=(out,)) == "triton":
        from synthward.kernels.outer import triton_impl

        triton_impl.outer_sum(activations, output_grads, row_weights, out)
        return out
    if output_grads.shape[1] <= activations.shape[1]:
        output_grads = scale_rows(output_grads, row_weights, backend=backend)
    else:
        activations = scale_rows(activations, row_weights, backend=backend)
    return out.addmm_(output_grads.to(out.dtype).t(), activations.to(out.dtype))


def scale_rows(rows: Tensor, row_weights: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``w_n * rows_n`` as a new tensor [N, p]; weight zero gives zeros even where the row is not finite.

    float32 where the rows are of half precision: rounded products could be longer than the weights allow.
    """
    _check.matrix(rows, "rows")
    _check.flat_float(row_weights, "row_weights", len(rows))
    chosen = choose(backend, rows, row_weights)
    if chosen == "cpp":
        out = torch.empty_like(rows)
        cpp_impl.scale_rows(rows, row_weights, out)
        return out
    if chosen == "triton":
        from synthward.kernels.outer import triton_impl

        return triton_impl.scale_rows(rows, row_weights)
    return reference.scale_rows(rows, row_weights)
