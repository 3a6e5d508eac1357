"""Triton kernels of convolutions of bf16 and fp16: on the GPU if there is one, else in Triton's interpreter.

As in test_conv.py, operands of small whole numbers make every product and sum exact.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.engine.clipping import UNIT_ROUNDOFF, formed_error
from synthward.kernels import ConvShape
from synthward.kernels.conv import half_chain, prefers_channels_last, triton_half, triton_impl
from synthward.kernels.conv.shape import HALF_TERMS
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
from tests.kernels.test_triton_conv import DEVICE, EVERYTHING, PADDED, norms, unit_grads, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DTYPES = [torch.bfloat16, torch.float16]
STEM = must(shape_of(1, 3, 10, (1, 9, 10), (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)))
GROUPED = must(shape_of(3, 4, 4, (1, 6, 5), (1, 3, 3), padding=(0, 1, 1)))
DEPTHWISE = must(shape_of(17, 1, 1, (1, 6, 5), (1, 3, 3), padding=(0, 1, 1)))
# Several pieces of a gradient either way, and several steps of an image.
WIDE = must(shape_of(1, 40, 130, (1, 9, 9), (1, 2, 2)))


def last(v: ConvShape, x: Tensor, g: Tensor) -> tuple[ConvShape, Tensor, Tensor]:
    """The same with the channels last."""
    rows = len(x)
    x = x.reshape(rows, v.groups * v.channels, v.image_numel // (v.groups * v.channels)).mT
    g = g.reshape(rows, v.groups * v.outputs, v.places).mT
    return replace(v, channels_last=True), x.reshape(rows, -1), g.reshape(rows, -1)


def assert_exact(
    v: ConvShape, lengths: list[int], seed: int, dtype: torch.dtype, order: Tensor | None
) -> None:
    x, g = whole_rows(v, sum(lengths), seed)
    offsets, units = offsets_of(lengths), rows_of(lengths, order)
    assert offsets is not None
    expected = [gradient(v, x, g, unit) for unit in units]
    least = torch.stack([place_lengths(v, x, g)[unit].sum() for unit in units])
    rows = len(x)
    weights = torch.tensor([0.0, 0.25, 1.0, 2.0])[torch.randint(0, 4, (rows,), generator=generator(seed))]
    start = whole(1, v.numel, seed + 2, most=50)[0]
    scaled = g * weights.unsqueeze(1)
    total = start.double() + torch.from_numpy(gradient(v, x, scaled, list(range(rows)))).flatten()
    layouts = [(v, x.to(dtype), g.to(dtype))]
    if rows:
        layouts.append(last(*layouts[0]))
    for shape, a, b in layouts:
        found, row_sums = norms(shape, a, b, offsets, order)
        assert torch.equal(found, 1.0 + sq_norms(expected).float())
        assert (row_sums.double() >= (1.0 + least) * (1.0 - 1e-6)).all()
        for mine, theirs in zip(unit_grads(shape, a, b, offsets, order), expected, strict=True):
            assert torch.equal(mine, torch.from_numpy(theirs).float().flatten())
        # Images of weight zero hold what is no number.
        a, b = a.clone(), b.clone()
        a[weights == 0], b[weights == 0] = torch.nan, torch.inf
        assert torch.equal(weighted_sum(shape, a, b, weights, start), total.float())


@settings(max_examples=25, deadline=None)
@given(
    v=shapes(),
    lengths=st.sampled_from(LAYOUTS),
    shuffled=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_any_shape(v, lengths, shuffled, dtype, seed):
    order = torch.randperm(sum(lengths), generator=generator(seed)) if shuffled else None
    assert_exact(v, lengths, seed, dtype, order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "v",
    [*EDGES, EVERYTHING, STEM, GROUPED, DEPTHWISE, WIDE],
    ids=lambda v: f"{v.groups}x{v.channels}-{v.outputs} {v.size} {v.kernel}",
)
def test_edges(v, dtype):
    assert_exact(v, [1, 0, 2], 1, dtype, None)


def test_who_multiplies():
    """Few channels and small groups do on tensor cores, whose smallest product is not mostly zeros; depthwise ones and
    fp32 do not."""
    for v in (EVERYTHING, STEM, GROUPED, WIDE):
        assert triton_impl.on_tensor_cores(v, torch.bfloat16) and triton_impl.on_tensor_cores(
            v, torch.float16
        )
        assert not triton_impl.on_tensor_cores(v, torch.float32)
    assert not triton_impl.on_tensor_cores(DEPTHWISE, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch(dtype):
    x, g = (rows.to(dtype) for rows in whole_rows(STEM, 0, 1))
    for shape in (STEM, replace(STEM, channels_last=True)):
        found, row_sums = norms(shape, x, g, torch.zeros(4, dtype=torch.int64))
        assert found.tolist() == row_sums.tolist() == [1.0] * 3
        assert weighted_sum(shape, x, g, torch.ones(0), torch.ones(STEM.numel)).eq(1.0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["images", "output_grads"])
def test_what_is_not_finite_stays_in_its_unit(bad, side):
    offsets, others = torch.tensor([0, 1, 4, 4, 6]), torch.tensor([True, False, True, True])
    x, g = (rows.bfloat16() for rows in whole_rows(STEM, 6, 1))
    clean = [*norms(STEM, x, g, offsets), unit_grads(STEM, x, g, offsets)]
    (x if side == "images" else g)[3, -1] = bad
    for before, after in zip(
        clean, [*norms(STEM, x, g, offsets), unit_grads(STEM, x, g, offsets)], strict=True
    ):
        assert not torch.isfinite(after[1]).all()
        assert torch.equal(before[others], after[others])


def test_two_types_become_float32():
    x, g = whole_rows(STEM, 3, 1)
    single = torch.arange(4)
    expected = norms(STEM, x, g, single)
    for mixed in ((x.half(), g), (x.bfloat16(), g.half())):
        assert torch.equal(norms(STEM, *mixed, single)[0], expected[0])


def test_chains_are_as_long_as_is_counted():
    """Beside the first chain's sum the second one's terms are nothing, also many at once; all of them are not."""
    v = must(shape_of(1, 8, 16, (1, 1, 2 * HALF_TERMS), (1, 1, 1)))
    assert triton_impl.on_tensor_cores(v, torch.bfloat16)
    x, g = torch.ones(1, v.image_numel), torch.zeros(1, v.outputs, v.places)
    g[:, :, 0], g[:, :, HALF_TERMS:] = 1.0, 2.0**-29
    found = unit_grads(v, x.bfloat16(), g.flatten(1).bfloat16(), torch.tensor([0, 1]))
    assert found.eq(1.0 + HALF_TERMS * 2.0**-29).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1, 1], [1, 12]])
def test_norms_stay_within_the_engines_bound(dtype, lengths):
    v, rows = must(shape_of(1, 8, 16, (1, 1, 130), (1, 1, 3))), sum(lengths)
    x, g = torch.full((rows, v.image_numel), 1.1).to(dtype), torch.full((rows, v.output_numel), 0.3).to(dtype)
    offsets = offsets_of(lengths)
    assert offsets is not None
    found, row_sums = norms(v, x, g, offsets)
    exact = torch.stack(
        [torch.from_numpy(gradient(v, x, g, u)).square().sum() for u in rows_of(lengths, None)]
    )
    chain = half_chain(v, torch.tensor(lengths))
    error = formed_error(chain, found, row_sums).double()
    assert ((found.double() - 1.0 - exact).abs() <= error + UNIT_ROUNDOFF * (1.0 + exact)).all()


def test_a_chain_of_few_terms_is_short():
    assert half_chain(must(shape_of(1, 1, 1, (1, 1, 1), (1, 1, 1))), 1) == 2 + 1 + 8
    assert half_chain(WIDE, 3) == 2 * HALF_TERMS + 3 * 1 + 8
    assert half_chain(WIDE, torch.tensor([0, 3])).tolist() == [8, 2 * HALF_TERMS + 3 + 8]


def test_blocks_fill_a_gpu_where_gradients_are_few():
    few, many = (triton_half.half_blocks(WIDE, 64, gradients) for gradients in (1, 1000))
    assert (few.columns, few.outputs) == (64, 64)
    assert (many.columns, many.outputs) == (128, 128)


def test_channels_come_last_where_that_is_what_kernels_take():
    x, g = (rows.bfloat16().to(DEVICE) for rows in whole_rows(PADDED, 1, 1))
    assert prefers_channels_last(PADDED, x, g) == (DEVICE == "cuda")
    assert not prefers_channels_last(PADDED, x, g.float())
    assert not prefers_channels_last(PADDED, x.float(), g.float())
    assert ConvShape.from_numbers(replace(PADDED, channels_last=True).numbers()).channels_last
