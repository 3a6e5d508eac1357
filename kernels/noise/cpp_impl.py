"""Compiled noise."""

from __future__ import annotations

from torch import Tensor

from synthward import _C
from synthward.kernels._select import threads, view, written


def gaussian_noise(out: Tensor, key: bytes, stream: int, step: int, start: int) -> None:
    _C.gaussian_noise(view(out), key, stream, step, start, threads())


def add_gaussian_noise_(
    tensor: Tensor, key: bytes, stream: int, step: int, start: int, noise_std: float
) -> None:
    _C.add_gaussian_noise(view(tensor), key, stream, step, start, noise_std, threads())
    written(tensor)
