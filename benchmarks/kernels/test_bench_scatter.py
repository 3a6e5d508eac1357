"""Embeddings at the shapes of gpt and ehr (benchmarks/models.py), against torch's sort and its scattered addition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.cases import assert_near, best_executors, offsets_of
from synthward.kernels import scatter_sq_norms, scatter_weighted_sum

pytestmark = best_executors

SHAPES = [(32, 128, 384, 2048), (64, 64, 256, 20000)]


@pytest.mark.parametrize(("units", "rows", "width", "table"), SHAPES)
def test_scatter_sq_norms(measure, executor, units, rows, width, table):
    ids, g = torch.randint(0, table, (units * rows,)), torch.randn(units * rows, width)
    offsets, keys = offsets_of(units, rows), torch.arange(units).repeat_interleave(rows) * table + ids

    def by_torch(grads: Tensor = g) -> Tensor:
        # A row for each pair of unit and id that occurs.
        pairs, place = torch.unique(keys, return_inverse=True)
        sums = grads.new_zeros(len(pairs), width)
        sums.scatter_add_(0, place.unsqueeze(1).expand_as(grads), grads)
        squares = torch.linalg.vector_norm(sums, dim=1).square()
        return grads.new_zeros(units).scatter_add_(0, pairs // table, squares)

    call = by_torch if executor == "torch" else (lambda: scatter_sq_norms(ids, g, offsets))
    norms = measure(call, bytes=g.nbytes + ids.nbytes + 4 * units)
    assert_near(norms, by_torch(g.double()))


@pytest.mark.parametrize(("rows", "width", "table"), [(u * t, width, table) for u, t, width, table in SHAPES])
def test_scatter_weighted_sum(measure, executor, rows, width, table):
    ids, g, w = torch.randint(0, table, (rows,)), torch.randn(rows, width), torch.rand(rows)
    out = torch.zeros(table, width)

    def by_torch() -> None:
        out.scatter_add_(0, ids.unsqueeze(1).expand_as(g), g * w.unsqueeze(1))

    call = by_torch if executor == "torch" else (lambda: scatter_weighted_sum(ids, g, w, out=out))
    # Rows of the table that occur are read and written.
    traffic = g.nbytes + ids.nbytes + w.nbytes + 8 * len(ids.unique()) * width
    measure(call, clear=(out,), bytes=traffic)
    assert_near(out, torch.zeros(table, width).double().index_add_(0, ids, g.double() * w.unsqueeze(1)))
