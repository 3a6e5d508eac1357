"""Per-unit squared norms against float64 loops, in every backend, layout and instruction set."""

from __future__ import annotations

import pytest
import torch

from synthward.kernels import available_isas, diagonal_sq_norms, force_isa, outer_sq_norms, scatter_sq_norms
from tests.kernels.cases import (
    LAYOUTS,
    WIDTHS,
    assert_close,
    diagonal_gradient,
    generator,
    matrix,
    offsets_of,
    outer_gradient,
    row_count,
    scatter_gradient,
    segments,
    sq_norms,
)

LAYOUT = pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
WIDTH = pytest.mark.parametrize(("d", "p"), WIDTHS)
ORDINARY = ["rows", "pairs", "ragged"]


@LAYOUT
@WIDTH
def test_outer(backend, lengths, d, p):
    rows = row_count(lengths)
    a, g = matrix(rows, d, 1), matrix(rows, p, 2)
    norms = outer_sq_norms(a, g, offsets_of(lengths), backend=backend)
    expected = sq_norms([outer_gradient(a, g, unit) for unit in segments(lengths, rows)])
    assert_close(norms, expected)


@LAYOUT
@WIDTH
@pytest.mark.parametrize("with_factors", [False, True])
def test_diagonal(backend, lengths, d, p, with_factors):
    rows = row_count(lengths)
    grads, factors = matrix(rows, p * d, 3), matrix(rows, p * d, 4) if with_factors else None
    norms = diagonal_sq_norms(grads, offsets_of(lengths), factors=factors, backend=backend)
    expected = sq_norms([diagonal_gradient(grads, factors, unit) for unit in segments(lengths, rows)])
    assert_close(norms, expected)


@LAYOUT
@WIDTH
def test_scatter(backend, lengths, d, p):
    """`d` counts the rows of the table: few, so that ids repeat inside a unit; -1 is padding."""
    rows = row_count(lengths)
    ids = torch.randint(-1, d + 1, (rows,), generator=generator(5))
    grads = matrix(rows, p, 6)
    norms = scatter_sq_norms(ids, grads, offsets_of(lengths), backend=backend)
    expected = sq_norms([scatter_gradient(ids, grads, unit, d + 1) for unit in segments(lengths, rows)])
    assert_close(norms, expected)


def test_rows_that_cancel_leave_little(backend):
    """Where one row undoes another the norm is small against its terms, and must not come out negative."""
    a = matrix(1, 37, 7).repeat(4, 1)
    g = matrix(1, 19, 8).repeat(4, 1) * torch.tensor([1.0, -1.0, 1.0, -1.0]).unsqueeze(1)
    g[3] *= 1 - 2.0**-20
    offsets = torch.tensor([0, 4])
    exact = sq_norms([outer_gradient(a, g, slice(0, 4))])
    scale = 16 * a[0].double().square().sum() * g[0].double().square().sum()
    found = outer_sq_norms(a, g, offsets, backend=backend).double()
    assert (found - exact).abs() <= 2.0**-46 * scale
    assert_close(
        diagonal_sq_norms(g, offsets, backend=backend), sq_norms([diagonal_gradient(g, None, slice(0, 4))])
    )


@pytest.mark.parametrize("name", ORDINARY)
def test_out_accumulates(backend, name):
    lengths = LAYOUTS[name]
    rows = row_count(lengths)
    a, g, offsets = matrix(rows, 5, 1), matrix(rows, 6, 2), offsets_of(lengths)
    ids = torch.zeros(rows, dtype=torch.int64)
    first = outer_sq_norms(a, g, offsets, backend=backend)
    for more in (
        lambda out: outer_sq_norms(a, g, offsets, out=out, backend=backend),
        lambda out: diagonal_sq_norms(g, offsets, out=out, backend=backend),
        lambda out: scatter_sq_norms(ids, g, offsets, out=out, backend=backend),
    ):
        alone, both = more(torch.zeros_like(first)), more(first.clone())
        assert torch.equal(both, first + alone)
        assert more(both) is both


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["rows", "uniform", "ragged", "long"])
def test_a_unit_that_is_not_finite_is_alone(backend, bad, name):
    lengths = LAYOUTS[name]
    rows, width = row_count(lengths), 21
    offsets, units = offsets_of(lengths), segments(lengths, rows)
    victim = max(range(len(units)), key=lambda u: units[u].stop - units[u].start)
    a, g = matrix(rows, width, 1), matrix(rows, width, 2)
    ids = torch.arange(rows) % 3
    clean = [outer_sq_norms(a, g, offsets, backend=backend), diagonal_sq_norms(g, offsets, backend=backend)]
    clean.append(scatter_sq_norms(ids, g, offsets, backend=backend))
    g[units[victim].stop - 1, width - 1] = bad
    found = [outer_sq_norms(a, g, offsets, backend=backend), diagonal_sq_norms(g, offsets, backend=backend)]
    found.append(scatter_sq_norms(ids, g, offsets, backend=backend))
    others = torch.arange(len(units)) != victim
    for before, after in zip(clean, found, strict=True):
        assert not torch.isfinite(after[victim])
        assert torch.equal(before[others], after[others])


def test_large_and_small_values_neither_overflow_nor_vanish(isa):
    """|g|^2 alone is beyond float32 at both ends; the product is not."""
    a, g = torch.full((2, 9), 1e-25), torch.full((2, 9), 1e25)
    expected = torch.full((2,), 81.0, dtype=torch.float64)
    assert_close(outer_sq_norms(a, g), expected, 1e-6)
    assert_close(outer_sq_norms(a, g, torch.tensor([0, 2])), torch.tensor([4 * 81.0]), 1e-6)


@pytest.mark.parametrize("view", ["columns", "transposed", "every other row"])
def test_strided_inputs(view):
    """`auto` takes them to the reference; asked for by name, the compiled kernel refuses."""
    whole = matrix(24, 24, 9)
    g = {"columns": whole[:, 3:10], "transposed": whole.t(), "every other row": whole[::2]}[view]
    assert_close(diagonal_sq_norms(g), g.double().square().sum(1))
    assert_close(outer_sq_norms(g, g), g.double().square().sum(1) ** 2)
    with pytest.raises(ValueError, match="contiguous"):
        diagonal_sq_norms(g, backend="cpp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    g = torch.randn(6, 9, generator=generator()).to(dtype)
    offsets = torch.tensor([0, 2, 6])
    units = [slice(0, 2), slice(2, 6)]
    assert_close(outer_sq_norms(g, g, offsets), sq_norms([outer_gradient(g, g, unit) for unit in units]))
    with pytest.raises(ValueError, match="fp32"):
        outer_sq_norms(g, g, offsets, backend="cpp")


def test_every_instruction_set_and_thread_count_gives_the_same_bits(restore_threads):
    """Enough units and columns that the work is split."""
    lengths = [1 + (i * 7) % 13 for i in range(600)]
    rows, offsets = sum(lengths), offsets_of(lengths)
    a, g = matrix(rows, 67, 1), matrix(rows, 131, 2)
    ids = torch.randint(0, 5, (rows,), generator=generator())
    found = []
    for name in available_isas():
        force_isa(name)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results = [outer_sq_norms(a, g), outer_sq_norms(a, g, offsets), diagonal_sq_norms(g, offsets)]
            results.append(diagonal_sq_norms(g, offsets, factors=g.flip(0)))
            results.append(scatter_sq_norms(ids, g, offsets))
            found.append(torch.cat(results))
    force_isa(None)
    assert all(torch.equal(found[0], other) for other in found[1:])
