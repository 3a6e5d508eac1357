"""Scatter family: per-unit gradient ``sum_n g_n`` added at table row ``id_n`` (embeddings)."""

from __future__ import annotations

from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.scatter import cpp_impl, reference


def scatter_sq_norms(
    ids: Tensor,
    output_grads: Tensor,
    offsets: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add each unit's squared norm of its embedding gradient to ``out``; rows of equal id add up first.

    Args:
        ids: int64 [N], table rows; a negative id is no row (padding).
        output_grads: [N, p].
        offsets: int64 [U + 1], or None where every row is a unit.
        out: float32 [U], accumulated into; zeros if None.
        backend: who executes.
    """
    _check.matrix(output_grads, "output_grads")
    _check.row_ids(ids, len(output_grads))
    units = _check.unit_count(offsets, len(ids))
    out = _check.unit_output(out, units, output_grads)
    chosen = choose(backend, ids, output_grads, offsets, written=(out,))
    if chosen == "cpp":
        cpp_impl.scatter_sq_norms(ids, output_grads, offsets, out)
    elif chosen == "triton":
        from synthward.kernels.scatter import triton_impl

        triton_impl.scatter_sq_norms(ids, output_grads, offsets, out)
    elif chosen == "reference":
        out += reference.scatter_sq_norms(ids, output_grads, offsets, units)
    return out


def scatter_weighted_sum(
    ids: Tensor, output_grads: Tensor, row_weights: Tensor, *, out: Tensor, backend: Backend = "auto"
) -> Tensor:
    """``out[id_n] += w_n g_n`` and return it; row_weights float32 [N], out float32 [V, p], or float64:
    summed in float64 then.

    Guarantees: a row of weight zero or of negative id adds nothing, whatever it holds.

    Raises:
        ValueError: an id is not below V; nothing is written then.
    """
    _check.matrix(output_grads, "output_grads")
    _check.row_ids(ids, len(output_grads))
    _check.flat_float(row_weights, "row_weights", len(ids))
    _check.matrix(out, "out")
    _check.shape(out, (len(out), output_grads.shape[1]), "out")
    chosen = choose(backend, ids, output_grads, row_weights, written=(out,))
    if chosen == "cpp":
        cpp_impl.scatter_weighted_sum(ids, output_grads, row_weights, out)
    elif chosen == "triton":
        from synthward.kernels.scatter import triton_impl

        triton_impl.scatter_weighted_sum(ids, output_grads, row_weights, out)
    elif chosen == "reference":
        reference.scatter_weighted_sum(ids, output_grads, row_weights, out)
    return out
