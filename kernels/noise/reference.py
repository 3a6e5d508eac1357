"""Plain NumPy and torch: the same words, transcendental functions in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthward.kernels._chacha import reference_blocks, reference_gaussians
from synthward.kernels.noise.correlation import Correlation


def gaussian_noise(count: int, key: bytes, stream: int, step: int, start: int) -> Tensor:
    return torch.from_numpy(reference_gaussians(key, stream=stream, step=step, start=start, count=count))


def uniform_noise(count: int, key: bytes, stream: int, step: int, start: int) -> Tensor:
    blocks = np.arange(start // 16, -(-(start + count) // 16), dtype=np.uint64)
    words = reference_blocks(key, stream << 48 | step, blocks).ravel()[start % 16 :][:count]
    return torch.from_numpy((words >> 8).astype(np.float32) * np.float32(2.0**-24))


def add_gaussian_noise_(
    tensor: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    correlation: Correlation | None,
) -> None:
    tensor += noise_std * step_noise(tensor, key, stream, step, start, correlation)


def step_noise(
    like: Tensor, key: bytes, stream: int, step: int, start: int, correlation: Correlation | None
) -> Tensor:
    """Noise of one step, of the shape and on the device of `like`; the correlation's state moves on by a step."""
    count, device = len(like), like.device
    if correlation is None:
        return gaussian_noise(count, key, stream, step, start).to(device)
    noise = torch.zeros(count, device=device)
    for j, tap in enumerate(correlation.taps):
        noise += tap * gaussian_noise(count, key, stream, step - j, start).to(device)
    rows = correlation.rows()
    for weight, row in zip(correlation.weights, rows, strict=True):
        if weight != 0.0:
            noise -= weight * row
    for decay, gain, row in zip(correlation.decays, correlation.gains, rows, strict=True):
        if decay == 0.0:
            row.copy_(gain * noise)
        elif (decay, gain) != (1.0, 0.0):
            row.mul_(decay).add_(gain * noise)
    return noise
