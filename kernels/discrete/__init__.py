"""Integer Gaussian noise and the release of sums on a grid. Word layout: ``_chacha.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.discrete import cpp_impl, reference

# A grid within these keeps what is released a normal float32, or zero.
_GRIDS = (2.0**-100, 2.0**60)
# Below the first, rounding leaves no noise at all; above the last, a double has no digit left for the rounding.
_SCALES = (2.0**-4, 2.0**40)


def rounded_gaussian(
    count: int,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    scale: float,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Tensor:
    """``rint(scale * z)`` int64 [count] for standard Gaussians z: elements ``start .. start + count`` of a stream.

    z is made from a radius word and an angle word of 64 bits each, to 48 bits or better. No word is one that
    `gaussian_noise` or `chacha20_words` uses, at the same place either.

    Guarantees: the same integers for any split, thread count, instruction set and device (the reference: but for a
    few at the border between two); what is done does not depend on the words.

    Raises:
        TypeError, ValueError: as `gaussian_noise`, and for a scale that is neither 0 nor from 2^-4 to 2^40.
    """
    _check.place(key, stream, step, start, count)
    _check_scale(scale, "scale")
    out = torch.empty(count, dtype=torch.int64, device=device)
    chosen = choose(backend, written=(out,))
    if chosen == "cpp":
        cpp_impl.rounded_gaussian(out, key, stream, step, start, scale)
    elif chosen == "triton":
        from synthward.kernels.discrete import triton_impl

        triton_impl.rounded_gaussian(out, key, stream, step, start, scale)
    else:
        out.copy_(reference.rounded_gaussian(count, key, stream, step, start, scale))
    return out


def discrete_release_(
    sums: Tensor,
    out: Tensor,
    *,
    key: bytes,
    stream: int,
    step: int,
    start: int = 0,
    grid: float,
    noise_std: float,
    backend: Backend = "auto",
) -> Tensor:
    """``out = grid * (rint(sums / grid) + rint(noise_std / grid * z))``, and ``sums = 0``; returns ``out``.

    The numbers in brackets are int64 and their sum is exact: what is released is a whole number whose distribution
    depends on the rounded sum alone, and nothing is left in its low bits (Mironov 2012). z: see `rounded_gaussian`.

    Args:
        sums: float64 [P]. A sum beyond 2^62 steps of the grid, infinity too, is cut off there, which brings no two
            sums further apart; NaN counts as 0, so the caller keeps it out of the sums.
        out: float32 [P], the nearest of the exact result (rounded to float64 first).
        grid: a power of two from 2^-100 to 2^60, so that division by it is exact.
        noise_std: 0, or from 2^-4 to 2^40 of the grid.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.flat_double(sums, "sums")
    _check.flat_float(out, "out", len(sums))
    _check.apart(sums, out, "out")
    _check.place(key, stream, step, start, len(sums))
    _check.finite(grid, "grid", 0.0)
    if not (_GRIDS[0] <= grid <= _GRIDS[1] and math.frexp(grid)[0] == 0.5):
        raise ValueError(f"grid: got {grid}, expected a power of two from 2^-100 to 2^60")
    _check.finite(noise_std, "noise_std", 0.0)
    _check_scale(noise_std / grid, "noise_std")
    chosen = choose(backend, written=(sums, out), further=(torch.float64,))
    if chosen == "cpp":
        cpp_impl.discrete_release_(sums, out, key, stream, step, start, grid, noise_std)
    elif chosen == "triton":
        from synthward.kernels.discrete import triton_impl

        triton_impl.discrete_release_(sums, out, key, stream, step, start, grid, noise_std)
    else:
        reference.discrete_release_(sums, out, key, stream, step, start, grid, noise_std)
    return out


def _check_scale(scale: float, name: str) -> None:
    _check.finite(scale, name, 0.0)
    if scale != 0.0 and not _SCALES[0] <= scale <= _SCALES[1]:
        raise ValueError(f"{name}: is {scale} steps of the grid, expected 0, or from 2^-4 to 2^40 of them")
