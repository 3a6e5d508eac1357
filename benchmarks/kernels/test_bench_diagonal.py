"""Biases (rows alone) and scales (rows times factors): norms of units and weighted sums at shapes of gpt and ehr."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.cases import assert_near, best_executors, offsets_of
from synthward.kernels import diagonal_sq_norms, diagonal_weighted_sum

pytestmark = best_executors

SHAPES = [(32, 128, 384), (32, 128, 1536), (64, 64, 256)]


@pytest.mark.parametrize(("units", "rows", "width"), SHAPES)
@pytest.mark.parametrize("with_factors", [False, True])
def test_diagonal_sq_norms(measure, executor, with_factors, units, rows, width):
    g, offsets = torch.randn(units * rows, width), offsets_of(units, rows)
    factors = torch.randn_like(g) if with_factors else None

    def by_torch() -> Tensor:
        terms = g if factors is None else g * factors
        return torch.linalg.vector_norm(terms.view(units, rows, width).sum(1), dim=1).square()

    call = by_torch if executor == "torch" else (lambda: diagonal_sq_norms(g, offsets, factors=factors))
    norms = measure(call, bytes=g.nbytes * (1 + with_factors) + 4 * units)
    terms = g.double() if factors is None else g.double() * factors
    assert_near(norms, terms.view(units, rows, width).sum(1).square().sum(1))


@pytest.mark.parametrize(("rows", "width"), [(units * rows, width) for units, rows, width in SHAPES])
@pytest.mark.parametrize("with_factors", [False, True])
def test_diagonal_weighted_sum(measure, executor, with_factors, rows, width):
    g, w, out = torch.randn(rows, width), torch.rand(rows), torch.zeros(width)
    factors = torch.randn_like(g) if with_factors else None

    def by_torch() -> None:
        out.addmv_((g if factors is None else g * factors).t(), w)

    call = (
        by_torch if executor == "torch" else (lambda: diagonal_weighted_sum(g, w, factors=factors, out=out))
    )
    measure(call, clear=(out,), bytes=g.nbytes * (1 + with_factors) + w.nbytes + 8 * width)
    assert_near(out, w.double() @ (g.double() if factors is None else g.double() * factors))
