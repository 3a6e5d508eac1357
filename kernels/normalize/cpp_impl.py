"""Compiled kernels behind normalisations."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels import _select
from synthward.kernels._select import maybe_view, threads, view


def layer_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    written: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    dx, scale, bias = written
    _C.layer_norm_backward(
        view(x),
        view(output_grads),
        maybe_view(mean),
        view(rstd),
        maybe_view(weight),
        maybe_view(offsets),
        maybe_view(order),
        maybe_view(dx),
        maybe_view(scale),
        maybe_view(bias),
        threads(),
    )
    _select.written(*written)


def group_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    scale: Tensor,
    bias: Tensor,
) -> None:
    _C.group_norm_backward(
        view(x),
        view(output_grads),
        view(mean),
        view(rstd),
        maybe_view(weight),
        maybe_view(dx),
        view(scale),
        view(bias),
        threads(),
    )
    _select.written(dx, scale, bias)
