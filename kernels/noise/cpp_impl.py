"""Compiled noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written
from synthward.kernels.noise.correlation import Correlation


def gaussian_noise(out: Tensor, key: bytes, stream: int, step: int, start: int) -> None:
    _C.gaussian_noise(view(out), key, stream, step, start, threads())


def uniform_noise(count: int, key: bytes, stream: int, step: int, start: int) -> Tensor:
    words = _C.chacha20_words(key, stream, step, start, count)
    return torch.from_numpy((words >> 8).astype("float32")).mul_(2.0**-24)


def add_gaussian_noise_(
    tensor: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    correlation: Correlation | None,
) -> None:
    recipe = recipe_of(correlation)
    _C.add_gaussian_noise(view(tensor), key, stream, step, start, noise_std, threads(), **recipe)
    written(tensor, None if correlation is None else correlation.state)


def recipe_of(correlation: Correlation | None) -> dict[str, Any]:
    """A correlation as arguments of the compiled kernels."""
    if correlation is None:
        return {}
    c = correlation
    return {
        "taps": c.taps,
        "weights": c.weights,
        "decays": c.decays,
        "gains": c.gains,
        "state": maybe_view(c.state),
    }
