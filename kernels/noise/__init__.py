"""Gaussian noise as a pure function of key, stream, step and element index. Layout: ``_chacha.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.noise import cpp_impl, reference
from synthward.kernels.noise.correlation import Correlation


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


def uniform_noise(
    count: int,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Tensor:
    """Float32 [count], multiples of 2^-24 in [0, 1): the upper 24 bits of the words ``start .. start + count`` of a
    stream (`synthward.kernels.chacha20_words`), the same by every backend and on every device.

    For post-processing: the words are those that `gaussian_noise` of the same stream and step is made from.

    Raises:
        TypeError, ValueError: as `gaussian_noise`.
    """
    _check.place(key, stream, step, start, count)
    out = torch.empty(count, dtype=torch.float32, device=device)
    chosen = choose(backend, written=(out,))
    if chosen == "triton":
        from synthward.kernels.noise import triton_impl

        triton_impl.uniform_noise(out, key, stream, step, start)
    elif chosen != "shapes":
        made = cpp_impl if chosen == "cpp" else reference
        out.copy_(made.uniform_noise(count, key, stream, step, start))
    return out


def add_gaussian_noise_(
    tensor: Tensor,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    noise_std: float,
    correlation: Correlation | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add ``noise_std`` times the stream's Gaussians to a flat float32 tensor in place, and return it.

    With a `correlation` it is ``noise_std`` times the correlated noise of this step; where ``noise_std`` is 0, neither
    the tensor nor the correlation's state is written.

    Raises:
        TypeError, ValueError: naming the argument; a ``noise_std`` that float32 rounds to zero is refused.
    """
    _check.flat_float(tensor, "tensor")
    _check.place(key, stream, step, start, len(tensor))
    _check.noise_std(noise_std)
    rows: tuple[Tensor, ...] = ()
    if correlation is not None:
        correlation = correlation.checked(step, (tensor,))
        rows = correlation.rows()
    chosen = choose(backend, written=(tensor, *rows))
    if correlation is not None and noise_std == 0.0:
        return tensor
    if chosen == "triton":
        from synthward.kernels.noise import triton_impl

        triton_impl.add_gaussian_noise_(tensor, key, stream, step, start, noise_std, correlation)
    else:
        made = cpp_impl if chosen == "cpp" else reference
        made.add_gaussian_noise_(tensor, key, stream, step, start, noise_std, correlation)
    return tensor
