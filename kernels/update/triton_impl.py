"""Triton form of the fused updates: the noise is made in registers, lane by lane, and used there.

The arithmetic is that of csrc/core/update.inl, scalar by scalar, without fused multiply-adds.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import UNFUSED, ceil_div, on
from synthward.kernels.noise.correlation import Correlation
from synthward.kernels.noise.triton_impl import (
    GROUPS,
    PLACE,
    correlated,
    elements,
    grid,
    pass_state,
    place,
    step_normals,
)

# Elements of one program where there is no noise to make.
_BLOCK = 1024


@triton.jit
def _adam(
    param_ptr, grad_ptr, m_ptr, v_ptr, i, inside, noise, keep, l2, grad_scale, gain1, beta2, gain2, step_size,
    bias2_sqrt_inv, eps, bias2_inv, bias_variance, min_second_moment, CORRECTED: tl.constexpr,
):  # fmt: skip
    noisy = tl.load(grad_ptr + i, mask=inside, other=0.0) + noise
    w = tl.load(param_ptr + i, mask=inside, other=0.0) * keep
    g = noisy * grad_scale + l2 * w
    m = tl.load(m_ptr + i, mask=inside, other=0.0)
    m = m + gain1 * (g - m)
    v = beta2 * tl.load(v_ptr + i, mask=inside, other=0.0) + gain2 * (g * g)
    if CORRECTED:
        rest = v * bias2_inv - bias_variance
        root = tl.sqrt_rn(tl.where(rest < min_second_moment, min_second_moment, rest))
    else:
        root = tl.sqrt_rn(v) * bias2_sqrt_inv + eps
    change = step_size * tl.math.div_rn(m, root)
    tl.store(grad_ptr + i, tl.zeros_like(noisy), mask=inside)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)
    tl.store(param_ptr + i, w - change, mask=inside)


@triton.jit(do_not_specialize=PLACE)
def _adam_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, noise_std, numbers_ptr,
    taps, state_ptr, slots, stride, keep, l2, grad_scale, gain1, beta2, gain2, step_size, bias2_sqrt_inv, eps,
    bias2_inv, bias_variance, min_second_moment, CORRECTED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = start.to(tl.int64) // 256 + tl.program_id(0).to(tl.int64) * GROUPS
    z = step_normals(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, numbers_ptr, taps, GROUPS)
    for lane in tl.static_range(16):
        i = elements(first, start, lane, GROUPS)
        inside = (i >= 0) & (i < count)
        w = pass_state(z[lane], numbers_ptr, taps, state_ptr, slots, stride, i, inside)
        _adam(
            param_ptr, grad_ptr, m_ptr, v_ptr, i, inside, noise_std * w, keep, l2, grad_scale, gain1, beta2, gain2,
            step_size, bias2_sqrt_inv, eps, bias2_inv, bias_variance, min_second_moment, CORRECTED,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLACE)
def _adam_silent_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, count, keep, l2, grad_scale, gain1, beta2, gain2, step_size,
    bias2_sqrt_inv, eps, bias2_inv, bias_variance, min_second_moment, CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _adam(
        param_ptr, grad_ptr, m_ptr, v_ptr, i, i < count, 0.0, keep, l2, grad_scale, gain1, beta2, gain2, step_size,
        bias2_sqrt_inv, eps, bias2_inv, bias_variance, min_second_moment, CORRECTED,
    )  # fmt: skip


@triton.jit
def _sgd(
    param_ptr, grad_ptr, buffer_ptr, i, inside, noise, grad_scale, weight_decay, lr, momentum, gain, from_grad,
    from_buffer, FIRST: tl.constexpr,
):  # fmt: skip
    noisy = tl.load(grad_ptr + i, mask=inside, other=0.0) + noise
    w = tl.load(param_ptr + i, mask=inside, other=0.0)
    g = noisy * grad_scale + weight_decay * w
    if buffer_ptr is None:
        change = g
    else:
        b = g
        if not FIRST:
            b = momentum * tl.load(buffer_ptr + i, mask=inside, other=0.0) + gain * g
        tl.store(buffer_ptr + i, b, mask=inside)
        change = from_grad * g + from_buffer * b
    tl.store(grad_ptr + i, tl.zeros_like(noisy), mask=inside)
    tl.store(param_ptr + i, w - lr * change, mask=inside)


@triton.jit(do_not_specialize=PLACE)
def _sgd_kernel(
    param_ptr, grad_ptr, buffer_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, noise_std, numbers_ptr,
    taps, state_ptr, slots, stride, grad_scale, weight_decay, lr, momentum, gain, from_grad, from_buffer,
    FIRST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = start.to(tl.int64) // 256 + tl.program_id(0).to(tl.int64) * GROUPS
    z = step_normals(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, numbers_ptr, taps, GROUPS)
    for lane in tl.static_range(16):
        i = elements(first, start, lane, GROUPS)
        inside = (i >= 0) & (i < count)
        w = pass_state(z[lane], numbers_ptr, taps, state_ptr, slots, stride, i, inside)
        _sgd(
            param_ptr, grad_ptr, buffer_ptr, i, inside, noise_std * w, grad_scale, weight_decay, lr, momentum, gain,
            from_grad, from_buffer, FIRST,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLACE)
def _sgd_silent_kernel(
    param_ptr, grad_ptr, buffer_ptr, count, grad_scale, weight_decay, lr, momentum, gain, from_grad, from_buffer,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _sgd(
        param_ptr, grad_ptr, buffer_ptr, i, i < count, 0.0, grad_scale, weight_decay, lr, momentum, gain, from_grad,
        from_buffer, FIRST,
    )  # fmt: skip


def noisy_adam_(
    param: Tensor,
    summed_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias1: float,
    bias2: float,
    correlation: Correlation | None = None,
    bias_variance: float | None = None,
    min_second_moment: float = 0.0,
) -> None:
    tensors = (param, summed_grad, exp_avg, exp_avg_sq)
    scalars = (
        1.0 - lr * weight_decay if decoupled else 1.0,
        0.0 if decoupled else weight_decay,
        grad_scale,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / bias1,
        1.0 / math.sqrt(bias2),
        eps,
        1.0 / bias2,
        bias_variance or 0.0,
        min_second_moment,
    )
    noise = (key, stream, step, start, noise_std, correlation)
    _launch(
        _adam_kernel, _adam_silent_kernel, tensors, scalars, noise, {"CORRECTED": bias_variance is not None}
    )


def noisy_sgd_(
    param: Tensor,
    summed_grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    grad_scale: float,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first_step: bool,
    correlation: Correlation | None = None,
) -> None:
    tensors = (param, summed_grad, momentum_buffer)
    scalars = (
        grad_scale,
        weight_decay,
        lr,
        momentum,
        1.0 - dampening,
        1.0 if nesterov else 0.0,
        momentum if nesterov else 1.0,
    )
    noise = (key, stream, step, start, noise_std, correlation)
    _launch(_sgd_kernel, _sgd_silent_kernel, tensors, scalars, noise, {"FIRST": bool(first_step)})


def _launch(
    noisy: Any,
    silent: Any,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[float, ...],
    noise: tuple[bytes, int, int, int, float, Correlation | None],
    shape: dict[str, Any],
) -> None:
    key, stream, step, start, noise_std, correlation = noise
    param = tensors[0]
    assert param is not None
    count = len(param)
    if count == 0:
        return
    numbers = [float(x) for x in scalars]
    with on(param):
        if noise_std == 0.0:
            silent[(ceil_div(count, _BLOCK),)](*tensors, count, *numbers, BLOCK=_BLOCK, **shape, **UNFUSED)
        else:
            noisy[grid(start, count)](
                *(*tensors, *place(key, stream, step), start, count, float(noise_std)),
                *correlated(correlation, param.device),
                *numbers,
                GROUPS=GROUPS,
                num_warps=2,
                **shape,
                **UNFUSED,
            )
    written(*tensors, None if correlation is None else correlation.state)
