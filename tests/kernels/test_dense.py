"""Outer family by dense products, against a plain float64 loop over the rows of each unit.

Operands of small whole numbers make every product and sum exact in float32, whatever the order of the additions: then
a kernel is right to the last bit or wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synthward.engine.clipping import UNIT_ROUNDOFF, formed_error, product_error
from synthward.kernels import (
    SUM_BLOCK,
    available_isas,
    outer_norms,
    outer_sum,
    outer_unit_grads,
    rank1_norms,
    scale_rows,
    sum_chain,
)
from tests.kernels.cases import executing, generator, offsets_of, outer_gradient, segments, sq_norms, whole

BACKENDS = ["reference", *available_isas()]
METHODS = ["gram", "tile"]
# Around vectors (4 to 16 lanes), panels (8 to 32), blocks of rows (128) and pieces of the output (256).
EDGES = [0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 33, 64, 67, 127, 128, 129, 131]
FLOATS = [1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-12, 0.1, 1.0 / 3.0, 1.9]


def lengths_of(a: Tensor, g: Tensor, units: list[slice]) -> Tensor:
    """``sum_n |a_n| |g_n|`` of each unit, float64."""
    each = a.double().norm(dim=1) * g.double().norm(dim=1)
    return torch.stack([each[unit].sum() for unit in units]) if units else torch.zeros(0).double()


def gradients(a: Tensor, g: Tensor, units: list[slice]) -> list[np.ndarray]:
    return [outer_gradient(a, g, unit) for unit in units]


def assert_norms(found: Tensor, exact: Tensor) -> None:
    """To the last bit, but for the allowance for underflow."""
    assert ((found - exact.float()).abs() <= 1e-27).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Rows of each unit, d, p and a seed; at most about 400 rows."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 17, 31, 127, 128, 129]), max_size=5))
    while sum(lengths) > 400:
        lengths.pop()
    return lengths, draw(st.sampled_from(EDGES)), draw(st.sampled_from(EDGES)), draw(st.integers(0, 10**6))


@settings(max_examples=200, deadline=None)
@given(problem=problems(), backend=st.sampled_from(BACKENDS), method=st.sampled_from(METHODS))
def test_norms_of_any_shape(problem, backend, method):
    lengths, d, p, seed = problem
    rows, offsets, units = sum(lengths), offsets_of(lengths), segments(lengths, sum(lengths))
    a, g = whole(rows, d, seed), whole(rows, p, seed + 1)
    exact, sums = sq_norms(gradients(a, g, units)), lengths_of(a, g, units)
    with executing(backend) as chosen:
        found, row_sums = torch.zeros(len(lengths)), torch.zeros(len(lengths))
        outer_norms(a, g, offsets, found, row_sums, method=method, backend=chosen)
    assert_norms(found, exact)
    torch.testing.assert_close(row_sums.double(), sums, rtol=2.0**-21, atol=0.0)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), backend=st.sampled_from(BACKENDS))
def test_gradients_of_any_shape(problem, backend):
    lengths, d, p, seed = problem
    rows, offsets, units = sum(lengths), offsets_of(lengths), segments(lengths, sum(lengths))
    a, g = whole(rows, d, seed), whole(rows, p, seed + 1)
    expected = gradients(a, g, units)
    with executing(backend) as chosen:
        grads, found, row_sums = outer_unit_grads(a, g, offsets, backend=chosen)
    assert grads.shape == (len(lengths), d * p)
    for mine, theirs in zip(grads, expected, strict=True):
        assert torch.equal(mine.view(p, d), torch.from_numpy(theirs).float())
    assert torch.equal(found, sq_norms(expected).float())
    torch.testing.assert_close(row_sums.double(), lengths_of(a, g, units), rtol=2.0**-21, atol=0.0)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from(EDGES),
    d=st.sampled_from(EDGES),
    p=st.sampled_from(EDGES),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 10**6),
)
def test_rank1_norms_of_any_shape(rows, d, p, backend, seed):
    a, g = whole(rows, d, seed), whole(rows, p, seed + 1)
    units = segments(None, rows)
    with executing(backend) as chosen:
        found, row_sums = torch.ones(rows), torch.ones(rows)
        squares = rank1_norms(a, g, found, row_sums, backend=chosen)
    exact = sq_norms(gradients(a, g, units))
    assert torch.equal(found, 1.0 + exact.float())
    torch.testing.assert_close(row_sums.double(), 1.0 + exact.sqrt(), rtol=2.0**-22, atol=0.0)
    assert torch.equal(squares, g.square().sum(1))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.sampled_from([*EDGES, 255, 257]),
    d=st.sampled_from([*EDGES, 257, 300]),
    p=st.sampled_from([*EDGES, 257, 300]),
    with_bias=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 10**6),
)
def test_sums_of_any_shape(rows, d, p, with_bias, backend, seed):
    """Weights, bias and what stood in `out`; rows of weight zero hold what is no number."""
    a, g, start = whole(rows, d, seed), whole(rows, p, seed + 1), whole(p, d, seed + 2, most=50)
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0])[
        torch.randint(0, 5, (rows,), generator=generator(seed))
    ]
    scaled = g.double() * weights.double().unsqueeze(1)
    expected, expected_bias = start.double() + scaled.t() @ a.double(), 7.0 + scaled.sum(0)
    a[weights == 0], g[weights == 0] = torch.nan, torch.inf
    out, bias = start.clone(), torch.full((p,), 7.0) if with_bias else None
    with executing(backend) as chosen:
        outer_sum(a, g, weights, out=out, bias=bias, backend=chosen)
    assert torch.equal(out, expected.float())
    assert bias is None or torch.equal(bias, expected_bias.float())


@pytest.mark.parametrize("rows", [1024, 1025, 3000, 5001])
def test_a_long_sum_is_cut_by_rows(backend, rows):
    """Several parts of a small output, each with a bias of its own."""
    a, g = whole(rows, 37, 1, most=2), whole(rows, 21, 2, most=2)
    weights = torch.tensor([0.5, 1.0, 0.0])[torch.arange(rows) % 3]
    scaled = g.double() * weights.double().unsqueeze(1)
    a[2::3], g[2::3] = torch.inf, torch.nan
    out, bias = torch.ones(21, 37), torch.ones(21)
    outer_sum(a, g, weights, out=out, bias=bias, backend=backend)
    kept = torch.where(weights.unsqueeze(1) == 0, torch.zeros_like(a), a)
    assert torch.equal(out, (1.0 + scaled.t() @ kept.double()).float())
    assert torch.equal(bias, (1.0 + scaled.sum(0)).float())


@pytest.mark.parametrize("method", METHODS)
def test_norms_are_added_to_what_is_there(backend, method):
    a, g, offsets = whole(9, 5, 1), whole(9, 6, 2), torch.tensor([0, 0, 4, 9])
    first, sums = torch.zeros(3), torch.zeros(3)
    outer_norms(a, g, offsets, first, sums, method=method, backend=backend)
    found, row_sums = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0, 2.0, 4.0])
    outer_norms(a, g, offsets, found, row_sums, method=method, backend=backend)
    assert torch.equal(found, first + torch.tensor([3.0, 5.0, 7.0]))
    torch.testing.assert_close(row_sums, sums + torch.tensor([1.0, 2.0, 4.0]), rtol=2.0**-21, atol=0.0)


def test_weights_of_zero_alone_leave_everything_as_it_was(backend):
    out, bias = torch.randn(4, 3, generator=generator()), torch.randn(4, generator=generator(1))
    before, bias_before = out.clone(), bias.clone()
    a, g = torch.full((5, 3), torch.nan), torch.full((5, 4), torch.inf)
    outer_sum(a, g, torch.zeros(5), out=out, bias=bias, backend=backend)
    assert torch.equal(out, before) and torch.equal(bias, bias_before)
    assert torch.equal(scale_rows(a, torch.zeros(5), backend=backend), torch.zeros(5, 3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["activations", "output_grads"])
@pytest.mark.parametrize("at", ["first", "last"])
def test_what_is_not_finite_stays_in_its_unit(backend, bad, side, at):
    lengths = [3, 130, 0, 1, 17]
    offsets, units = offsets_of(lengths), segments(lengths, sum(lengths))
    victim, others = 1, torch.tensor([True, False, True, True, True])
    a, g = whole(sum(lengths), 21, 1), whole(sum(lengths), 35, 2)

    def results() -> list[Tensor]:
        found = []
        for method in METHODS:
            norms, sums = torch.zeros(5), torch.zeros(5)
            outer_norms(a, g, offsets, norms, sums, method=method, backend=backend)
            found += [norms, sums]
        return [*found, *outer_unit_grads(a, g, offsets, backend=backend)]

    clean = results()
    row = units[victim].start if at == "first" else units[victim].stop - 1
    (a if side == "activations" else g)[row, 0 if at == "first" else -1] = bad
    for before, after in zip(clean, results(), strict=True):
        assert not torch.isfinite(after[victim]).all()
        assert torch.equal(before[others], after[others])
    norms, sums = torch.zeros(len(a)), torch.zeros(len(a))
    rank1_norms(a, g, norms, sums, backend=backend)
    assert torch.isfinite(norms).logical_not().nonzero().flatten().tolist() == [row]
    assert torch.isfinite(sums).logical_not().nonzero().flatten().tolist() == [row]


def test_the_number_of_threads_changes_no_bit(isa, restore_threads):
    lengths = [1 + (i * 29) % 150 for i in range(40)]
    rows, offsets = sum(lengths), offsets_of(lengths)
    a, g = torch.randn(rows, 67, generator=generator(1)), torch.randn(rows, 131, generator=generator(2))
    weights, found = torch.rand(rows, generator=generator(3)), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results = list(outer_unit_grads(a, g, offsets))
        for method in METHODS:
            norms, sums = torch.zeros(len(lengths)), torch.zeros(len(lengths))
            outer_norms(a, g, offsets, norms, sums, method=method)
            results += [norms, sums]
        norms, sums = torch.zeros(rows), torch.zeros(rows)
        results += [rank1_norms(a, g, norms, sums), norms, sums]
        for columns in (g, g[:, :7].contiguous()):  # the second sum is small, so that its rows are cut
            out, bias = torch.zeros(columns.shape[1], 67), torch.zeros(columns.shape[1])
            outer_sum(a, columns, weights, out=out, bias=bias)
            results += [out, bias]
        found.append(torch.cat([r.flatten() for r in results]))
    assert all(torch.equal(found[0], other) for other in found[1:])


# The bound on rounding


def assert_within(found: Tensor, exact: Tensor, error: Tensor) -> None:
    """The squared norm is off by no more than `error` and the rounding of the result itself."""
    off = (found.double() - exact).abs()
    assert (off <= error.double() + UNIT_ROUNDOFF * exact).all(), float((off / error.double()).max())


@pytest.mark.parametrize("value", FLOATS)
@pytest.mark.parametrize("width", [1, 127, 128, 129, 1000, 8193])
def test_products_stay_within_their_bound(backend, value, width):
    """All terms positive and alike: roundings go one way for long stretches instead of cancelling."""
    rows = 3
    a, g = torch.full((rows, width), value), torch.full((rows, 2), value)
    a[1] *= 1e4
    exact = sq_norms([outer_gradient(a, g, slice(0, rows))])
    found, sums = torch.zeros(1), torch.zeros(1)
    outer_norms(a, g, torch.tensor([0, rows]), found, sums, method="gram", backend=backend)
    assert_within(found, exact, product_error(sum_chain(width, compiled=backend == "cpp"), sums))


@pytest.mark.parametrize("value", FLOATS)
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000, 8193])
def test_gradients_stay_within_their_bound(backend, value, rows):
    a, g = torch.full((rows, 3), value), torch.full((rows, 2), value)
    a[:, 1] *= 1e4
    exact = sq_norms([outer_gradient(a, g, slice(0, rows))])
    chain = sum_chain(rows, compiled=backend == "cpp")
    found, sums = torch.zeros(1), torch.zeros(1)
    outer_norms(a, g, torch.tensor([0, rows]), found, sums, method="tile", backend=backend)
    assert_within(found, exact, formed_error(chain, found, sums))
    _, found, sums = outer_unit_grads(a, g, torch.tensor([0, rows]), backend=backend)
    assert_within(found, exact, formed_error(chain, found, sums))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1e-6, 1.0]),
    sign=st.booleans(),
    method=st.sampled_from(METHODS),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 10**6),
)
def test_bound_over_random_operands(rows, width, spread, sign, method, backend, seed):
    """`sign`: rows of alternating sign, whose gradients cancel."""
    a = 1.0 / 3.0 + spread * torch.randn(rows, width, generator=generator(seed))
    g = 0.1 + spread * torch.randn(rows, 3, generator=generator(seed + 1))
    if sign:
        g[1::2] *= -1.0
    exact, found, sums = sq_norms([outer_gradient(a, g, slice(0, rows))]), torch.zeros(1), torch.zeros(1)
    with executing(backend) as chosen:
        outer_norms(a, g, torch.tensor([0, rows]), found, sums, method=method, backend=chosen)
    if method == "gram":
        error = product_error(sum_chain(max(width, 3), compiled=chosen == "cpp"), sums)
    else:
        error = formed_error(sum_chain(rows, compiled=chosen == "cpp"), found, sums)
    assert_within(found, exact, error)


def test_one_long_chain_of_additions_would_break_the_bound():
    """So the bound would notice a kernel that does not cut its sums into blocks."""
    width = 1 << 17
    a, g = torch.full((1, width), 0.1), torch.ones(1, 1)
    square = np.cumsum(np.full(width, np.float32(0.1)) ** 2, dtype=np.float32)[-1]
    exact, found, sums = a.double().square().sum(), torch.zeros(1), torch.zeros(1)
    outer_norms(a, g, torch.tensor([0, 1]), found, sums, method="gram")
    error = float(product_error(sum_chain(width, compiled=True), sums))
    assert abs(float(square) - float(exact)) > 4.0 * error
    assert abs(float(found) - float(exact)) <= error + UNIT_ROUNDOFF * float(exact)


@pytest.mark.parametrize(("small", "large"), [(1e-23, 1e18), (3e-20, 1e19), (1e-30, 1e10)])
@pytest.mark.parametrize("side", ["activations", "output_grads"])
def test_underflow_is_covered(backend, small, large, side):
    """The squares of one operand vanish in float32; its products with the other do not."""
    a, g = torch.full((40, 7), small), torch.full((40, 5), large)
    if side == "output_grads":
        a, g = g, a
    exact = sq_norms([outer_gradient(a, g, slice(0, 40))])
    for method in METHODS:
        found, sums = torch.zeros(1), torch.zeros(1)
        outer_norms(a, g, torch.tensor([0, 40]), found, sums, method=method, backend=backend)
        assert found.double() >= exact * (1.0 - 1e-5)


def test_chains():
    assert [sum_chain(n, compiled=True) for n in (0, 1, 128, 129, 256, 257)] == [0, 2, 129, 130, 130, 131]
    assert [sum_chain(n, compiled=False) for n in (0, 1, 129)] == [0, 1, 129]
    assert SUM_BLOCK == 128


# What is refused

A, G, W = torch.ones(4, 3), torch.ones(4, 2), torch.ones(4)
UNITS = torch.tensor([0, 1, 4])


def norms_with(
    a: Tensor = A,
    g: Tensor = G,
    offsets: Tensor = UNITS,
    out: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    out, sums = torch.zeros(2) if out is None else out, torch.zeros(2) if sums is None else sums
    outer_norms(a, g, offsets, out, sums, method="gram")


REFUSED: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, "activations", lambda: norms_with(a=W)),
    (TypeError, "activations", lambda: norms_with(a=A.long())),
    (ValueError, "output_grads", lambda: norms_with(g=G[:3])),
    (TypeError, "offsets", lambda: norms_with(offsets=UNITS.int())),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([0, 3, 1, 4]))),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([0, 3]))),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([1, 4]))),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([0, 5]))),
    (ValueError, "offsets", lambda: norms_with(offsets=UNITS.unsqueeze(0))),
    (ValueError, "sq_norms", lambda: norms_with(out=torch.zeros(3))),
    (TypeError, "sq_norms", lambda: norms_with(out=torch.zeros(2).double())),
    (ValueError, "row_sums", lambda: norms_with(sums=torch.zeros(2, 1))),
    (ValueError, "method", lambda: outer_norms(A, G, UNITS, torch.zeros(2), torch.zeros(2), method="fast")),
    (ValueError, "offsets", lambda: outer_unit_grads(A, G, torch.tensor([0, 3]))),
    (ValueError, "output_grads", lambda: outer_unit_grads(A, G[:1], UNITS)),
    (ValueError, "output_grads", lambda: rank1_norms(A, G[:3], torch.zeros(4), torch.zeros(4))),
    (ValueError, "sq_norms", lambda: rank1_norms(A, G, torch.zeros(3), torch.zeros(4))),
    (ValueError, "row_sums", lambda: rank1_norms(A, G, torch.zeros(4), torch.zeros(3))),
    (ValueError, "row_weights", lambda: outer_sum(A, G, W[:3], out=torch.zeros(2, 3))),
    (TypeError, "row_weights", lambda: outer_sum(A, G, W.double(), out=torch.zeros(2, 3))),
    (ValueError, "out", lambda: outer_sum(A, G, W, out=torch.zeros(3, 2))),
    (ValueError, "bias", lambda: outer_sum(A, G, W, out=torch.zeros(2, 3), bias=torch.zeros(3))),
]


@pytest.mark.parametrize(("error", "name", "call"), REFUSED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused(error, name, call, backend, monkeypatch):
    """The same with and without the compiled kernels: the check comes before the choice."""
    if backend == "reference":
        monkeypatch.setattr("synthward.kernels._select._fits", lambda *_: False)
    with pytest.raises(error, match=rf"^{name}: "):
        call()


def test_what_is_not_contiguous_is_refused_by_name_and_taken_by_choice():
    a = torch.randn(3, 8, generator=generator()).t()[:4]
    sums = torch.zeros(2)
    with pytest.raises(ValueError, match="contiguous"):
        outer_norms(a, G, UNITS, torch.zeros(2), sums, method="gram", backend="cpp")
    with pytest.raises(ValueError, match="contiguous"):
        outer_sum(a, G, W, out=torch.zeros(2, 3), backend="cpp")
    found, out = torch.zeros(2), torch.zeros(3, 2).t()
    outer_norms(a, G, UNITS, found, sums, method="gram")
    exact = sq_norms([outer_gradient(a, G, unit) for unit in (slice(0, 1), slice(1, 4))])
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)
    outer_sum(a, G, W, out=out)
    torch.testing.assert_close(out, G.t() @ a)


def test_outputs_may_not_overlap():
    memory = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="overlaps"):
        outer_norms(memory, G, UNITS, memory.view(-1)[:2], torch.zeros(2), method="gram")
    with pytest.raises(ValueError, match="row_sums: overlaps"):
        outer_norms(A, G, UNITS, memory.view(-1)[:2], memory.view(-1)[1:3], method="tile")
    with pytest.raises(ValueError, match="bias: overlaps"):
        outer_sum(A, G, W, out=memory[:2], bias=memory.view(-1)[3:5])
    assert not memory.any()
