"""The released sum equals the float64 loop over units, for any shape of batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.engine.nets import Mixed, Tied, accumulate, make_trainer, mixed_inputs, oracle, released
from tests.oracles import flat_parameters

TIMES = st.sampled_from([(), (1,), (3,), (2, 2)])
COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=6)
BOUNDS = st.sampled_from([1e-3, 0.3, 1e3])


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    # Reading a sum back as a difference of fp32 parameters of magnitude up to 2 loses 1.2e-7 a coordinate.
    np.testing.assert_allclose(
        actual, expected, rtol=2e-4, atol=2e-6 + 2e-5 * np.abs(expected).max(initial=0.0)
    )


@settings(max_examples=40, deadline=None)
@given(
    counts=COUNTS, time=TIMES, bound=BOUNDS, act=st.sampled_from([nn.SiLU, nn.GELU]), seed=st.integers(0, 99)
)
def test_ragged_units_with_empty_ones(counts, time, bound, act, seed):
    torch.manual_seed(seed)
    module = Mixed(act=act)
    x = mixed_inputs(sum(counts), *time, seed=seed)
    expected = oracle(copy.deepcopy(module), x, counts, bound)
    assert_same(released(module, x, counts, bound), expected)


@settings(max_examples=40, deadline=None)
@given(
    units=st.integers(1, 6),
    rows=st.sampled_from([1, 2, 5, 40]),
    time=TIMES,
    bound=BOUNDS,
    seed=st.integers(0, 99),
)
def test_uniform_units(units, rows, time, bound, seed):
    """Up to 32 rows a unit the norm is by Gram matrices of batches, beyond by the segment kernel."""
    torch.manual_seed(seed)
    module = Mixed()
    x = mixed_inputs(units * rows, *time, seed=seed)
    expected = oracle(copy.deepcopy(module), x, [rows] * units, bound)
    assert_same(released(module, x, [rows] * units, bound, rows_per_unit=rows), expected)


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, time=TIMES, bound=BOUNDS, seed=st.integers(0, 99))
def test_a_table_that_is_also_an_output_weight(counts, time, bound, seed):
    """The cross term of look-up and product is exact, ragged or not."""
    torch.manual_seed(seed)
    module = Tied()
    x = mixed_inputs(sum(counts), *time, seed=seed)
    expected = oracle(copy.deepcopy(module), x, counts, bound)
    assert_same(released(module, x, counts, bound), expected)
    if len(set(counts)) == 1 and counts[0]:
        torch.manual_seed(seed)
        assert_same(released(Tied(), x, counts, bound, rows_per_unit=counts[0]), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_layer_norm_over_any_trailing_shape(shape):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Unflatten(1, shape), nn.LayerNorm(shape), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        module[1].weight.uniform_(0.5, 2.0)
        module[1].bias.uniform_(-1.0, 1.0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    expected = oracle(copy.deepcopy(module), x, [2, 1, 3], 0.2)
    assert_same(released(module, x, [2, 1, 3], 0.2), expected)


@pytest.mark.parametrize("padding", [None, 0, 5, -1])
def test_padding_takes_no_gradient_and_counts_in_no_norm(padding):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(6, 3, padding_idx=padding), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        module[0].weight.normal_()
    x = torch.randint(0, 6, (6, 4), generator=torch.Generator().manual_seed(2))
    x[:, 1] = 5
    expected = oracle(copy.deepcopy(module), x, [2, 1, 3], 0.05)
    assert_same(released(module, x, [2, 1, 3], 0.05), expected)


def test_one_unit_of_many_rows_and_many_units_of_one():
    for counts in ([30], [1] * 30):
        module = Mixed()
        x = mixed_inputs(30)
        expected = oracle(copy.deepcopy(module), x, counts, 0.1)
        assert_same(released(module, x, counts, 0.1), expected)


@pytest.mark.parametrize("split", [1, 2, 5])
def test_any_split_into_physical_batches_gives_the_same_sum(split):
    torch.manual_seed(0)
    module, x, counts = Mixed(), mixed_inputs(20), [1, 3, 2, 4, 2, 1, 1, 2, 3, 1]
    whole = released(copy.deepcopy(module), x, counts, 0.1)
    trainer, before = make_trainer(module, max_grad_norm=0.1), flat_parameters(module)
    parts = torch.split(x, counts)
    for start in range(0, len(counts), split):
        chosen = slice(start, start + split)
        accumulate(trainer, module, torch.cat(parts[chosen]), counts[chosen])
    trainer.apply()
    assert_same(before - flat_parameters(module), whole)


def test_the_two_layouts_of_equal_units_agree():
    torch.manual_seed(0)
    module, x = Mixed(), mixed_inputs(12)
    ragged = released(copy.deepcopy(module), x, [3] * 4, 0.1)
    assert_same(released(module, x, [3] * 4, 0.1, rows_per_unit=3), ragged)


def test_frozen_halves_of_a_layer():
    """Weight without bias, bias without weight: what is frozen is neither measured nor moved."""
    for frozen in ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "table.weight"):
        torch.manual_seed(0)
        module = Mixed()
        module.get_parameter(frozen).requires_grad_(False)
        x = mixed_inputs(8)
        kept = module.get_parameter(frozen).detach().clone()
        expected = oracle(copy.deepcopy(module), x, [2] * 4, 0.1)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
        trainer, before = make_trainer(module, optimizer, max_grad_norm=0.1), flat_parameters(module)
        accumulate(trainer, module, x, [2] * 4)
        trainer.apply()
        assert_same(before - flat_parameters(module), expected)
        assert torch.equal(module.get_parameter(frozen), kept)


def test_the_records_are_left_as_they_were():
    """Rows of a unit that is not finite are zeroed in what the engine kept, never in the caller's batch."""
    module, x = Mixed(), mixed_inputs(6)
    x[2, 3] = torch.nan
    x[4, 1] = torch.inf
    copy_of_x = x.clone()
    released(module, x, [1] * 6, 0.1)
    assert torch.equal(x.nan_to_num(7.0, 8.0), copy_of_x.nan_to_num(7.0, 8.0))
    assert x[2, 3].isnan() and x[4, 1].isinf()
