"""Gaussian noise as a pure function of key, stream, step and element index. Layout: ``_chacha.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.noise import cpp_impl, reference


def gaussian_noise(
    count: int,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Tensor:
    """Standard Gaussians float32 [count]: elements ``start .. start + count`` of a stream.

    Guarantees: the same bits for any split, thread count, instruction set and device (the reference: to float32
    rounding); the radius of Box-Muller has the tail of a 64-bit uniform (up to 9.4 standard deviations).

    Raises:
        TypeError, ValueError: key not of 32 bytes, stream not below 2^15, step not below 2^48, position
            negative.
    """
    _check.place(key, stream, step, start, count)
    out = torch.empty(count, dtype=torch.float32, device=device)
    chosen = choose(backend, written=(out,))
    if chosen == "cpp":
        cpp_impl.gaussian_noise(out, key, stream, step, start)
    elif chosen == "triton":
        from synthward.kernels.noise import triton_impl

        triton_impl.gaussian_noise(out, key, stream, step, start)
    else:
        out.copy_(reference.gaussian_noise(count, key, stream, step, start))
    return out


def add_gaussian_noise_(
    tensor: Tensor,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    noise_std: float,
    backend: Backend = "auto",
) -> Tensor:
    """Add ``noise_std`` times the stream's Gaussians to a flat float32 tensor in place, and return it.

    Raises:
        TypeError, ValueError: naming the argument; a ``noise_std`` that float32 rounds to zero is refused.
    """
    _check.flat_float(tensor, "tensor")
    _check.place(key, stream, step, start, len(tensor))
    _check.noise_std(noise_std)
    chosen = choose(backend, written=(tensor,))
    if chosen == "cpp":
        cpp_impl.add_gaussian_noise_(tensor, key, stream, step, start, noise_std)
    elif chosen == "triton":
        from synthward.kernels.noise import triton_impl

        triton_impl.add_gaussian_noise_(tensor, key, stream, step, start, noise_std)
    else:
        tensor += noise_std * reference.gaussian_noise(len(tensor), key, stream, step, start).to(
            tensor.device
        )
    return tensor
