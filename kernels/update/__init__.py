"""Noise and optimizer update in one pass over flat buffers. See README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, use_cpp
from synthward.kernels.update import cpp_impl, reference


def noisy_adam_(
    param: Tensor,
    summed_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    noise_std: float,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    adam_step: int,
    backend: Backend = "auto",
) -> None:
    """``g = (summed_grad + noise_std z) grad_scale``, then Adam (or AdamW if ``decoupled``), in place.

    All tensors float32 [P]; ``summed_grad`` is left at zero. ``step`` is the noise's logical step,
    ``adam_step`` counts updates from 1 for the bias correction. ``noise_std`` 0 adds no noise.
    """
    _check.flat_float(param, "param")
    for name, tensor in (("summed_grad", summed_grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check.flat_float(tensor, name, len(param))
    if adam_step < 1:
        raise ValueError(f"adam_step: got {adam_step}, expected at least 1")
    tensors = (param, summed_grad, exp_avg, exp_avg_sq)
    run = cpp_impl.noisy_adam_ if use_cpp(backend, *tensors) else reference.noisy_adam_
    run(
        *tensors,
        key=key,
        stream=stream,
        step=step,
        start=start,
        noise_std=noise_std,
        grad_scale=grad_scale,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        bias1=1.0 - beta1**adam_step,
        bias2=1.0 - beta2**adam_step,
    )


def noisy_sgd_(
    param: Tensor,
    summed_grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    noise_std: float,
    grad_scale: float,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first_step: bool,
    backend: Backend = "auto",
) -> None:
    """``g = (summed_grad + noise_std z) grad_scale``, then SGD with optional momentum, in place.

    All tensors float32 [P]; ``summed_grad`` is left at zero; ``momentum_buffer`` None means no momentum.
    """
    _check.flat_float(param, "param")
    _check.flat_float(summed_grad, "summed_grad", len(param))
    if momentum_buffer is not None:
        _check.flat_float(momentum_buffer, "momentum_buffer", len(param))
    fast = use_cpp(backend, param, summed_grad, momentum_buffer)
    run = cpp_impl.noisy_sgd_ if fast else reference.noisy_sgd_
    run(
        param,
        summed_grad,
        momentum_buffer,
        key=key,
        stream=stream,
        step=step,
        start=start,
        noise_std=noise_std,
        grad_scale=grad_scale,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        first_step=first_step,
    )
