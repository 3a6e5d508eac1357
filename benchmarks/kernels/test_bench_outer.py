"""Linear layers: norms of rows and of units, gradients of units and the weighted sum, against torch's dense products.

Shapes are those of benchmarks/models.py: layers of gan and mlp, where every row is a unit; projections and vocabulary
of gpt; the vocabulary of ehr, with fewer units.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.cases import assert_near, best_executors, offsets_of
from synthward.kernels import outer_norms, outer_sum, outer_unit_grads, rank1_norms

pytestmark = best_executors

ROWS = [(2000, 300, 512), (2000, 512, 512), (1024, 256, 1024), (1024, 1024, 1024)]
UNITS = [(32, 128, 384, 1152), (32, 128, 384, 1536), (32, 128, 384, 2048), (8, 64, 256, 20000)]
# Fewer: the gradients of all units are kept.
KEPT_UNITS = [(8, 128, 384, 1152), (8, 128, 384, 1536), (8, 128, 384, 2048), (2, 64, 256, 20000)]


def lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def squares(grads: Tensor) -> Tensor:
    """Of gradients [U, p, d]. Row by row: torch's norm of millions of elements has three digits."""
    return lengths(grads).square().sum(1)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), ROWS)
def test_rank1_norms(measure, executor, rows, inputs, outputs):
    a, g = torch.randn(rows, inputs), torch.randn(rows, outputs)
    sq_norms, row_sums = torch.zeros(rows), torch.zeros(rows)

    def by_torch() -> Tensor:
        of_g = lengths(g)
        product = lengths(a) * of_g
        sq_norms.add_(product.square())
        row_sums.add_(product)
        return of_g.square_()

    call = by_torch if executor == "torch" else (lambda: rank1_norms(a, g, sq_norms, row_sums))
    # Both sums are read and written, the squares written.
    of_g = measure(call, clear=(sq_norms, row_sums), bytes=4 * rows * (inputs + outputs + 5))
    exact = lengths(a.double()) * lengths(g.double())
    assert_near(of_g, g.double().square().sum(1))
    assert_near(sq_norms, exact.square())
    assert_near(row_sums, exact)


@pytest.mark.parametrize(("units", "rows", "inputs", "outputs"), UNITS)
@pytest.mark.parametrize("method", ["gram", "tile"])
def test_outer_norms(measure, executor, method, units, rows, inputs, outputs):
    a, g = torch.randn(units * rows, inputs), torch.randn(units * rows, outputs)
    a3, g3 = a.view(units, rows, inputs), g.view(units, rows, outputs)
    offsets, sq_norms, row_sums = offsets_of(units, rows), torch.zeros(units), torch.zeros(units)

    def torch_gram() -> None:
        of_a, of_g = torch.bmm(a3, a3.mT), torch.bmm(g3, g3.mT)
        pairs = of_a.mul_(of_g)
        sq_norms.add_(pairs.sum((1, 2)))
        row_sums.add_(pairs.diagonal(dim1=1, dim2=2).sqrt().sum(1))

    def torch_tile() -> None:
        sq_norms.add_(squares(torch.bmm(g3.mT, a3)))
        row_sums.add_((lengths(a3) * lengths(g3)).sum(1))

    def kernel() -> None:
        outer_norms(a, g, offsets, sq_norms, row_sums, method=method)

    call = kernel if executor != "torch" else {"gram": torch_gram, "tile": torch_tile}[method]
    # Of the products of pairs the upper triangle, which is what is needed.
    gram = units * rows * (rows + 1) * (inputs + outputs)
    flops = gram if method == "gram" else 2 * units * rows * inputs * outputs
    measure(call, clear=(sq_norms, row_sums), flops=flops, bytes=4 * (a.numel() + g.numel() + 4 * units))
    a3, g3 = a3.double(), g3.double()
    assert_near(sq_norms, (torch.bmm(a3, a3.mT) * torch.bmm(g3, g3.mT)).sum((1, 2)))
    assert_near(row_sums, (lengths(a3) * lengths(g3)).sum(1))


@pytest.mark.parametrize(("units", "rows", "inputs", "outputs"), KEPT_UNITS)
def test_outer_unit_grads(measure, executor, units, rows, inputs, outputs):
    a, g = torch.randn(units * rows, inputs), torch.randn(units * rows, outputs)
    a3, g3, offsets = a.view(units, rows, inputs), g.view(units, rows, outputs), offsets_of(units, rows)

    def by_torch() -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.bmm(g3.mT, a3)
        return grads.flatten(1), squares(grads), (lengths(a3) * lengths(g3)).sum(1)

    call = by_torch if executor == "torch" else (lambda: outer_unit_grads(a, g, offsets))
    products = units * rows * inputs * outputs
    traffic = 4 * (a.numel() + g.numel() + units * (inputs * outputs + 2))
    grads, sq_norms, row_sums = measure(call, flops=2 * products, bytes=traffic)
    exact = torch.bmm(g3.mT.double(), a3.double()).flatten(1)
    assert_near(grads, exact)
    assert_near(sq_norms, exact.square().sum(1))
    assert_near(row_sums, (lengths(a3.double()) * lengths(g3.double())).sum(1))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [*ROWS, *((u * t, d, p) for u, t, d, p in UNITS)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outer_sum(measure, executor, with_bias, rows, inputs, outputs):
    a, g, w = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.rand(rows)
    out, bias = torch.zeros(outputs, inputs), torch.zeros(outputs) if with_bias else None

    def by_torch() -> None:
        # The smaller operand is scaled.
        left, right = (g, a * w.unsqueeze(1)) if inputs < outputs else (g * w.unsqueeze(1), a)
        out.addmm_(left.t(), right)
        if bias is not None:
            bias.addmv_(g.t(), w)

    call = by_torch if executor == "torch" else (lambda: outer_sum(a, g, w, out=out, bias=bias))
    sums = [out] if bias is None else [out, bias]
    traffic = 4 * (a.numel() + g.numel() + rows) + 8 * sum(s.numel() for s in sums)
    measure(call, clear=sums, flops=2 * rows * sum(s.numel() for s in sums), bytes=traffic)
    scaled = g.double() * w.unsqueeze(1)
    assert_near(out, scaled.t() @ a.double())
    if bias is not None:
        assert_near(bias, scaled.sum(0))
