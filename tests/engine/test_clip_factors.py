"""Clip factors: the clipped norm is at most C with rounding covered; what is not finite weighs exactly
nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.engine import ClipSpec
from synthward.engine.clipping import clip_factors, formed_error, product_error
from synthward.engine.layout import Layout
from synthward.engine.rules.uses import Norms, OuterUse, ScatterUse, add_cross_term
from synthward.kernels import diagonal_sq_norms


def factors_of(
    a: torch.Tensor, g: torch.Tensor, layout: Layout, bound: float, method: str = "gram"
) -> np.ndarray:
    """Factors of one linear weight's units."""
    sq_norms, row_sums = torch.zeros(layout.num_units), torch.zeros(layout.num_units)
    use = OuterUse(a, g, method=method)
    use.add_norms(sq_norms, row_sums, layout, Norms())
    chain = use.chain(layout)
    error = product_error(chain, row_sums)
    if use.is_formed:
        error = formed_error(chain, sq_norms, row_sums)
    factors = clip_factors(sq_norms, ClipSpec(bound), bound=bound, error=error)[0]
    return factors.double().numpy()


def true_norms(a: torch.Tensor, g: torch.Tensor, units: int) -> np.ndarray:
    a64, g64 = a.double().view(units, -1, a.shape[1]), g.double().view(units, -1, g.shape[1])
    return torch.einsum("ukp,ukd->upd", g64, a64).flatten(1).norm(dim=1).numpy()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 4, 33, 40]),
    width=st.sampled_from([1, 3, 64, 700]),
    scale=st.sampled_from([1e-3, 1.0, 1e6, 1e15]),
    bound=st.sampled_from([1e-3, 1.0, 1e3]),
    ragged=st.booleans(),
    method=st.sampled_from(["gram", "tile"]),
    seed=st.integers(0, 10**6),
)
def test_no_contribution_exceeds_c(rows, width, scale, bound, ragged, method, seed):
    generator = torch.Generator().manual_seed(seed)
    units = 3
    a = torch.randn(units * rows, width, generator=generator) * scale
    g = torch.randn(units * rows, 5, generator=generator)
    layout = Layout.uniform(units, rows)
    if ragged:
        layout = Layout.ragged(torch.arange(0, units * rows + 1, rows))
    factors, norms = factors_of(a, g, layout, bound, method), true_norms(a, g, units)
    assert (factors * norms <= bound).all()
    assert (factors >= np.minimum(1.0, bound / norms) * 0.99).all(), "a slack that costs more than a percent"


@settings(max_examples=100, deadline=None)
@given(
    size=st.sampled_from([1.0, 1e4, 1e8]),
    rest=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_rows_that_cancel_inside_a_unit_stay_within_c(size, rest, seed):
    """Two rows of opposite gradients: the norm is what rounding leaves, the contribution must not be."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(1, 50, generator=generator).repeat(2, 1) * size
    a[1] *= 1.0 + rest
    row = torch.randn(1, 7, generator=generator)
    g = torch.cat([row, -row])
    for layout in (Layout.uniform(1, 2), Layout.ragged(torch.tensor([0, 2]))):
        factors, norms = factors_of(a, g, layout, 1.0), true_norms(a, g, 1)
        assert (factors * norms <= 1.0).all()


@pytest.mark.parametrize(
    "clip", [ClipSpec(1e-12), ClipSpec(1.0, clipping="automatic", gamma=1e-30)], ids=["flat", "automatic"]
)
@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e-20, 1e-15, 1e-12, 1e-10])
def test_what_underflow_takes_from_a_norm_is_covered(clip, size):
    """A norm of zero would let automatic clipping blow the gradient up."""
    g = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)) * size
    clipped = clip_factors(diagonal_sq_norms(g), clip, bound=clip.max_grad_norm)[0].double() * g.double()
    assert float(clipped.norm()) <= clip.max_grad_norm


@pytest.mark.parametrize("bound", [1e-12, 1e-6, 1.0])
def test_what_covers_underflow_costs_little_at_every_bound_that_is_taken(bound):
    factors, _, _ = clip_factors(torch.tensor([bound**2]), ClipSpec(bound), bound=bound)
    assert 0.9999 <= float(factors) <= 1.0


def test_rows_that_cancel_and_whose_squares_underflow_are_not_taken_for_nothing():
    """The squares of one side are zero in fp32. What is released of such rows is the rounding of their sum, 2^-24 of
    the rows' own gradients: the norm that is clipped must not be below that."""
    a, row = torch.full((2, 3), 3e-24), torch.full((1, 3), 5e18)
    g = torch.cat([row, -row])
    for x, y in ((a, g), (g, a)):
        for layout in (Layout.uniform(1, 2), Layout.ragged(torch.tensor([0, 2]))):
            sq_norms, row_sums, use = torch.zeros(1), torch.zeros(1), OuterUse(x, y)
            use.add_norms(sq_norms, row_sums, layout, Norms())
            upper = sq_norms + product_error(use.chain(layout), row_sums)
            lengths = x.double().norm(dim=1) * y.double().norm(dim=1)
            assert float(upper.sqrt()) >= 2.0**-24 * float(lengths.sum())


def test_a_cross_term_that_underflows_stays_within_c():
    """A table that is also an output weight: the product of an activation and a table row's gradient is zero in
    fp32, what it meets is not."""
    outer = OuterUse(torch.full((1, 1), 2.0**-140), torch.full((1, 1), 2.0**127))
    scatter = ScatterUse(torch.zeros(1, dtype=torch.int64), torch.full((1, 1), 2.0**-13), 1)
    layout, sq_norms = Layout.uniform(1, 1), torch.zeros(1)
    outer.add_norms(sq_norms, torch.zeros(1), layout, Norms())
    scatter.add_norms(sq_norms, torch.zeros(1), layout, Norms())
    add_cross_term(outer, layout, scatter, layout, sq_norms)
    assert float(sq_norms) >= (2 * 2.0**-13) ** 2


def test_not_finite_weighs_exactly_nothing():
    sq_norms = torch.tensor([1.0, torch.nan, torch.inf, 4.0, 0.0, 3e38])
    factors, _, _ = clip_factors(sq_norms, ClipSpec(1.0), bound=1.0, error=1e-6)
    assert factors[[1, 2]].tolist() == [0.0, 0.0]
    assert factors[4] == 1.0, "a gradient of zero is not clipped"
    assert 0.0 < factors[5] < 1e-18
    torch.testing.assert_close(factors[[0, 3]], torch.tensor([1.0, 0.5]), rtol=1e-4, atol=0.0)


def test_masked_units_weigh_exactly_nothing():
    sq_norms = torch.tensor([1.0, 9.0, torch.nan])
    mask = torch.tensor([True, False, False])
    factors, _, _ = clip_factors(sq_norms, ClipSpec(2.0), bound=2.0, unit_mask=mask)
    assert factors.tolist() == [1.0, 0.0, 0.0]


def test_the_scale_of_a_mean_is_undone_before_the_clip():
    """Gradients of a mean over ten rows, ten times too small: both clipped and unclipped units."""
    sq_norms = torch.tensor([0.04, 1e-4])
    factors, _, _ = clip_factors(sq_norms, ClipSpec(1.0), bound=1.0, scale=10.0)
    torch.testing.assert_close(factors, torch.tensor([1.0 / 0.2, 10.0]))


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_bounds_that_are_none(bound):
    from synthward.engine.errors import ConfigError

    with pytest.raises(ConfigError):
        ClipSpec(bound)
