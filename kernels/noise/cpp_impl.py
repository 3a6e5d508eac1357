"""Compiled noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written
from synthward.kernels.noise.correlation import Correlation


def gaussian_noise(out: Tensor, key: bytes, stream: int, step: int, start: int) -> None:
    _C.gaussian_noise(view(out), key, stream, step, start, threads())


def add_gaussian_noise_(
    tensor: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    correlation: Correlation | None,
) -> None:
    options = correlation_options(correlation, step)
    _C.add_gaussian_noise(view(tensor), key, stream, step, start, noise_std, **options, threads=threads())
    written(tensor, None if correlation is None else correlation.state)


def correlation_options(correlation: Correlation | None, step: int) -> dict[str, Any]:
    """What the extension takes of a correlation."""
    if correlation is None:
        return {"correlation": [], "state": None}
    return {"correlation": correlation.coefficients(step), "state": maybe_view(correlation.state)}
