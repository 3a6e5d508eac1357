"""Outer family by dense products: the ways to a norm that the engine's planner chooses between.

Contiguous fp32 matrices in CPU memory have compiled kernels (csrc/core/gemm.inl), those on a CUDA device Triton's;
anything else takes the same way in torch.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from synthward import _C
from synthward.kernels import _check
from synthward.kernels._select import Backend, choose, maybe_view, threads, view, written
from synthward.kernels.outer import library
from synthward.kernels.outer.reference import in_bf16, row_squares, scale_rows

Method = Literal["gram", "tile"]

# Products in one chain of additions, and chains that are added up (BLOCK in csrc/core/gemm.inl).
SUM_BLOCK = 128


# Bfloat16 that hold a float32, and what fewer of them are off by, relative to it: to the nearest of 8 bits, again and
# again (and once before, by the product with the weight).
EXACT_TERMS = 3
_ROUNDING = {1: 2.0**-8 + 2.0**-23, 2: 2.0**-16 + 2.0**-23, EXACT_TERMS: 0.0}


def rounding_of(terms: int) -> float:
    """What each coordinate of a row ``w_n g_n`` is off by at most, relative to itself, in `outer_sum` with so many
    `terms`; beyond the rounding of the product itself where they are three."""
    return _ROUNDING[terms]


@overload
def sum_chain(length: int, *, compiled: bool) -> int: ...
@overload
def sum_chain(length: int | Tensor, *, compiled: bool) -> int | Tensor: ...
def sum_chain(length: int | Tensor, *, compiled: bool) -> int | Tensor:
    """Most additions that one term of an inner product of `length` terms goes through, one way or another."""
    if isinstance(length, Tensor):
        return length.clamp(max=SUM_BLOCK) + (length + SUM_BLOCK - 1) // SUM_BLOCK if compiled else length
    return min(length, SUM_BLOCK) + -(-length // SUM_BLOCK) if compiled else length


def rank1_norms(
    activations: Tensor,
    output_grads: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Norms where every row is a unit: adds ``|a_n|^2 |g_n|^2`` to `sq_norms` and ``|a_n| |g_n|`` to `row_sums`.

    activations [N, d], output_grads [N, p]; sq_norms and row_sums float32 [N]. Returns ``|g_n|^2``, float32 [N].
    Activations of bfloat16 whose norm is above 2^64 count as infinite (`reference.LARGEST_SQUARE`).
    """
    _check.matrix(activations, "activations")
    _check.matrix(output_grads, "output_grads")
    _check.same_rows(output_grads, len(activations), "output_grads")
    _check.flat_float(sq_norms, "sq_norms", len(activations))
    _check.flat_float(row_sums, "row_sums", len(activations))
    chosen = choose(backend, activations, output_grads, written=(sq_norms, row_sums))
    if chosen == "triton":
        from synthward.kernels.outer import triton_impl

        return triton_impl.rank1_norms(activations, output_grads, sq_norms, row_sums)
    if chosen == "cpp":
        squares = torch.zeros_like(sq_norms)
        arrays = (view(activations), view(output_grads), view(sq_norms), view(row_sums), view(squares))
        _C.rank1_norms(*arrays, threads())
        written(sq_norms, row_sums)
        return squares
    if chosen == "shapes":
        return torch.empty_like(sq_norms)
    squares = output_grads.double().square().sum(1)
    product = squares * row_squares(activations)
    sq_norms += product.float()
    row_sums += product.sqrt().float()
    return squares.float()


def outer_norms(
    activations: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor,
    *,
    method: Method,
    with_bias: bool = False,
    backend: Backend = "auto",
) -> None:
    """Add each unit's ``||sum_n g_n a_n^T||^2`` to `sq_norms` and ``sum_n |a_n| |g_n|`` to `row_sums`.

    Args:
        activations: [N, d], rows unit by unit. Those of bfloat16 whose norm is above 2^64 count as infinite in
            `row_sums` (`reference.LARGEST_SQUARE`).
        output_grads: [N, p].
        offsets: int64 [U + 1].
        sq_norms: float32 [U].
        row_sums: float32 [U].
        method: "gram", upper triangles of the products of all pairs of a unit's rows; or "tile", pieces of the
            unit's gradient, squared and forgotten.
        with_bias: each activation has a one at its end, so that the norm is that of weight and bias together.
        backend: who executes.
    """
    units = _check_units(activations, output_grads, offsets)
    _check.flat_float(sq_norms, "sq_norms", units)
    _check.flat_float(row_sums, "row_sums", units)
    if method not in ("gram", "tile"):
        raise ValueError(f"method: got {method!r}, expected 'gram' or 'tile'")
    chosen = choose(backend, activations, output_grads, offsets, written=(sq_norms, row_sums))
    if chosen == "shapes":
        return
    if with_bias and not (chosen == "cpp" and method == "gram"):
        ones = activations.new_ones(len(activations), 1)
        activations, with_bias = torch.cat([activations, ones], dim=1), False
    if chosen == "triton":
        from synthward.kernels.outer import triton_impl

        run = triton_impl.gram_norms if method == "gram" else triton_impl.tile_norms
        run(activations, output_grads, offsets, sq_norms, row_sums)
        return
    if chosen == "cpp":
        arrays = (view(activations), view(output_grads), view(offsets), view(sq_norms), view(row_sums))
        if method == "gram":
            _C.gram_norms(*arrays, with_bias, threads())
        else:
            _C.tile_norms(*arrays, None, threads())
        written(sq_norms, row_sums)
        return
    # In double, where the products of single precision neither vanish nor overflow.
    rows = row_squares(activations).sqrt() * output_grads.double().norm(dim=1)
    for unit, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        a, g = activations[first:last].double(), output_grads[first:last].double()
        found = ((a @ a.mT) * (g @ g.mT)).sum() if method == "gram" else (g.mT @ a).square().sum()
        sq_norms[unit] += found
        row_sums[unit] += rows[first:last].sum()


def outer_unit_grads(
    activations: Tensor, output_grads: Tensor, offsets: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of each unit float32 [U, p * d], its squared norm float32 [U], and ``sum_n |a_n| |g_n|`` [U].

    activations [N, d] and output_grads [N, p] unit by unit, offsets int64 [U + 1].
    """
    units = _check_units(activations, output_grads, offsets)
    numel = activations.shape[1] * output_grads.shape[1]
    grads = torch.empty(units, numel, dtype=torch.float32, device=activations.device)
    sq_norms, row_sums = grads.new_zeros(units), grads.new_zeros(units)
    chosen = choose(backend, activations, output_grads, offsets)
    if chosen == "triton":
        from synthward.kernels.outer import triton_impl

        triton_impl.tile_norms(activations, output_grads, offsets, sq_norms, row_sums, grads)
        return grads, sq_norms, row_sums
    if chosen == "cpp":
        arrays = (view(activations), view(output_grads), view(offsets), view(sq_norms), view(row_sums))
        _C.tile_norms(*arrays, view(grads), threads())
        return grads, sq_norms, row_sums
    if chosen == "shapes":
        return grads, sq_norms, row_sums
    for unit, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        a, g = activations[first:last].float(), output_grads[first:last].float()
        grads[unit] = (g.mT @ a).flatten()
        row_sums[unit] = (a.double().norm(dim=1) * g.double().norm(dim=1)).sum()
    sq_norms += grads.double().square().sum(1).float()
    return grads, sq_norms, row_sums


def outer_sum(
    activations: Tensor,
    output_grads: Tensor,
    row_weights: Tensor,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    terms: int = EXACT_TERMS,
    run: int | None = None,
    backend: Backend = "auto",
) -> None:
    """``out += sum_n w_n g_n a_n^T`` [p, d], the weight applied while the product reads its operand.

    A row of weight zero adds nothing, whatever it holds. The order of the additions depends on the shapes, and for
    operands of half precision on a GPU on which rows have equal weights. A float64 `out` (and bias) is summed in
    float64.

    Args:
        activations: [N, d].
        output_grads: [N, p].
        row_weights: float32 [N].
        out: float32 [p, d], accumulated into.
        bias: float32 [p] or None; gets ``sum_n w_n g_n`` on the way.
        terms: 1, 2 or 3 bfloat16 that a row ``w_n g_n`` of bfloat16 gradients is held in; three hold all its bits, one
            is off by ``rounding_of(terms)``. Operands of other types are never rounded.
        run: how many rows in a row have one weight, if that is known. A hint: on a GPU it saves looking for them.
        backend: who executes.
    """
    if terms not in _ROUNDING:
        raise ValueError(f"terms: got {terms!r}, expected 1, 2 or 3")
    _check.matrix(activations, "activations")
    _check.matrix(output_grads, "output_grads")
    _check.same_rows(output_grads, len(activations), "output_grads")
    _check.flat_float(row_weights, "row_weights", len(activations))
    _check.shape(out, (output_grads.shape[1], activations.shape[1]), "out")
    if bias is not None:
        _check.flat_sum(bias, "bias", output_grads.shape[1])
    chosen = choose(backend, activations, output_grads, row_weights, written=(out, bias))
    if chosen == "shapes":
        return
    if chosen == "triton":
        by_library = backend == "auto" and activations.dtype == output_grads.dtype == torch.float32
        if by_library and library.pays(len(activations), activations.shape[1], output_grads.shape[1]):
            library.outer_sum(activations, output_grads, row_weights, out, bias)
            return
        from synthward.kernels.outer import triton_impl

        triton_impl.outer_sum(activations, output_grads, row_weights, out, bias, terms=terms, run=run)
        return
    if chosen == "cpp":
        arrays = (view(activations), view(output_grads), view(row_weights), view(out), maybe_view(bias))
        _C.outer_sum(*arrays, threads())
        written(out, bias)
        return
    ones = (row_weights != 0).to(row_weights.dtype)
    g = scale_rows(output_grads.to(out.dtype), row_weights)
    if bias is not None:
        bias += g.sum(0)
    if terms < EXACT_TERMS and activations.dtype == output_grads.dtype == torch.bfloat16:
        g = in_bf16(g, terms)
    out.addmm_(g.t(), scale_rows(activations.to(out.dtype), ones))


def _check_units(activations: Tensor, output_grads: Tensor, offsets: Tensor) -> int:
    _check.matrix(activations, "activations")
    _check.matrix(output_grads, "output_grads")
    _check.same_rows(output_grads, len(activations), "output_grads")
    return _check.unit_count(offsets, len(activations))
