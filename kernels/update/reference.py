"""Plain torch: what the fused updates are held to."""

from __future__ import annotations

from torch import Tensor

from synthward.kernels.noise.correlation import Correlation
from synthward.kernels.noise.reference import step_noise


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
    grad = _noisy(summed_grad, key, stream, step, start, noise_std, correlation) * grad_scale
    if decoupled:
        param.mul_(1.0 - lr * weight_decay)
    else:
        grad = grad + weight_decay * param
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    if bias_variance is None:
        denominator = (exp_avg_sq.sqrt() / bias2**0.5).add_(eps)
    else:
        denominator = (exp_avg_sq / bias2 - bias_variance).clamp_(min=min_second_moment).sqrt_()
    param.addcdiv_(exp_avg, denominator, value=-lr / bias1)
    summed_grad.zero_()


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
    noisy = _noisy(summed_grad, key, stream, step, start, noise_std, correlation)
    grad = noisy * grad_scale + weight_decay * param
    if momentum_buffer is not None:
        if first_step:
            momentum_buffer.copy_(grad)
        else:
            momentum_buffer.mul_(momentum).add_(grad, alpha=1.0 - dampening)
        grad = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    param.sub_(lr * grad)
    summed_grad.zero_()


def _noisy(
    summed_grad: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    correlation: Correlation | None,
) -> Tensor:
    if noise_std == 0.0:
        return summed_grad
    return summed_grad + noise_std * step_noise(summed_grad, key, stream, step, start, correlation)
