"""Compiled fused updates."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import threads


def noisy_adam_(
    param: Tensor, summed_grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **options: float | bytes | bool
) -> None:
    arrays = [t.detach().numpy() for t in (param, summed_grad, exp_avg, exp_avg_sq)]
    _C.noisy_adam(*arrays, **options, threads=threads())  # type: ignore[arg-type]


def noisy_sgd_(
    param: Tensor, summed_grad: Tensor, momentum_buffer: Tensor | None, **options: float | bytes | bool
) -> None:
    buffer = None if momentum_buffer is None else momentum_buffer.numpy()
    arrays = (param.detach().numpy(), summed_grad.numpy(), buffer)
    _C.noisy_sgd(*arrays, **options, threads=threads())  # type: ignore[arg-type]
