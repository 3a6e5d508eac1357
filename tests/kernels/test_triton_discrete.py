"""Triton's integer noise and releases against those in CPU memory: the same integers (see test_triton.py)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels import discrete_release_, rounded_gaussian
from synthward.kernels._triton import INTERPRETED
from tests.kernels.cases import generator

DEVICE = "cpu" if INTERPRETED else "cuda"
PLACE = {"key": bytes(range(32)), "stream": 3, "step": 7}
# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 8000), (100, 1500), (128 * 2**33 + 3, 3000), (7, 0)]
)
@pytest.mark.parametrize("scale", [0.0, 3.0, 2.0**40])
def test_integers_are_those_of_the_cpu(start, count, scale):
    """The largest scale shows the last bits of the normals."""
    expected = rounded_gaussian(count, start=start, scale=scale, **PLACE)
    found = rounded_gaussian(count, start=start, scale=scale, **PLACE, device=DEVICE, backend="triton")
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("count", [0, 1, 127, 2000])
@pytest.mark.parametrize(
    ("grid", "noise_std"), [(1.0, 0.0), (2.0**-20, 1.5), (2.0**60, 2.0**62), (2.0**-100, 2.0**-70)]
)
def test_releases_are_those_of_the_cpu(count, grid, noise_std):
    sums = torch.randn(count, dtype=torch.float64, generator=generator()) * (1e6 * grid)
    special = [
        float("nan"),
        float("inf"),
        -float("inf"),
        2.0**62 * grid,
        -(2.0**64) * grid,
        0.5 * grid,
        1.5 * grid,
    ]
    sums[: len(special)] = torch.tensor(special, dtype=torch.float64)[:count]
    ours, found = sums.clone().to(DEVICE), torch.full((count,), float("nan"), device=DEVICE)
    discrete_release_(ours, found, start=77, grid=grid, noise_std=noise_std, **PLACE, backend="triton")
    expected = torch.empty(count)
    discrete_release_(sums, expected, start=77, grid=grid, noise_std=noise_std, **PLACE, backend="cpp")
    assert torch.equal(found.cpu(), expected)
    assert not ours.any() and not sums.any()
