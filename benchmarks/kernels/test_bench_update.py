"""Noise and optimizer in one pass, against noise, addition and torch's fused optimizer one after the other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import best_executors
from synthward.kernels import noisy_adam_, noisy_sgd_

SIZES = [1 << 16, 1 << 20, 1 << 23]
# Read and write param, moments or momentum, and the sum, which is left at zero.
ADAM_BYTES, SGD_BYTES = 32, 24


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("count", SIZES)
def test_noisy_adam(measure, executor, count, noise_std):
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

    measure(step, elements=count, bytes=ADAM_BYTES * count)
    assert not summed.any()
    assert bool(param.detach().any()) == bool(noise_std)


@best_executors
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize("count", SIZES)
def test_noisy_sgd(measure, executor, count, noise_std):
    scale, lr = 0.1, 0.5
    param, summed, buffer = (torch.zeros(count) for _ in range(3))
    if executor == "torch":
        trained = torch.nn.Parameter(param)
        optimizer = torch.optim.SGD([trained], lr=lr, momentum=0.9, fused=True)
        optimizer.state[trained]["momentum_buffer"] = buffer

        def step() -> None:
            if noise_std:
                summed.add_(torch.empty(count).normal_(), alpha=noise_std)
            trained.grad = summed.mul_(scale)
            optimizer.step()
            summed.zero_()
    else:

        def step() -> None:
            noisy_sgd_(
                *(param, summed, buffer),
                key=bytes(32),
                stream=0,
                step=0,
                noise_std=noise_std,
                grad_scale=scale,
                lr=lr,
                momentum=0.9,
                dampening=0.0,
                nesterov=False,
                weight_decay=0.0,
                first_step=False,
            )

    measure(step, elements=count, bytes=SGD_BYTES * count)
    assert not summed.any()
    wanted = torch.randn(count)
    param.zero_()
    buffer.zero_()
    summed.copy_(wanted)
    step()
    noise = param.double() / (-lr * scale) - wanted
    assert abs(float(noise.square().mean().sqrt()) - noise_std) < 0.02
