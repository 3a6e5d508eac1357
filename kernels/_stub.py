from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor
from synthward.kernels.noise import gaussian_noise
import numpy as np

@dataclass(frozen=True)
class Correlation:
    taps: tuple
    weights: tuple = ()
    decays: tuple = ()
    gains: tuple = ()
    state: Tensor | None = None
    first_step: int = 0

def correlated(n, key, stream, step, c):
    w = torch.zeros(n)
    for j, tap in enumerate(c.taps):
        if step - j >= c.first_step:
            w += tap * gaussian_noise(n, key=key, stream=stream, step=step - j)
    for k, x in enumerate(c.weights):
        w -= x * c.state[k]
    for k in range(len(c.weights)):
        c.state[k] = c.decays[k] * c.state[k] + c.gains[k] * w
    return w

def discrete_release_(sums, out, *, key, stream, step, start=0, grid, noise_std):
    z = gaussian_noise(len(sums), key=key, stream=stream, step=step, start=start).double()
    out.copy_((torch.round(sums / grid) + torch.round(noise_std / grid * z)) * grid)
    sums.zero_()
