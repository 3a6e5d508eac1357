"""Compiled fused updates."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written


def noisy_adam_(
    param: Tensor, summed_grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **options: float | bytes | bool
) -> None:
    options["threads"] = threads()
    arrays = (view(param), view(summed_grad), view(exp_avg), view(exp_avg_sq))
    _C.noisy_adam(*arrays, **options)  # type: ignore[arg-type]
    written(param, summed_grad, exp_avg, exp_avg_sq)


def noisy_sgd_(
    param: Tensor, summed_grad: Tensor, momentum_buffer: Tensor | None, **options: float | bytes | bool
) -> None:
    options["threads"] = threads()
    arrays = (view(param), view(summed_grad), maybe_view(momentum_buffer))
    _C.noisy_sgd(*arrays, **options)  # type: ignore[arg-type]
    written(param, summed_grad, momentum_buffer)
