"""Plain NumPy: the same words, transcendental functions in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.kernels._chacha import reference_gaussians


def gaussian_noise(count: int, key: bytes, stream: int, step: int, start: int) -> Tensor:
    return torch.from_numpy(reference_gaussians(key, stream=stream, step=step, start=start, count=count))
