"""Compiled kernels of convolutions."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written
from synthward.kernels.conv.shape import ConvShape


def norms(
    shape: ConvShape,
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    sq_norms: Tensor | None,
    row_sums: Tensor | None,
    grads: Tensor | None,
    method: str,
) -> None:
    numbers, rows = shape.numbers(), (view(images), view(output_grads))
    if method == "gram":
        assert sq_norms is not None and row_sums is not None
        _C.conv_gram_norms(numbers, *rows, view(sq_norms), view(row_sums), threads())
    else:
        _C.conv_norms(
            numbers,
            *rows,
            view(offsets),
            maybe_view(order),
            maybe_view(sq_norms),
            maybe_view(row_sums),
            maybe_view(grads),
            threads(),
        )
    written(sq_norms, row_sums, grads)


def weighted_sum(
    shape: ConvShape, images: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor
) -> None:
    arrays = (view(images), view(output_grads), view(row_weights), view(out))
    _C.conv_sum(shape.numbers(), *arrays, threads())
    written(out)
