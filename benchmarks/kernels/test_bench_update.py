"""Noise and Adam in one pass, against noise, addition and torch's fused Adam one after the other."""

from __future__ import annotations

import pytest
import torch

from synthward.kernels import noisy_adam_

SIZES = [1 << 16, 1 << 20, 1 << 23]
BYTES = 32  # read and write param, moments and the sum, which is left at zero


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("count", SIZES)
def test_adam(measure, executor, count, noise_std):
    param, summed, first, second = (torch.zeros(count) for _ in range(4))
    if executor == "torch":
        param = torch.nn.Parameter(param)
        optimizer = torch.optim.Adam([param], fused=True)

        def step() -> None:
            if noise_std:
                summed.add_(torch.empty(count).normal_(), alpha=noise_std)
            param.grad = summed.mul_(0.1)
            optimizer.step()
            summed.zero_()
    else:

        def step() -> None:
            noisy_adam_(
                *(param, summed, first, second),
                key=bytes(32),
                stream=0,
                step=0,
                noise_std=noise_std,
                grad_scale=0.1,
                lr=1e-3,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                decoupled=False,
                adam_step=1,
            )

    measure(step, elements=count, bytes=BYTES * count)
    assert not summed.any()
    assert bool(param.detach().any()) == bool(noise_std)
