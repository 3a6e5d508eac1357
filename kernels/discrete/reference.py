"""Plain NumPy: the same words, transcendental functions in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthward.kernels._chacha import reference_wide_gaussians

MOST = 2.0**62


def rounded_gaussian(count: int, key: bytes, stream: int, step: int, start: int, scale: float) -> Tensor:
    z = reference_wide_gaussians(key, stream=stream, step=step, start=start, count=count)
    return torch.from_numpy(np.rint(z * scale).astype(np.int64))


def discrete_release_(
    sums: Tensor, out: Tensor, key: bytes, stream: int, step: int, start: int, grid: float, noise_std: float
) -> None:
    whole = (sums.detach() / grid).nan_to_num(0.0, MOST, -MOST).clamp(-MOST, MOST).round().to(torch.int64)
    noise = rounded_gaussian(len(sums), key, stream, step, start, noise_std / grid).to(sums.device)
    with torch.no_grad():
        out.copy_(((whole + noise).double() * grid).float())
        sums.zero_()
