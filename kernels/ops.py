"""The operations as torch custom ops, ``torch.ops.synthward.*``, so that `torch.compile` keeps its graph whole.

Importing this module registers them. Each is the function of its name in `synthward.kernels` with the same shapes and
errors, and these differences, which a schema asks for: every output is an argument that is written, optional ones too
(None, never left out); only new tensors are returned; `backend` is any string; the noise key is a tensor. Noise and
updates take no `correlation` and no `bias_variance`: a pass that the engine records ends before them, and noise in a
trace is refused.

The key is uint8 [32] in CPU memory and not bytes: a constant would be written into the compiled graph, and with it
into the compiler's cache on disk. Nothing here has a derivative.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.library import custom_op

from synthward import kernels
from synthward.kernels._select import Backend
from synthward.kernels.conv.shape import ConvShape
from synthward.kernels.outer.dense import Method


@custom_op("synthward::outer_sq_norms", mutates_args=("out",))
def outer_sq_norms(
    activations: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor, backend: str = "auto"
) -> None:
    kernels.outer_sq_norms(activations, output_grads, offsets, out=out, backend=cast(Backend, backend))


@custom_op("synthward::outer_weighted_sum", mutates_args=("out",))
def outer_weighted_sum(
    activations: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor, backend: str = "auto"
) -> None:
    who = cast(Backend, backend)
    kernels.outer_weighted_sum(activations, output_grads, row_weights, out=out, backend=who)


@custom_op("synthward::rank1_norms", mutates_args=("sq_norms", "row_sums"))
def rank1_norms(
    activations: Tensor, output_grads: Tensor, sq_norms: Tensor, row_sums: Tensor, backend: str = "auto"
) -> Tensor:
    who = cast(Backend, backend)
    return kernels.rank1_norms(activations, output_grads, sq_norms, row_sums, backend=who)


@custom_op("synthward::outer_norms", mutates_args=("sq_norms", "row_sums"))
def outer_norms(
    activations: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor,
    method: str,
    with_bias: bool = False,
    backend: str = "auto",
) -> None:
    kernels.outer_norms(
        *(activations, output_grads, offsets, sq_norms, row_sums),
        method=cast(Method, method),
        with_bias=with_bias,
        backend=cast(Backend, backend),
    )


@custom_op("synthward::outer_unit_grads", mutates_args=())
def outer_unit_grads(
    activations: Tensor, output_grads: Tensor, offsets: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.outer_unit_grads(activations, output_grads, offsets, backend=cast(Backend, backend))


@custom_op("synthward::scale_rows", mutates_args=())
def scale_rows(rows: Tensor, row_weights: Tensor, backend: str = "auto") -> Tensor:
    return kernels.scale_rows(rows, row_weights, backend=cast(Backend, backend))


@custom_op("synthward::product", mutates_args=())
def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool = False, backend: str = "auto"
) -> Tensor:
    return kernels.product(x, weight, bias, is_transposed=is_transposed, backend=cast(Backend, backend))


@custom_op("synthward::conv_norms", mutates_args=("sq_norms", "row_sums"))
def conv_norms(
    shape: list[int],
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    sq_norms: Tensor,
    row_sums: Tensor,
    order: Tensor | None = None,
    method: str = "tile",
    backend: str = "auto",
) -> None:
    kernels.conv_norms(
        *(ConvShape.from_numbers(shape), images, output_grads, offsets, sq_norms, row_sums),
        order=order,
        method=cast(Method, method),
        backend=cast(Backend, backend),
    )


@custom_op("synthward::conv_unit_grads", mutates_args=())
def conv_unit_grads(
    shape: list[int],
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    sizes, who = ConvShape.from_numbers(shape), cast(Backend, backend)
    return kernels.conv_unit_grads(sizes, images, output_grads, offsets, order=order, backend=who)


@custom_op("synthward::conv_sum", mutates_args=("out",))
def conv_sum(
    shape: list[int],
    images: Tensor,
    output_grads: Tensor,
    row_weights: Tensor,
    out: Tensor,
    backend: str = "auto",
) -> None:
    sizes, who = ConvShape.from_numbers(shape), cast(Backend, backend)
    kernels.conv_sum(sizes, images, output_grads, row_weights, out=out, backend=who)


@custom_op("synthward::layer_norm_backward", mutates_args=("dx", "scale", "bias"))
def layer_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    dx: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    backend: str = "auto",
) -> None:
    kernels.layer_norm_backward(
        *(x, output_grads, mean, rstd, weight, offsets),
        order=order,
        dx=dx,
        scale=scale,
        bias=bias,
        backend=cast(Backend, backend),
    )


@custom_op("synthward::group_norm_backward", mutates_args=("dx", "scale", "bias"))
def group_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dx: Tensor | None,
    backend: str = "auto",
) -> None:
    kernels.group_norm_backward(
        x, output_grads, mean, rstd, weight, scale=scale, bias=bias, dx=dx, backend=cast(Backend, backend)
    )


@custom_op("synthward::outer_sum", mutates_args=("out", "bias"))
def outer_sum(
    activations: Tensor,
    output_grads: Tensor,
    row_weights: Tensor,
    out: Tensor,
    bias: Tensor | None,
    terms: int = 3,
    run: int | None = None,
    backend: str = "auto",
) -> None:
    kernels.outer_sum(
        *(activations, output_grads, row_weights),
        out=out,
        bias=bias,
        terms=terms,
        run=run,
        backend=cast(Backend, backend),
    )


@custom_op("synthward::diagonal_sq_norms", mutates_args=("out",))
def diagonal_sq_norms(
    rows: Tensor, offsets: Tensor | None, factors: Tensor | None, out: Tensor, backend: str = "auto"
) -> None:
    kernels.diagonal_sq_norms(rows, offsets, factors=factors, out=out, backend=cast(Backend, backend))


@custom_op("synthward::diagonal_weighted_sum", mutates_args=("out",))
def diagonal_weighted_sum(
    rows: Tensor, row_weights: Tensor, factors: Tensor | None, out: Tensor, backend: str = "auto"
) -> None:
    kernels.diagonal_weighted_sum(rows, row_weights, factors=factors, out=out, backend=cast(Backend, backend))


@custom_op("synthward::scatter_sq_norms", mutates_args=("out",))
def scatter_sq_norms(
    ids: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor, backend: str = "auto"
) -> None:
    kernels.scatter_sq_norms(ids, output_grads, offsets, out=out, backend=cast(Backend, backend))


@custom_op("synthward::scatter_weighted_sum", mutates_args=("out",))
def scatter_weighted_sum(
    ids: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor, backend: str = "auto"
) -> None:
    kernels.scatter_weighted_sum(ids, output_grads, row_weights, out=out, backend=cast(Backend, backend))


@custom_op("synthward::add_gaussian_noise_", mutates_args=("tensor",))
def add_gaussian_noise_(
    tensor: Tensor, key: Tensor, stream: int, step: int, start: int, noise_std: float, backend: str = "auto"
) -> None:
    kernels.add_gaussian_noise_(
        tensor,
        key=_bytes(key),
        stream=stream,
        step=step,
        start=start,
        noise_std=noise_std,
        backend=cast(Backend, backend),
    )


@custom_op("synthward::discrete_release_", mutates_args=("sums", "out"))
def discrete_release_(
    sums: Tensor,
    out: Tensor,
    key: Tensor,
    stream: int,
    step: int,
    start: int,
    grid: float,
    noise_std: float,
    backend: str = "auto",
) -> None:
    kernels.discrete_release_(
        *(sums, out),
        key=_bytes(key),
        stream=stream,
        step=step,
        start=start,
        grid=grid,
        noise_std=noise_std,
        backend=cast(Backend, backend),
    )


@custom_op("synthward::noisy_adam_", mutates_args=("param", "summed_grad", "exp_avg", "exp_avg_sq"))
def noisy_adam_(
    param: Tensor,
    summed_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    key: Tensor,
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
    adam_step: int,
    backend: str = "auto",
) -> None:
    kernels.noisy_adam_(
        *(param, summed_grad, exp_avg, exp_avg_sq),
        key=_bytes(key),
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
        adam_step=adam_step,
        backend=cast(Backend, backend),
    )


@custom_op("synthward::noisy_sgd_", mutates_args=("param", "summed_grad", "momentum_buffer"))
def noisy_sgd_(
    param: Tensor,
    summed_grad: Tensor,
    momentum_buffer: Tensor | None,
    key: Tensor,
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
    backend: str = "auto",
) -> None:
    kernels.noisy_sgd_(
        *(param, summed_grad, momentum_buffer),
        key=_bytes(key),
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
        backend=cast(Backend, backend),
    )


@custom_op("synthward::new_output", mutates_args=())
def new_output(shape: list[int], dtype: torch.dtype, device: torch.device, is_zero: bool) -> Tensor:
    """Memory for an output of another operation. For compilers that take torch's own empty and zero tensors for
    constants, and forget that something was written into them."""
    make = torch.zeros if is_zero else torch.empty
    return make(shape, dtype=dtype, device=device)


def _bytes(key: Tensor) -> bytes:
    if key.dtype != torch.uint8 or key.device.type != "cpu":
        raise TypeError(f"key: got {key.dtype} on {key.device}, expected torch.uint8 in CPU memory")
    return bytes(key.tolist())


@new_output.register_fake
def _(shape: list[int], dtype: torch.dtype, device: torch.device, is_zero: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@rank1_norms.register_fake
def _(
    activations: Tensor, output_grads: Tensor, sq_norms: Tensor, row_sums: Tensor, backend: str = "auto"
) -> Tensor:
    return torch.empty_like(sq_norms)


@outer_unit_grads.register_fake
def _(
    activations: Tensor, output_grads: Tensor, offsets: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    units = len(offsets) - 1
    numel = activations.shape[1] * output_grads.shape[1]
    grads = torch.empty(units, numel, dtype=torch.float32, device=activations.device)
    return grads, grads.new_empty(units), grads.new_empty(units)


@scale_rows.register_fake
def _(rows: Tensor, row_weights: Tensor, backend: str = "auto") -> Tensor:
    return torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))


@product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool = False, backend: str = "auto"
) -> Tensor:
    return x.new_empty(len(x), weight.shape[0 if is_transposed else 1])


@conv_unit_grads.register_fake
def _(
    shape: list[int],
    images: Tensor,
    output_grads: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    numel = ConvShape.from_numbers(shape).numel
    return torch.empty(len(offsets) - 1, numel, dtype=torch.float32, device=images.device)


def _writes_only(*_inputs: object, **_options: object) -> None:
    """All that a trace needs to know of an operation that returns nothing."""


for _operation in (
    *(outer_sq_norms, outer_weighted_sum, outer_norms, outer_sum),
    *(diagonal_sq_norms, diagonal_weighted_sum, scatter_sq_norms, scatter_weighted_sum),
    *(conv_norms, conv_sum, layer_norm_backward, group_norm_backward),
    *(add_gaussian_noise_, discrete_release_, noisy_adam_, noisy_sgd_),
):
    _operation.register_fake(_writes_only)
