"""Compiled fused updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written
from synthward.kernels.noise.correlation import Correlation
from synthward.kernels.noise.cpp_impl import recipe_of


def noisy_adam_(
    param: Tensor,
    summed_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    correlation: Correlation | None,
    **options: Any,
) -> None:
    arrays = (view(param), view(summed_grad), view(exp_avg), view(exp_avg_sq))
    options |= recipe_of(correlation)
    _C.noisy_adam(*arrays, **options, threads=threads())
    written(param, summed_grad, exp_avg, exp_avg_sq, None if correlation is None else correlation.state)


def noisy_sgd_(
    param: Tensor,
    summed_grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    correlation: Correlation | None,
    **options: Any,
) -> None:
    arrays = (view(param), view(summed_grad), maybe_view(momentum_buffer))
    options |= recipe_of(correlation)
    _C.noisy_sgd(*arrays, **options, threads=threads())
    written(param, summed_grad, momentum_buffer, None if correlation is None else correlation.state)
