"""Triton kernels of convolutions: on the GPU if there is one, else in Triton's interpreter (tests/conftest.py).

As in test_conv.py, operands of small whole numbers make every product and sum exact: right to the last bit, or wrong.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.engine.clipping import UNIT_ROUNDOFF, formed_error
from synthward.engine.layout import Layout
from synthward.engine.rules import conv as rule
from synthward.kernels import SUM_BLOCK, ConvShape, conv_norms, conv_sum, conv_unit_grads, sum_chain
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.conv import triton_impl
from tests.kernels.cases import generator, offsets_of, sq_norms, whole
from tests.kernels.test_conv import (
    EDGES,
    LAYOUTS,
    gradient,
    must,
    place_lengths,
    rows_of,
    shape_of,
    shapes,
    whole_rows,
)
from tests.kernels.test_triton import Recorder

# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
WAITING = {"item", "_local_scalar_dense", "nonzero", "_to_copy", "equal", "masked_select"}
EVERYTHING = must(
    shape_of(2, 3, 4, (4, 6, 7), (3, 2, 4), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1))
)
PADDED = must(shape_of(2, 3, 5, (1, 4, 5), (1, 3, 3), padding=(0, 1, 1)))
# The kernel stands out over the image before its first place, and ends within it.
BEFORE = must(shape_of(1, 2, 3, (1, 1, 8), (1, 1, 2), stride=(1, 1, 3), padding=(0, 0, 1)))


def norms(
    v: ConvShape, x: Tensor, g: Tensor, offsets: Tensor, order: Tensor | None = None, **how: str
) -> tuple[Tensor, Tensor]:
    """Squared norms and row sums, added to ones."""
    found, row_sums = torch.ones(2, len(offsets) - 1, device=DEVICE)
    there = None if order is None else order.to(DEVICE)
    arguments = (x.to(DEVICE), g.to(DEVICE), offsets.to(DEVICE), found, row_sums)
    conv_norms(v, *arguments, order=there, backend="triton", **how)
    return found.cpu(), row_sums.cpu()


def unit_grads(v: ConvShape, x: Tensor, g: Tensor, offsets: Tensor, order: Tensor | None = None) -> Tensor:
    there = None if order is None else order.to(DEVICE)
    arguments = (x.to(DEVICE), g.to(DEVICE), offsets.to(DEVICE))
    return conv_unit_grads(v, *arguments, order=there, backend="triton").cpu()


def weighted_sum(v: ConvShape, x: Tensor, g: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    out = start.clone().to(DEVICE)
    conv_sum(v, x.to(DEVICE), g.to(DEVICE), weights.to(DEVICE), out=out, backend="triton")
    return out.cpu()


def assert_units(v: ConvShape, lengths: list[int], seed: int, order: Tensor | None = None) -> None:
    x, g = whole_rows(v, sum(lengths), seed)
    offsets, units = offsets_of(lengths), rows_of(lengths, order)
    assert offsets is not None
    expected = [gradient(v, x, g, unit) for unit in units]
    found, row_sums = norms(v, x, g, offsets, order)
    assert torch.equal(found, 1.0 + sq_norms(expected).float())
    lengths_at = place_lengths(v, x, g)
    least = torch.stack([lengths_at[unit].sum() for unit in units])
    assert (row_sums.double() >= (1.0 + least) * (1.0 - 1e-6)).all()
    grads = unit_grads(v, x, g, offsets, order)
    for mine, theirs in zip(grads, expected, strict=True):
        assert torch.equal(mine, torch.from_numpy(theirs).float().flatten())


def assert_sum(v: ConvShape, rows: int, seed: int) -> None:
    """Weights, and what stood in `out`; images of weight zero hold what is no number."""
    x, g = whole_rows(v, rows, seed)
    weights = torch.tensor([0.0, 0.25, 1.0, 2.0])[torch.randint(0, 4, (rows,), generator=generator(seed))]
    start = whole(1, v.numel, seed + 2, most=50)[0]
    scaled = g * weights.unsqueeze(1)
    expected = start.double() + torch.from_numpy(gradient(v, x, scaled, list(range(rows)))).flatten()
    x[weights == 0], g[weights == 0] = torch.nan, torch.inf
    assert torch.equal(weighted_sum(v, x, g, weights, start), expected.float())


@settings(max_examples=30, deadline=None)
@given(
    v=shapes(),
    lengths=st.sampled_from(LAYOUTS),
    shuffled=st.booleans(),
    rows=st.sampled_from([0, 1, 2, 5]),
    seed=st.integers(0, 10**6),
)
def test_any_shape(v, lengths, shuffled, rows, seed):
    order = torch.randperm(sum(lengths), generator=generator(seed)) if shuffled else None
    assert_units(v, lengths, seed, order)
    assert_sum(v, rows, seed)


@pytest.mark.parametrize(
    "v", [*EDGES, PADDED, BEFORE], ids=lambda v: f"{v.groups}x{v.channels}-{v.outputs} {v.size} {v.kernel}"
)
def test_edges(v):
    assert_units(v, [1, 0, 2], seed=1)
    assert_sum(v, 3, seed=1)


@pytest.mark.parametrize("terms", [SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 3 * SUM_BLOCK])
def test_chains_end_between_images_and_within(terms):
    assert_units(must(shape_of(1, 1, 2, (1, 1, terms), (1, 1, 1))), [1, 1], seed=2)
    assert_units(must(shape_of(1, 1, 2, (1, 1, 1), (1, 1, 1))), [terms, 1], seed=2)


def test_bounds_of_images_that_several_programs_read():
    v = must(shape_of(1, 1, 2, (1, 1, 2 * triton_impl._SQUARES + 5), (1, 1, 3), stride=(1, 1, 1000)))
    x, g = whole_rows(v, 3, 1)
    expected = (v.taps * x.double().square().sum(1) * g.double().square().sum(1)).sqrt()
    _, row_sums = norms(v, x, g, torch.tensor([0, 1, 3]))
    assert torch.equal(row_sums, (1.0 + torch.stack([expected[0], expected[1] + expected[2]])).float())


@pytest.mark.parametrize("places", [1, 3, 65])
def test_a_sum_in_several_pieces(places):
    """Their ends are within images, and the last one is shorter."""
    v = must(shape_of(2, 2, 3, (1, 1, places), (1, 1, 3), padding=(0, 0, 1)))
    rows = triton_impl._TERMS * 5 // (2 * places)
    assert_sum(v, rows, seed=3)


@pytest.mark.parametrize(("units", "rows"), [(0, 0), (3, 0)])
def test_nothing_to_add(units, rows):
    v, offsets = PADDED, torch.zeros(units + 1, dtype=torch.int64)
    x, g = whole_rows(v, rows, 1)
    found, row_sums = norms(v, x, g, offsets)
    assert found.tolist() == row_sums.tolist() == [1.0] * units
    assert torch.equal(unit_grads(v, x, g, offsets), torch.zeros(units, v.numel))
    assert weighted_sum(v, x, g, torch.ones(rows), torch.ones(v.numel)).eq(1.0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["images", "output_grads"])
@pytest.mark.parametrize("row", [1, 3])
def test_what_is_not_finite_stays_in_its_unit(bad, side, row):
    v, lengths, others = PADDED, [1, 3, 0, 2], torch.tensor([True, False, True, True])
    x, g = whole_rows(v, 6, 1)
    offsets = offsets_of(lengths)
    assert offsets is not None
    clean = [*norms(v, x, g, offsets), unit_grads(v, x, g, offsets)]
    (x if side == "images" else g)[row, 0 if row == 1 else -1] = bad
    for before, after in zip(clean, [*norms(v, x, g, offsets), unit_grads(v, x, g, offsets)], strict=True):
        assert not torch.isfinite(after[1]).all()
        assert torch.equal(before[others], after[others])


def test_the_same_input_gives_the_same_bits():
    v, lengths = EVERYTHING, [1, 3, 0, 2]
    rows, found = sum(lengths), []
    x, g = (torch.randn(rows, n, generator=generator(n)) for n in (v.image_numel, v.output_numel))
    weights, offsets = torch.rand(rows, generator=generator(3)), offsets_of(lengths)
    assert offsets is not None
    for _ in range(2):
        results = [*norms(v, x, g, offsets), unit_grads(v, x, g, offsets)]
        results.append(weighted_sum(v, x, g, weights, torch.zeros(v.numel)))
        found.append(torch.cat([result.flatten() for result in results]))
    assert torch.equal(*found)


# The bound on rounding

FLOATS = [1.0 + 2.0**-23, 0.1, 1.9]
LONG = must(shape_of(1, 1, 1, (1, 1, 1500), (1, 1, 3)))
MANY = must(shape_of(2, 2, 2, (1, 1, 130), (1, 1, 2)))


@pytest.mark.parametrize("value", FLOATS)
@pytest.mark.parametrize(
    ("v", "layout"),
    [(LONG, Layout.uniform(2, 1)), (MANY, Layout.ragged(torch.tensor([0, 40, 41])))],
    ids=["places", "images"],
)
def test_norms_stay_within_the_engines_bound(v, layout, value, monkeypatch):
    """As on a device, where the compiled kernels take nothing."""
    monkeypatch.setattr(rule, "is_compiled", lambda *_: False)
    rows = layout.num_rows
    x, g = torch.full((rows, v.image_numel), value), torch.full((rows, v.output_numel), value)
    offsets = layout.offsets if layout.offsets is not None else torch.arange(rows + 1)
    for method in ("tile", "gram"):
        use = rule.ConvUse(x, g, v, method=method)
        chain = torch.as_tensor(sum_chain(v.places * layout.lengths, compiled=True))
        assert use.is_formed and torch.equal(torch.as_tensor(use.chain(layout)), chain)
    assert [way.method for way in use.ways(layout)] == ["tile", "materialise"]
    found, row_sums = torch.zeros(2, len(offsets) - 1, device=DEVICE)
    arguments = (x.to(DEVICE), g.to(DEVICE), offsets.to(DEVICE))
    conv_norms(v, *arguments, found, row_sums, backend="triton")
    exact, _ = torch.zeros(2, len(offsets) - 1)
    conv_norms(v, x, g, offsets, exact, _, backend="reference")
    error = formed_error(use.chain(layout), found, row_sums).cpu().double()
    off = (found.cpu().double() - exact.double()).abs()
    assert (off <= error + UNIT_ROUNDOFF * exact.double()).all()


def test_chains_are_as_long_as_is_counted():
    """Beside the first chain's sum the second one's terms are nothing, also 32 of them at once; all of them are not."""
    v = must(shape_of(1, 1, 1, (1, 1, 2 * SUM_BLOCK), (1, 1, 1)))
    x, g = torch.ones(1, v.image_numel), torch.full((1, v.output_numel), 2.0**-30)
    g[0, :SUM_BLOCK] = torch.tensor([1.0] + [0.0] * (SUM_BLOCK - 1))
    grad = float(unit_grads(v, x, g, torch.tensor([0, 1])))
    assert grad == 1.0 + SUM_BLOCK * 2.0**-30


@pytest.mark.parametrize("side", ["images", "output_grads"])
def test_underflow_is_covered(side):
    """The squares of one operand vanish in float32; its products with the other do not."""
    v = must(shape_of(2, 3, 2, (1, 4, 5), (1, 2, 2)))
    x, g = torch.full((1, v.image_numel), 1e-23), torch.full((1, v.output_numel), 1e18)
    if side == "output_grads":
        x, g = torch.full_like(x, 1e18), torch.full_like(g, 1e-23)
    exact = float(sq_norms([gradient(v, x, g, [0])]))
    found, row_sums = torch.zeros(2, 1, device=DEVICE)
    conv_norms(
        v, x.to(DEVICE), g.to(DEVICE), torch.tensor([0, 1], device=DEVICE), found, row_sums, backend="triton"
    )
    assert float(found) >= exact * (1.0 - 1e-5)
    assert float(row_sums) >= exact**0.5 * (1.0 - 1e-5)


# Who executes, and on what


def test_products_of_pairs_become_the_gradient():
    v, (x, g) = PADDED, whole_rows(PADDED, 3, 1)
    single = torch.arange(4)
    assert torch.equal(norms(v, x, g, single, method="gram")[0], norms(v, x, g, single)[0])


def test_what_is_not_contiguous_or_float32_is_taken():
    v, offsets = PADDED, torch.tensor([0, 1, 4])
    x, g = whole_rows(v, 4, 1)
    strided = torch.stack([x, -x], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(norms(v, strided, g.half(), offsets)[0], norms(v, x, g, offsets)[0])


def test_order_is_checked():
    x, g = whole_rows(PADDED, 3, 1)
    with pytest.raises(ValueError, match=r"^order: "):
        norms(PADDED, x, g, torch.arange(4), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"^order: "):
        norms(PADDED, x, g, torch.arange(4), torch.tensor([0, 1, 2], dtype=torch.int32))


def test_offsets_and_orders_that_lie_are_kept_within_the_images():
    """On a device nobody looks at them before; what they name outside of the images is not read."""
    v, (x, g) = PADDED, whole_rows(PADDED, 4, 1)
    x, g = x.to(DEVICE), g.to(DEVICE)
    offsets, order = (
        torch.tensor([-5, 2, 2**40], device=DEVICE),
        torch.tensor([-7, 0, 2**40, 3], device=DEVICE),
    )
    found, row_sums = torch.zeros(2, 2, device=DEVICE)
    triton_impl.norms(v, x, g, offsets, None, found, row_sums)
    assert torch.equal(found.cpu() + 1.0, norms(v, x, g, torch.tensor([0, 2, 4]))[0])
    grads = torch.empty(2, v.numel, device=DEVICE)
    triton_impl.unit_grads(v, x, g, offsets, order, grads)
    expected = [gradient(v, x.cpu(), g.cpu(), rows) for rows in ([0, 0], [3, 3])]
    assert torch.equal(grads.cpu(), torch.stack([torch.from_numpy(e).float().flatten() for e in expected]))


def test_images_of_more_places_than_32_bits_count_are_left_to_the_reference():
    v = ConvShape(1, 1, 1, (1, 1 << 15, 1 << 15), *[(1, 1, 1)] * 2, (0, 0, 0), (1, 1, 1), (1, 1, 1))
    nothing = torch.zeros(0, device=DEVICE)
    with pytest.raises(ValueError, match="no Triton kernel"):
        conv_sum(
            v, torch.zeros(0, 1 << 30), torch.zeros(0, 1), nothing.cpu(), out=torch.zeros(1), backend="triton"
        )


def test_nothing_waits_for_the_device():
    """No value and no shape is asked for: what a launch does next depends on shapes alone."""
    v, (x, g) = PADDED, whole_rows(PADDED, 4, 1)
    x, g = x.to(DEVICE), g.to(DEVICE)
    offsets, order, weights = (
        torch.tensor(values, device=DEVICE) for values in ([0, 1, 4], [3, 0, 2, 1], [0.0, 1.0, 0.5, 2.0])
    )
    found, row_sums, out = (torch.zeros(n, device=DEVICE) for n in (2, 2, v.numel))
    with Recorder() as recorder:
        triton_impl.norms(v, x, g, offsets, order, found, row_sums)
        triton_impl.unit_grads(v, x, g, offsets, order, torch.zeros(2, v.numel, device=DEVICE))
        triton_impl.weighted_sum(v, x, g, weights, out)
        if DEVICE == "cuda":
            conv_norms(v, x, g, torch.arange(5, device=DEVICE), x.new_zeros(4), x.new_zeros(4), method="gram")
            conv_sum(v, x, g, weights, out=out)
    assert "aten::index_select" in recorder.seen
    assert not {name for name in recorder.seen if name.split("::")[1].split(".")[0] in WAITING}
