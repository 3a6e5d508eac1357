"""Sums in float64 of float32 rows: exact but for float64's own rounding, for releases on a grid."""

from __future__ import annotations

import pytest
import torch

from synthward.kernels import (
    ConvShape,
    conv_sum,
    diagonal_weighted_sum,
    outer_sum,
    scatter_weighted_sum,
)

ROWS, WIDTH, OUT = 301, 13, 7


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 10.0


@pytest.fixture
def weights():
    found = torch.rand(ROWS, generator=torch.Generator().manual_seed(9))
    found[::5] = 0.0
    return found


def assert_exact(found, expected, wide):
    """Within float64's rounding where it is wide; and fp32 sums are farther off, or the test would see nothing."""
    off = float((found.double() - expected).abs().max() / expected.abs().max())
    assert off < 1e-13 if wide else 1e-13 < off < 1e-4


@pytest.mark.parametrize("wide", [True, False])
def test_outer(weights, wide):
    a, g = rows(1, ROWS, WIDTH), rows(2, ROWS, OUT)
    a[0], g[5] = float("nan"), float("inf")  # their weight is zero
    out = torch.ones(OUT, WIDTH, dtype=torch.float64 if wide else torch.float32)
    bias = torch.ones(OUT, dtype=out.dtype)
    outer_sum(a, g, weights, out=out, bias=bias)
    kept = weights > 0
    scaled = g[kept].double() * weights[kept].double().unsqueeze(1)
    assert_exact(out, 1.0 + scaled.T @ a[kept].double(), wide)
    assert_exact(bias, 1.0 + scaled.sum(0), wide)


def test_diagonal(weights):
    x = rows(3, ROWS, WIDTH)
    out = torch.zeros(WIDTH, dtype=torch.float64)
    diagonal_weighted_sum(x, weights, out=out)
    assert_exact(out, (x.double() * weights.double().unsqueeze(1)).sum(0), True)


@pytest.mark.parametrize("wide", [True, False])
def test_scatter(weights, wide):
    ids = torch.arange(ROWS) % 4 - 1
    g = rows(4, ROWS, WIDTH)
    out = torch.zeros(3, WIDTH, dtype=torch.float64 if wide else torch.float32)
    scatter_weighted_sum(ids, g, weights, out=out)
    kept = ids >= 0
    expected = torch.zeros(3, WIDTH, dtype=torch.float64).index_add(
        0, ids[kept], (g.double() * weights.double().unsqueeze(1))[kept]
    )
    assert_exact(out, expected, wide)


def test_convolution():
    shape = ConvShape(1, 2, 3, (1, 5, 5), (1, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1), (1, 3, 3))
    x, g = rows(5, 40, shape.image_numel), rows(6, 40, shape.output_numel)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(8))
    out = torch.zeros(shape.numel, dtype=torch.float64)
    conv_sum(shape, x, g, weights, out=out)
    windows = x.view(40, 2, 5, 5).double().unfold(2, 3, 1).unfold(3, 3, 1)
    each = torch.einsum("n,ncijhw,noij->ohwc", weights.double(), windows, g.view(40, 3, 3, 3).double())
    assert_exact(out, each.flatten(), True)
