"""Gaussians: cipher noise against torch's own generator, which is no cipher."""

from __future__ import annotations

import pytest
import torch

from synthward.kernels import gaussian_noise


@pytest.mark.parametrize("count", [1 << 16, 1 << 20])
def test_gaussian_noise(measure, executor, count):
    if executor == "torch":
        z = measure(lambda: torch.empty(count).normal_(), elements=count)
    else:
        z = measure(lambda: gaussian_noise(count, key=bytes(32), stream=0, step=0), elements=count)
    assert len(z) == count
    assert abs(float(z.double().square().mean()) - 1) < 0.05
