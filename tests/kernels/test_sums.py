"""Clipped sums: every row times its weight, a row of weight zero not at all."""

from __future__ import annotations

import pytest
import torch

from synthward.kernels import (
    available_isas,
    diagonal_weighted_sum,
    force_isa,
    outer_weighted_sum,
    scale_rows,
    scatter_weighted_sum,
)
from tests.kernels.cases import generator, matrix

SHAPES = [(0, 3, 4), (1, 1, 1), (5, 7, 3), (13, 17, 33), (64, 40, 131)]
SHAPE = pytest.mark.parametrize(("rows", "d", "p"), SHAPES)


def weights_of(rows: int) -> torch.Tensor:
    weights = torch.rand(rows, generator=generator(3))
    weights[1::4] = 0.0
    return weights


def assert_sum(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """Within the bound on a float32 sum of `terms` products in any order (Higham 2002, section 3.1)."""
    bound = (terms + 8) * 2.0**-24 * magnitude + 1e-30
    assert ((actual.double() - expected).abs() <= bound).all()


@SHAPE
def test_outer(backend, rows, d, p):
    a, g, w = matrix(rows, d, 1), matrix(rows, p, 2), weights_of(rows)
    start = torch.randn(p, d, generator=generator(4))
    out = start.clone()
    assert outer_weighted_sum(a, g, w, out=out, backend=backend) is out
    scaled = g.double() * w.double().unsqueeze(1)
    expected = start.double() + scaled.t() @ a.double()
    assert_sum(out, expected, start.double().abs() + scaled.abs().t() @ a.double().abs(), rows)


@SHAPE
@pytest.mark.parametrize("with_factors", [False, True])
def test_diagonal(backend, rows, d, p, with_factors):
    g, w = matrix(rows, p * d, 2), weights_of(rows)
    factors = matrix(rows, p * d, 5) if with_factors else None
    start = torch.randn(p * d, generator=generator(4))
    product = g.double() if factors is None else g.double() * factors.double()
    expected = start.double() + w.double() @ product
    g[1::4] = float("nan")
    out = diagonal_weighted_sum(g, w, factors=factors, out=start.clone(), backend=backend)
    assert_sum(out, expected, start.double().abs() + w.double() @ product.abs(), 2)


@SHAPE
def test_scatter(backend, rows, d, p):
    g, w = matrix(rows, p, 2), weights_of(rows)
    ids = torch.randint(-1, d, (rows,), generator=generator(6))
    start = torch.randn(d, p, generator=generator(4))
    expected, magnitude = start.double(), start.double().abs()
    for n in range(rows):
        if ids[n] >= 0:
            expected[ids[n]] += w[n].double() * g[n].double()
            magnitude[ids[n]] += w[n].double() * g[n].double().abs()
    g[1::4], g[ids < 0] = float("inf"), float("nan")
    out = scatter_weighted_sum(ids, g, w, out=start.clone(), backend=backend)
    assert_sum(out, expected, magnitude, rows)


@SHAPE
def test_scaled_rows(backend, rows, d, p):
    x, w = matrix(rows, p, 2), weights_of(rows)
    expected = x * w.unsqueeze(1)
    x[1::4] = float("nan")
    assert torch.equal(scale_rows(x, w, backend=backend), expected)


def test_an_id_beyond_the_table_is_refused_and_nothing_written(backend):
    out = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="ids"):
        scatter_weighted_sum(torch.tensor([0, 3]), torch.ones(2, 2), torch.ones(2), out=out, backend=backend)
    assert not out.any()


def test_every_instruction_set_and_thread_count_gives_the_same_bits(restore_threads):
    rows, p = 257, 2100
    g, w = matrix(rows, p, 2), weights_of(rows)
    ids = torch.randint(0, 9, (rows,), generator=generator(6))
    found = []
    for name in available_isas():
        force_isa(name)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results = [scale_rows(g, w), scatter_weighted_sum(ids, g, w, out=torch.zeros(9, p))]
            for factors in (None, g.flip(0)):
                results.append(diagonal_weighted_sum(g, w, factors=factors, out=torch.zeros(p)))
            found.append(torch.cat([r.flatten() for r in results]))
    force_isa(None)
    assert all(torch.equal(found[0], other) for other in found[1:])
