"""Per-unit norms: rows that are units, and units of a few rows by Gram matrices in registers."""

from __future__ import annotations

import pytest
import torch

from synthward.kernels import diagonal_sq_norms, outer_sq_norms, scale_rows


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 1024), (1024, 4096)])
def test_diagonal_sq_norms(measure, executor, rows, columns):
    x = torch.randn(rows, columns)

    def by_torch() -> torch.Tensor:
        return torch.linalg.vector_norm(x, dim=1).square()

    call = by_torch if executor == "torch" else (lambda: diagonal_sq_norms(x))
    norms = measure(call, bytes=4 * x.numel())
    torch.testing.assert_close(norms, x.double().square().sum(1).float())


@pytest.mark.parametrize(
    ("units", "rows", "width"), [(256, 4, 256), (256, 4, 1024), (64, 16, 256), (16, 64, 256)]
)
def test_outer_sq_norms(measure, executor, units, rows, width):
    a, g = torch.randn(units * rows, width), torch.randn(units * rows, width)
    offsets = torch.arange(0, units * rows + 1, rows)
    a3, g3 = a.view(units, rows, width), g.view(units, rows, width)

    def gram() -> torch.Tensor:
        return (torch.bmm(a3, a3.mT) * torch.bmm(g3, g3.mT)).sum((1, 2))

    call = gram if executor == "torch" else (lambda: outer_sq_norms(a, g, offsets))
    # Of the upper triangle, which is what is needed.
    flops = units * rows * (rows + 1) // 2 * 4 * width
    norms = measure(call, flops=flops, bytes=a.nbytes + g.nbytes + 4 * units)
    torch.testing.assert_close(norms, gram(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("rows", "columns"), [(256, 1024)])
def test_scale_rows(measure, executor, rows, columns):
    x, w = torch.randn(rows, columns), torch.rand(rows)
    call = (lambda: x * w.unsqueeze(1)) if executor == "torch" else (lambda: scale_rows(x, w))
    scaled = measure(call, bytes=8 * x.numel())
    assert torch.equal(scaled, x * w.unsqueeze(1))
