"""Noise and optimizer update in one pass over flat buffers. See README.md beside this file."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.noise.correlation import Correlation
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
    bias_variance: float | None = None,
    min_second_moment: float | None = None,
    correlation: Correlation | None = None,
    backend: Backend = "auto",
) -> None:
    """``g = (summed_grad + noise_std z) grad_scale``, then Adam (or AdamW if ``decoupled``), in place.

    All tensors float32 [P], none inside another; ``summed_grad`` is left at zero. ``step`` is the noise's
    logical step, ``adam_step`` counts updates from 1 for the bias correction. Element i gets element
    ``start + i`` of the noise stream; ``noise_std`` 0 adds none. With a `correlation` z is the correlated noise
    of this step, whose state moves on by a step unless ``noise_std`` is 0.

    With `bias_variance`, the variance of the noise in the mean gradient, the denominator is
    ``sqrt(max(v_hat - bias_variance, min_second_moment))`` and `eps` is not used (DP-AdamBC).

    Raises:
        TypeError, ValueError: naming the argument; nothing is written then.
    Reference: Kingma and Ba 2015; Loshchilov and Hutter 2019; torch.optim.Adam and AdamW; Tang, Shpilevskiy and
    Lecuyer 2023, algorithm 1.
    """
    _check.flat_float(param, "param")
    for name, tensor in (("summed_grad", summed_grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check.flat_float(tensor, name, len(param))
    _check_common(param, key, stream, step, start, noise_std, grad_scale, lr, weight_decay)
    _check_adam(beta1, beta2, eps, adam_step, bias_variance, min_second_moment)
    made, correlation = _chosen(
        backend, (param, summed_grad, exp_avg, exp_avg_sq), step, noise_std, correlation
    )
    made.noisy_adam_(
        *(param, summed_grad, exp_avg, exp_avg_sq),
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
        correlation=correlation,
        bias_variance=bias_variance,
        min_second_moment=min_second_moment or 0.0,
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
    correlation: Correlation | None = None,
    backend: Backend = "auto",
) -> None:
    """``g = (summed_grad + noise_std z) grad_scale``, then SGD with optional momentum, in place.

    All tensors float32 [P], none inside another; ``summed_grad`` is left at zero; ``momentum_buffer`` None
    means no momentum. In the first step the buffer is written, not read. Noise as in `noisy_adam_`.

    Raises:
        TypeError, ValueError: naming the argument; nothing is written then.
    Reference: torch.optim.SGD.
    """
    _check.flat_float(param, "param")
    _check.flat_float(summed_grad, "summed_grad", len(param))
    if momentum_buffer is not None:
        _check.flat_float(momentum_buffer, "momentum_buffer", len(param))
    _check_common(param, key, stream, step, start, noise_std, grad_scale, lr, weight_decay)
    _check.finite(momentum, "momentum", 0.0)
    _check.finite(dampening, "dampening")
    made, correlation = _chosen(backend, (param, summed_grad, momentum_buffer), step, noise_std, correlation)
    made.noisy_sgd_(
        *(param, summed_grad, momentum_buffer),
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
        correlation=correlation,
    )


def _chosen(
    backend: Backend,
    buffers: tuple[Tensor | None, ...],
    step: int,
    noise_std: float,
    correlation: Correlation | None,
) -> tuple[ModuleType, Correlation | None]:
    """The implementation, and the correlation as it is to be given to it."""
    rows: tuple[Tensor, ...] = ()
    if correlation is not None:
        correlation = correlation.checked(step, buffers)
        rows = correlation.rows()
    chosen = choose(backend, written=(*buffers, *rows))
    if noise_std == 0.0:
        correlation = None
    if chosen == "triton":
        from synthward.kernels.update import triton_impl

        return triton_impl, correlation
    return cpp_impl if chosen == "cpp" else reference, correlation


def _check_common(
    param: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    grad_scale: float,
    lr: float,
    weight_decay: float,
) -> None:
    _check.place(key, stream, step, start, len(param))
    _check.noise_std(noise_std)
    for name, value in (("grad_scale", grad_scale), ("lr", lr), ("weight_decay", weight_decay)):
        _check.finite(value, name)


def _check_adam(
    beta1: float,
    beta2: float,
    eps: float,
    adam_step: int,
    bias_variance: float | None,
    min_second_moment: float | None,
) -> None:
    _check.finite(eps, "eps", 0.0)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: got {beta}, expected 0 <= {name} < 1")
    if adam_step < 1:
        raise ValueError(f"adam_step: got {adam_step}, expected at least 1")
    if (bias_variance is None) != (min_second_moment is None):
        raise ValueError("min_second_moment: belongs to bias_variance; give both or neither")
    if bias_variance is not None and min_second_moment is not None:
        _check.finite(bias_variance, "bias_variance", 0.0)
        # Anything less is a division by zero where the noise took all of the second moment.
        _check.finite(min_second_moment, "min_second_moment", _check.FLOAT32_TINY)
