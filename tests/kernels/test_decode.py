"""Kernels of samplers: the network's features and the drawn tokens, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.kernels import (
    ResidualWeights,
    available_isas,
    draw_tokens,
    force_isa,
    linear_rows,
    residual_features,
)

WIDTHS = st.sampled_from([1, 3, 15, 16, 31, 33, 64, 127, 130, 256, 260])


def network(width: int, blocks: int, rng: torch.Generator) -> ResidualWeights:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    return ResidualWeights(
        normal(blocks, width, width) / width**0.5,
        normal(blocks, width),
        1 + 0.3 * normal(blocks + 1, width),
        normal(blocks + 1, width),
        1e-5,
    )


def inputs(rows: int, width: int, numbers: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    shapes = ((rows, width), (width,), (rows, numbers), (numbers, width))
    return tuple(torch.randn(shape, generator=rng) for shape in shapes)


def doubled(weights: ResidualWeights) -> ResidualWeights:
    return ResidualWeights(*(t.double() for t in weights.tensors()), weights.eps)


@pytest.mark.parametrize("isa", available_isas())
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7, 63, 64, 65, 300]),
    width=WIDTHS,
    numbers=st.sampled_from([0, 1, 5]),
    blocks=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_features_of_any_shape(isa, rows, width, numbers, blocks, seed):
    rng = torch.Generator().manual_seed(seed)
    weights, arguments = network(width, blocks, rng), inputs(rows, width, numbers, rng)
    expected = residual_features(*(t.double() for t in arguments), doubled(weights), backend="reference")
    force_isa(isa)
    try:
        found = residual_features(*arguments, weights, backend="cpp")
    finally:
        force_isa(None)
    # Narrow rows may be all but constant, which their norm blows up: by no more than 1 / sqrt(eps) at each block.
    off = (found.double() - expected).abs()
    assert found.shape == (rows, width) and found.dtype == torch.float32
    assert bool((off <= 1e-4 * (1 + expected.abs()) * (1 if width > 3 else 300)).all())


def test_features_of_far_inputs():
    rng = torch.Generator().manual_seed(0)
    weights = network(40, 1, rng)
    sums, common, values, value_weights = inputs(6, 40, 1, rng)
    sums = sums * torch.tensor([1e-30, 1e-3, 1.0, 80.0, 1e3, 1e6]).unsqueeze(1)
    arguments = (sums, common, values, value_weights)
    expected = residual_features(*(t.double() for t in arguments), doubled(weights), backend="reference")
    found = residual_features(*arguments, weights, backend="cpp")
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_alone(value):
    rng = torch.Generator().manual_seed(1)
    weights, arguments = network(48, 2, rng), inputs(70, 48, 2, rng)
    sound = residual_features(*arguments, weights, backend="cpp")
    arguments[0][17, 3] = value
    found = residual_features(*arguments, weights, backend="cpp")
    others = torch.arange(70) != 17
    assert not bool(torch.isfinite(found[17]).any())
    assert torch.equal(found[others], sound[others])


def head(
    rows: int, width: int, sizes: list[int], count: int, rng: torch.Generator
) -> tuple[torch.Tensor, ...]:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    vocabulary = int(offsets[-1])
    return (
        torch.randn(rows, width, generator=rng),
        torch.randn(vocabulary, width, generator=rng) / width**0.5,
        torch.randn(vocabulary, generator=rng),
        offsets,
        torch.randint(len(sizes), (rows, count), generator=rng),
        torch.rand(rows, count, generator=rng),
    )


@pytest.mark.parametrize("isa", available_isas())
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 40, 300]),
    width=WIDTHS,
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    count=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_tokens_of_any_shape(isa, rows, width, sizes, count, seed):
    rng = torch.Generator().manual_seed(seed)
    arguments = head(rows, width, sizes, count, rng)
    added = torch.randint(-9, 9, (sum(sizes), 5), generator=rng).float()
    before = torch.randint(-9, 9, (rows, 5), generator=rng).float()
    sums, expected_sums = before.clone(), before.clone()
    wide = (*(t.double() if t.is_floating_point() else t for t in arguments[:-1]), arguments[-1])
    expected = draw_tokens(*wide, added=added, sums=expected_sums, backend="reference")
    force_isa(isa)
    try:
        found = draw_tokens(*arguments, added=added, sums=sums, backend="cpp")
    finally:
        force_isa(None)
    assert found.shape == (rows, count) and found.dtype == torch.int64
    # A uniform number this close to a border of two tokens may fall on either side of it.
    assert close_to_a_border(wide, 1e-5)[found != expected].all()
    same = (found == expected).all(1)
    assert torch.equal(sums[same], expected_sums[same])
    expected_sums = before + added[arguments[3][arguments[4]] + found].sum(1)
    assert torch.equal(sums, expected_sums)


def close_to_a_border(arguments: tuple[torch.Tensor, ...], margin: float) -> torch.Tensor:
    """Bool [N, k]: whether a move of the uniform number by `margin` changes the token."""
    *others, uniforms = arguments
    low, high = ((uniforms + way).clamp(0, 1 - 2**-24) for way in (-margin, margin))
    return draw_tokens(*others, low, backend="reference") != draw_tokens(*others, high, backend="reference")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_is_forbidden_is_never_drawn(backend):
    rng = torch.Generator().manual_seed(3)
    features, weight, bias, offsets, columns, uniforms = head(2000, 8, [4, 3, 2], 3, rng)
    forbidden = torch.tensor([1, 3, 4, 6, 8])
    bias[forbidden] = -torch.inf
    uniforms[::3] = 0.0
    uniforms[1::3] = 1 - 2**-24
    tokens = draw_tokens(features, weight, bias, offsets, columns, uniforms, backend=backend)
    assert not torch.isin(offsets[columns] + tokens, forbidden).any()
    assert ((tokens >= 0) & (offsets[columns] + tokens < offsets[columns + 1])).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_shares_are_the_softmax(backend):
    rng = torch.Generator().manual_seed(4)
    logits, rows = torch.randn(6, generator=rng), 100_000
    arguments = (torch.zeros(rows, 2), torch.zeros(6, 2), logits, torch.tensor([0, 6]))
    columns, uniforms = torch.zeros(rows, 1, dtype=torch.int64), torch.rand(rows, 1, generator=rng)
    tokens = draw_tokens(*arguments, columns, uniforms, backend=backend)
    share = torch.softmax(logits, 0)
    found = torch.bincount(tokens.flatten(), minlength=6) / rows
    # Six standard deviations each: a false alarm in 1e8 runs.
    assert ((found - share).abs() <= 6 * (share * (1 - share) / rows).sqrt()).all()


def test_rows_do_not_depend_on_others_nor_on_threads(restore_threads):
    rng = torch.Generator().manual_seed(5)
    weights, arguments = network(96, 2, rng), inputs(700, 96, 3, rng)
    _, weight, bias, offsets, columns, uniforms = head(700, 96, [5, 9, 2], 2, rng)

    def run(part: slice, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(threads)
        sums, common, values, value_weights = arguments
        features = residual_features(sums[part], common, values[part], value_weights, weights, backend="cpp")
        return features, draw_tokens(
            features, weight, bias, offsets, columns[part], uniforms[part], backend="cpp"
        )

    features, tokens = run(slice(None), 1)
    for part, threads in ((slice(None), 3), (slice(37, 338), 1), (slice(641, 642), 2)):
        found = run(part, threads)
        assert torch.equal(found[0], features[part]) and torch.equal(found[1], tokens[part])


def test_arguments_that_do_not_fit():
    rng = torch.Generator().manual_seed(6)
    weights, arguments = network(8, 1, rng), inputs(4, 8, 2, rng)
    for place, name in enumerate(("sums", "common", "values", "value_weights")):
        wrong = [*arguments]
        wrong[place] = torch.zeros(3, 3, 3)
        with pytest.raises(ValueError, match=name):
            residual_features(*wrong, weights)
    with pytest.raises(ValueError, match="scales"):
        residual_features(
            *arguments,
            ResidualWeights(weights.weights, weights.biases, weights.scales[:1], weights.shifts, 1e-5),
        )
    good = head(4, 8, [3, 2], 2, rng)
    for place, wrong_value, name in (
        (1, torch.zeros(5, 7), "weight"),
        (2, torch.zeros(4), "bias"),
        (3, torch.tensor([0, 3, 3, 5]), "offsets"),
        (3, torch.tensor([0, 3]), "offsets"),
        (4, torch.full((4, 2), 2), "columns"),
        (4, torch.full((4, 2), -1), "columns"),
        (5, torch.zeros(4, 3), "uniforms"),
    ):
        wrong = [*good]
        wrong[place] = wrong_value
        with pytest.raises(ValueError, match=name):
            draw_tokens(*wrong)
    with pytest.raises(TypeError, match="columns"):
        draw_tokens(*good[:4], good[4].int(), good[5])
    with pytest.raises(ValueError, match="added"):
        draw_tokens(*good, added=torch.zeros(5, 2))
    for name, weight_shape, length in (("weight", (2, 4), 2), ("bias", (2, 3), 3)):
        with pytest.raises(ValueError, match=name):
            linear_rows(torch.zeros(4, 3), torch.zeros(weight_shape), torch.zeros(length))
