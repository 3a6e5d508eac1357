"""Gaussians: cipher noise against torch's own generator, which is no cipher."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import best_executors
from synthward.kernels import add_gaussian_noise_, gaussian_noise


@pytest.mark.parametrize("count", [1 << 16, 1 << 20])
def test_gaussian_noise(measure, executor, count):
    if executor == "torch":
        z = measure(lambda: torch.empty(count).normal_(), elements=count)
    else:
        z = measure(lambda: gaussian_noise(count, key=bytes(32), stream=0, step=0), elements=count)
    assert len(z) == count
    assert abs(float(z.double().square().mean()) - 1) < 0.05


@best_executors
@pytest.mark.parametrize("count", [1 << 16, 1 << 20])
def test_add_gaussian_noise(measure, executor, count):
    z, place = torch.zeros(count), {"key": bytes(32), "stream": 0, "step": 0}

    def by_torch() -> torch.Tensor:
        return z.add_(torch.empty(count).normal_(), alpha=2.0)

    call = by_torch if executor == "torch" else (lambda: add_gaussian_noise_(z, **place, noise_std=2.0))
    measure(call, clear=(z,), elements=count)
    assert abs(float(z.double().square().mean()) - 4) < 0.2
