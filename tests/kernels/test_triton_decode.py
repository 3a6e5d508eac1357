"""Triton's kernels of samplers, on the GPU if there is one, else in Triton's interpreter (see test_triton.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels import ResidualWeights, draw_tokens, linear_rows, residual_features
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.decode import triton_impl
from tests.kernels.test_decode import close_to_a_border, doubled, head, inputs, network
from tests.kernels.test_triton import Recorder

# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")

DEVICE = "cpu" if INTERPRETED else "cuda"
WAITING = {"item", "_local_scalar_dense", "nonzero", "_to_copy", "equal", "masked_select", "unique_dim"}
WIDTHS = st.sampled_from([1, 3, 16, 31, 65, 130])


def there(weights: ResidualWeights) -> ResidualWeights:
    return ResidualWeights(*(t.to(DEVICE) for t in weights.tensors()), weights.eps)


def features_of(arguments: tuple[Tensor, ...], weights: ResidualWeights) -> Tensor:
    return residual_features(*(t.to(DEVICE) for t in arguments), there(weights), backend="triton").cpu()


def drawn(arguments: tuple[Tensor, ...], added: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """Tokens; `sums` are written."""
    added_there, sums_there = (None if t is None else t.to(DEVICE) for t in (added, sums))
    on_device = [t.to(DEVICE) for t in arguments]
    tokens = draw_tokens(*on_device, added=added_there, sums=sums_there, backend="triton")
    if sums is not None:
        sums.copy_(sums_there)
    return tokens.cpu()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7, 63, 65]),
    width=WIDTHS,
    numbers=st.sampled_from([0, 1, 5]),
    blocks=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_features_of_any_shape(rows, width, numbers, blocks, seed):
    rng = torch.Generator().manual_seed(seed)
    weights, arguments = network(width, blocks, rng), inputs(rows, width, numbers, rng)
    expected = residual_features(*(t.double() for t in arguments), doubled(weights), backend="reference")
    found = features_of(arguments, weights)
    # Narrow rows may be all but constant, which their norm blows up: by no more than 1 / sqrt(eps) at each block.
    off = (found.double() - expected).abs()
    assert found.shape == (rows, width) and found.dtype == torch.float32
    assert bool((off <= 1e-4 * (1 + expected.abs()) * (1 if width > 3 else 300)).all())


def test_features_of_far_inputs_and_wide_rows():
    rng = torch.Generator().manual_seed(0)
    weights = network(300, 1, rng)
    sums, *others = inputs(6, 300, 1, rng)
    arguments = (sums * torch.tensor([1e-30, 1e-3, 1.0, 80.0, 1e3, 1e6]).unsqueeze(1), *others)
    expected = residual_features(*(t.double() for t in arguments), doubled(weights), backend="reference")
    assert torch.allclose(features_of(arguments, weights).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_alone(value):
    rng = torch.Generator().manual_seed(1)
    weights, arguments = network(24, 2, rng), inputs(70, 24, 2, rng)
    sound = features_of(arguments, weights)
    arguments[0][17, 3] = value
    found = features_of(arguments, weights)
    others = torch.arange(70) != 17
    assert not bool(torch.isfinite(found[17]).any())
    assert torch.equal(found[others], sound[others])
    _, *rest = head(70, 24, [5, 9], 2, rng)
    clean, tokens = drawn((sound, *rest)), drawn((found, *rest))
    assert torch.equal(tokens[others], clean[others])
    assert (tokens[17] == 0).all()


@pytest.mark.parametrize(
    ("rows", "p", "outputs"), [(0, 3, 2), (3, 0, 2), (1, 1, 1), (65, 17, 65), (7, 130, 0)]
)
def test_linear_rows(rows, p, outputs):
    rng = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(shape, generator=rng) for shape in ((rows, p), (outputs, p), (outputs,)))
    found = linear_rows(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), backend="triton").cpu()
    exact = x.double() @ weight.double().t() + bias.double()
    size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert found.dtype == torch.float32
    for made in (found, linear_rows(x, weight, bias), linear_rows(x, weight, bias, backend="reference")):
        assert made.shape == (rows, outputs) and ((made - exact).abs() <= (p + 2) * 2.0**-24 * size).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 9, 40]),
    width=WIDTHS,
    sizes=st.lists(st.sampled_from([1, 2, 5, 15, 16, 17, 33, 70]), min_size=1, max_size=9),
    count=st.integers(0, 4),
    held=st.sampled_from([16, 128]),
    seed=st.integers(0, 9),
)
def test_tokens_of_any_shape(rows, width, sizes, count, held, seed):
    """Columns that are held whole, and such as are gone through piece by piece."""
    rng = torch.Generator().manual_seed(seed)
    arguments = head(rows, width, sizes, count, rng)
    added = torch.randn(sum(sizes), 5, generator=rng)
    before = torch.randn(rows, 5, generator=rng)
    sums, expected_sums = before.clone(), before.clone()
    wide = (*(t.double() if t.is_floating_point() else t for t in arguments[:-1]), arguments[-1])
    expected = draw_tokens(*wide, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_impl, "_MOST", held)
        found = drawn(arguments, added, sums)
    assert found.shape == (rows, count) and found.dtype == torch.int64
    # A uniform number this close to a border of two tokens may fall on either side of it.
    assert close_to_a_border(wide, 1e-5)[found != expected].all()
    for j in range(count):
        expected_sums += added[arguments[3][arguments[4][:, j]] + found[:, j]]
    assert torch.equal(sums, expected_sums), "in the order of the columns, to the bit"


@pytest.mark.parametrize("held", [16, 128])
def test_what_is_forbidden_is_never_drawn(held, monkeypatch):
    monkeypatch.setattr(triton_impl, "_MOST", held)
    rng = torch.Generator().manual_seed(3)
    features, weight, bias, offsets, columns, uniforms = head(60, 8, [4, 40, 2], 2, rng)
    forbidden = torch.tensor([1, 3, 4, 5, *range(17, 30), 43, 44])
    bias[forbidden] = -torch.inf
    uniforms[::3] = 0.0
    uniforms[1::3] = 1 - 2**-24
    tokens = drawn((features, weight, bias, offsets, columns, uniforms))
    assert not torch.isin(offsets[columns] + tokens, forbidden).any()
    assert ((tokens >= 0) & (offsets[columns] + tokens < offsets[columns + 1])).all()


@pytest.mark.parametrize("size", [1, 6, 40])
def test_borders_are_those_of_the_softmax(size, monkeypatch):
    """One row for each of many even uniform numbers: each token is drawn as often as its share says, but for one."""
    monkeypatch.setattr(triton_impl, "_MOST", 16)
    rows = 100
    logits = torch.randn(size, generator=torch.Generator().manual_seed(4))
    uniforms = ((torch.arange(rows) + 0.5) / rows).unsqueeze(1)
    arguments = (torch.zeros(rows, 2), torch.zeros(size, 2), logits, torch.tensor([0, size]))
    tokens = drawn((*arguments, torch.zeros(rows, 1, dtype=torch.int64), uniforms)).flatten()
    assert torch.equal(tokens, tokens.sort().values), "a larger number draws a later token"
    found = torch.bincount(tokens, minlength=size)
    assert ((found - rows * torch.softmax(logits, 0)).abs() <= 1).all()


def test_rows_do_not_depend_on_others():
    rng = torch.Generator().manual_seed(5)
    weights, (sums, common, values, value_weights) = network(33, 2, rng), inputs(150, 33, 3, rng)
    _, weight, bias, offsets, columns, uniforms = head(150, 33, [5, 19, 2], 2, rng)

    def features(part: slice) -> Tensor:
        return features_of((sums[part], common, values[part], value_weights), weights)

    def tokens(part: slice) -> Tensor:
        return drawn((every[part], weight, bias, offsets, columns[part], uniforms[part]))

    def outputs(part: slice) -> Tensor:
        return linear_rows(*(t.to(DEVICE) for t in (every[part], weight, bias)), backend="triton").cpu()

    every = features(slice(0, 150))
    all_tokens = tokens(slice(0, 150))
    anywhere = (slice(37, 138), slice(141, 142))
    # The interpreter multiplies blocks of rows by BLAS, where a row's place in its block may change its last bit.
    for part in (slice(64, 100), slice(128, 150), *(() if INTERPRETED else anywhere)):
        assert torch.equal(features(part), every[part])
        assert torch.equal(outputs(part), outputs(slice(0, 150))[part])
    for part in anywhere:
        assert torch.equal(tokens(part), all_tokens[part])


def test_columns_and_offsets_that_lie_are_kept_within_the_head():
    """On a device nobody looks at them before."""
    features, weight, bias, _, _, uniforms = head(4, 3, [3, 2], 2, torch.Generator().manual_seed(6))
    columns = torch.tensor([[0, -1], [2**40, 1], [2, 0], [-(2**40), 1]])
    for offsets, empty in ((torch.tensor([0, 3, 5]), []), (torch.tensor([-7, 2**40, 2**50]), [1])):
        sums = torch.zeros(4, 1, device=DEVICE)
        on_device = [t.to(DEVICE) for t in (features, weight, bias, offsets, columns, uniforms)]
        tokens = triton_impl.draw_tokens(*on_device, torch.ones(5, 1, device=DEVICE), sums).cpu()
        is_one = (columns >= 0) & (columns < 2) & ~torch.isin(columns, torch.tensor(empty))
        assert torch.equal(tokens >= 0, is_one) and (tokens[~is_one] == -1).all() and (tokens < 5).all()
        assert torch.equal(sums.cpu().flatten(), is_one.sum(1).float())


@pytest.mark.skipif(not INTERPRETED, reason="on a device columns are not looked at")
def test_columns_in_cpu_memory_are_looked_at():
    good = head(4, 8, [3, 2], 2, torch.Generator().manual_seed(6))
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="columns"):
            draw_tokens(*good[:4], torch.full((4, 2), wrong), good[5], backend="triton")


def test_strided_inputs_are_taken_and_strided_sums_refused():
    rng = torch.Generator().manual_seed(7)
    weights, arguments = network(12, 1, rng), inputs(5, 12, 2, rng)
    strided = tuple(t.repeat_interleave(2, -1)[..., ::2] for t in arguments)
    assert torch.equal(features_of(strided, weights), features_of(arguments, weights))
    good = head(5, 12, [3, 2], 2, rng)
    assert torch.equal(drawn(tuple(t.repeat_interleave(2, -1)[..., ::2] for t in good)), drawn(good))
    with pytest.raises(ValueError, match="contiguous where written"):
        on_device = [t.to(DEVICE) for t in good]
        sums = torch.zeros(5, 4, device=DEVICE)[:, ::2]
        draw_tokens(*on_device, added=torch.zeros(5, 2, device=DEVICE), sums=sums, backend="triton")


def test_operands_of_half_precision_are_computed_with_in_single():
    rng = torch.Generator().manual_seed(8)
    weights, arguments = network(20, 1, rng), inputs(5, 20, 2, rng)
    half = tuple(t.bfloat16() for t in arguments)
    expected = features_of(tuple(t.float() for t in half), weights)
    assert torch.equal(features_of(half, weights), expected)


def test_nothing_waits_for_the_device():
    rng = torch.Generator().manual_seed(9)
    weights, arguments = there(network(12, 2, rng)), [t.to(DEVICE) for t in inputs(5, 12, 2, rng)]
    given, table = [t.to(DEVICE) for t in head(5, 12, [3, 2], 2, rng)], torch.ones(5, 4, device=DEVICE)
    sums = torch.zeros(5, 4, device=DEVICE)
    with Recorder() as recorder:
        features = triton_impl.residual_features(*arguments, weights)
        triton_impl.draw_tokens(features, *given[1:], table, sums)
        triton_impl.linear_rows(features, *given[1:3])
    assert "aten::empty.memory_format" in recorder.seen
    assert not {name for name in recorder.seen if name.split("::")[1].split(".")[0] in WAITING}
