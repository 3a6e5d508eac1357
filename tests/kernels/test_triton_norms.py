"""Norms of the outer family in Triton with operands of half precision, and what of them is added up in fp32.

The oracle is the gradient of each unit in float64; the bound on the error is the one that the engine adds to a norm.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels._triton import INTERPRETED
from synthward.kernels.outer import triton_impl
from tests.kernels.cases import matrix, offsets_of, outer_gradient, segments, sq_norms

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
# Of one length, and of such as take blocks of 16, 64 and 128 rows.
LENGTHS = {
    "few rows": [3, 0, 16, 1, 17],
    "a block": [64, 64],
    "across blocks": [65, 1, 63, 150],
    "long": [300, 260, 257],
}
UNIT_ROUNDOFF = 2.0**-24


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("d", "p"), [(17, 31), (48, 16), (1, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["gram", "tile"])
def test_norms(method, dtype, d, p, lengths):
    # Of one sign: nothing cancels, so that each pair of rows shows in the norm.
    rows = sum(lengths)
    a, g = matrix(rows, d, 1).abs().to(dtype), matrix(rows, p, 2).abs().to(dtype)
    units = segments(lengths, rows)
    found, sums = torch.zeros(2, len(lengths), device=DEVICE)
    run = triton_impl.gram_norms if method == "gram" else triton_impl.tile_norms
    run(a.to(DEVICE), g.to(DEVICE), offsets_of(lengths).to(DEVICE), found, sums)
    exact = sq_norms([outer_gradient(a, g, unit) for unit in units])
    of_rows = a.double().norm(dim=1) * g.double().norm(dim=1)
    row_sums = torch.stack([of_rows[unit].sum() for unit in units])
    chain = max(d, p) + 4 if method == "gram" else max(lengths)
    bound = (2 * chain + 4) * UNIT_ROUNDOFF * row_sums.square() + 8 * UNIT_ROUNDOFF * exact + 1e-30
    assert ((found.cpu().double() - exact).abs() <= bound).all()
    torch.testing.assert_close(sums.cpu().double(), row_sums, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("d", "p"), [(128, 128), (16, 200), (31, 7)])
def test_squares_are_added_up_within_eight_roundings(d, p):
    """Of the gradient as it was formed: 16 squares at a time in fp32, the rest in fp64. The clip factor has room for
    more than that."""
    lengths = [3, 40, 2, 1]
    a, g = matrix(46, d, 3), matrix(46, p, 4)
    found, grads = torch.zeros(4, device=DEVICE), torch.zeros(4, p * d, device=DEVICE)
    triton_impl.tile_norms(a.to(DEVICE), g.to(DEVICE), offsets_of(lengths).to(DEVICE), found, None, grads)
    exact = grads.double().square().sum(1)
    assert ((found.double() / exact - 1.0).abs() <= 8 * UNIT_ROUNDOFF).all()


def test_gradients_of_half_precision_have_their_own_width():
    """They are not padded."""
    a, g = matrix(20, 5, 1).bfloat16(), matrix(20, 7, 2).bfloat16()
    found, grads = torch.zeros(2, device=DEVICE), torch.full((2, 35), float("nan"), device=DEVICE)
    triton_impl.tile_norms(a.to(DEVICE), g.to(DEVICE), offsets_of([12, 8]).to(DEVICE), found, None, grads)
    for unit, row in zip(segments([12, 8], 20), grads.cpu().double(), strict=True):
        exact = torch.from_numpy(outer_gradient(a, g, unit)).flatten()
        torch.testing.assert_close(row, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["gram", "tile"])
def test_what_is_not_finite_stays_in_its_unit(method, bad):
    lengths = [130, 64, 0, 70, 1]
    a, g = matrix(265, 20, 1).bfloat16(), matrix(265, 33, 2).bfloat16()
    run = triton_impl.gram_norms if method == "gram" else triton_impl.tile_norms
    norms = []
    for value in (0.5, bad):
        a[150, 3] = value
        norms.append(torch.zeros(5, device=DEVICE))
        run(a.to(DEVICE), g.to(DEVICE), offsets_of(lengths).to(DEVICE), norms[-1])
    others = torch.arange(5) != 1
    assert not norms[1][1].isfinite()
    assert torch.equal(norms[0][others], norms[1][others])


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e-38])
def test_pairs_whose_products_underflow_are_not_taken_for_nothing(scale):
    """Of one operand, of both, and as products of the two."""
    a, g = torch.full((40, 9), scale), torch.full((40, 9), 1e10)
    for x, y in ((a, g), (g, a), (a, a)):
        exact = sq_norms([outer_gradient(x, y, slice(0, 40))])
        found = torch.zeros(1, device=DEVICE)
        triton_impl.gram_norms(x.to(DEVICE), y.to(DEVICE), offsets_of([40]).to(DEVICE), found)
        assert found.cpu().double() >= exact * (1 - 1e-5) - 2.0**-149


def test_shapes_follow_from_shapes():
    small, long = triton_impl.gram_blocks(2, 64, 1), triton_impl.gram_blocks(2, 4096, 8)
    assert (small.rows, long.rows, triton_impl.gram_blocks(4, 4096, 8).rows) == (64, 128, 64)
    generous = triton_impl.gradient_blocks(2, 1024, 1024)
    assert (generous.p, generous.d, generous.warps) == (128, 128, 8)
    assert triton_impl.gradient_blocks(2, 5, 1024).d == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["rank-1", "gram", "tile"])
def test_rows_of_bfloat16_beyond_a_size_count_as_infinite(method, dtype):
    """Of those what bfloat16 can not hold of a scaled gradient would show in the sum."""
    a, g = torch.ones(6, 4, dtype=dtype), torch.full((6, 3), 2.0**-100, dtype=dtype)
    a[2, 1], a[4, 3] = 2.0**63, 2.0**65
    units = 6 if method == "rank-1" else 3
    found, sums = torch.zeros(2, units, device=DEVICE)
    if method == "rank-1":
        triton_impl.rank1_norms(a.to(DEVICE), g.to(DEVICE), found, sums)
    else:
        run = triton_impl.gram_norms if method == "gram" else triton_impl.tile_norms
        run(a.to(DEVICE), g.to(DEVICE), offsets_of([2, 2, 2]).to(DEVICE), found, sums)
    at = 4 if method == "rank-1" else 2
    assert sums.isinf().tolist() == [dtype == torch.bfloat16 and unit == at for unit in range(units)]
