"""Scatter family: per-unit gradient ``sum_n g_n`` added at table row ``id_n`` (embeddings)."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, use_cpp
from synthward.kernels.outer import scale_rows
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
    _check_ids(ids, output_grads)
    units = _check.unit_count(offsets, len(ids))
    out = _check.unit_output(out, units, output_grads)
    if use_cpp(backend, ids, output_grads, offsets, out):
        cpp_impl.scatter_sq_norms(ids, output_grads, offsets, out)
    else:
        out += reference.scatter_sq_norms(ids, output_grads, offsets, units)
    return out


def scatter_weighted_sum(
    ids: Tensor, output_grads: Tensor, row_weights: Tensor, *, out: Tensor, backend: Backend = "auto"
) -> Tensor:
    """``out[id_n] += w_n g_n``; out float32 [V, p]; negative ids add nothing."""
    _check_ids(ids, output_grads)
    weights = torch.where(ids < 0, torch.zeros_like(row_weights), row_weights)
    scaled = scale_rows(output_grads, weights, backend=backend)
    return out.index_add_(0, ids.clamp(min=0), scaled.to(out.dtype))


def _check_ids(ids: Tensor, output_grads: Tensor) -> None:
    _check.matrix(output_grads, "output_grads")
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise TypeError(f"ids: expected int64 [N], got {ids.dtype} {list(ids.shape)}")
    _check.same_rows(output_grads, len(ids), "output_grads")
