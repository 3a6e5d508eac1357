"""Invariant 1: one privacy unit moves the released sum by at most C, and moves nothing else.

The neighbour is add/remove: D is the records, D + x has one more unit. Without noise the released sums of the
two are subtracted and compared with C and with the float64 loop.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import clip_vector, clipped_sum, flat_parameters, per_unit_gradients
from tests.privacy.harness import accumulate, engine_step, make_private, make_trainer, released, step
from tests.privacy.nets import CASES, FLOAT_CASES, Case, stack, unit_loss

ROW_COUNTS = {
    "rows": [1] * 7,
    "four_rows": [4] * 7,
    "ragged": [1, 5, 2, 1, 9, 3, 2],
}
# Parameters are fp32 of magnitude below 2; reading a sum back as a difference of them loses 1.2e-7 a
# coordinate.
READ_BACK = 3e-6
# The clip may stay below C by the bound on the norm's own rounding error, never above.
SLACK = 1e-4


def scaled(case: Case, factor: float) -> torch.nn.Module:
    """The case's network with its last layer multiplied: gradients far above or below C."""
    module = case.module()
    with torch.no_grad():
        list(module.parameters())[-2].mul_(factor)
    return module


@pytest.mark.parametrize("rows", ROW_COUNTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("max_grad_norm", [0.01, 0.7, 50.0])
def test_released_sum_is_the_clipped_sum_of_the_oracle(case, rows, max_grad_norm):
    units = case.units(ROW_COUNTS[rows])
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), max_grad_norm)
    actual = released(case, units, max_grad_norm=max_grad_norm)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("rows", ROW_COUNTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_more_unit_moves_the_released_sum_by_at_most_c(case, rows):
    """For every unit in turn; C is far below the gradients, so that a unit which is not clipped shows."""
    units = case.units(ROW_COUNTS[rows])
    for left_out in range(len(units)):
        neighbour = [u for i, u in enumerate(units) if i != left_out]
        moved = released(case, units, max_grad_norm=0.05) - released(case, neighbour, max_grad_norm=0.05)
        assert np.linalg.norm(moved) <= 0.05 + READ_BACK
        assert np.linalg.norm(moved) >= 0.05 * 0.98, "a clipped unit should use up nearly all of C"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_moved_part_is_the_unit_s_own_clipped_gradient(case):
    """Removing a unit leaves every other contribution as it was: no division by the realised batch size."""
    units = case.units(ROW_COUNTS["ragged"])
    gradients = per_unit_gradients(case.module(), unit_loss, units)
    whole = released(case, units)
    for left_out, gradient in enumerate(gradients):
        neighbour = [u for i, u in enumerate(units) if i != left_out]
        moved = whole - released(case, neighbour)
        np.testing.assert_allclose(moved, clip_vector(gradient, 1.0), atol=SLACK)


@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("factor", [1e-4, 1e3, 1e8, 1e15])
def test_extreme_records_stay_within_c(case, factor):
    """Inputs scaled far beyond any sane encoding; one unit alone, so the whole release is its
    contribution."""
    [(inputs, targets)] = case.units([3])
    sum_ = released(case, [(inputs * factor, targets)], max_grad_norm=1.0)
    assert np.isfinite(sum_).all()
    assert np.linalg.norm(sum_) <= 1.0 + READ_BACK


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_steep_heads_stay_within_c(case):
    module = scaled(case, 1e4)
    sum_ = step(make_trainer(module, max_grad_norm=1.0), module, [case.units([2])])
    # The scaled head has weights near 1e4, where reading back costs 1e-3 a coordinate.
    assert np.linalg.norm(sum_) <= 1.0 + 2e-2


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1.0])
def test_contribution_never_exceeds_c_by_rounding(max_grad_norm):
    """500 single-unit releases of a network whose parameters are zero but for one layer, read back
    exactly."""
    generator = torch.Generator().manual_seed(3)
    weight_before = torch.zeros(3, 40)
    worst = 0.0
    for _ in range(500):
        module = torch.nn.Linear(40, 3, bias=False)
        with torch.no_grad():
            module.weight.copy_(weight_before)
        unit = (torch.randn(1, 40, generator=generator) * 30, torch.tensor([1]))
        worst = max(
            worst,
            float(np.linalg.norm(step(make_trainer(module, max_grad_norm=max_grad_norm), module, [[unit]]))),
        )
    # Each coordinate of the contribution is itself rounded to fp32: 2^-24 relative, and no more.
    assert max_grad_norm * 0.999 <= worst <= max_grad_norm * (1 + 2**-23)


def test_fifty_rows_of_one_patient_are_one_unit():
    case = CASES[0]
    sum_ = released(case, case.units([50]), max_grad_norm=0.3)
    assert np.linalg.norm(sum_) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("split", [1, 2, 3, 7])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_any_split_into_physical_batches_releases_the_same_sum(case, split):
    units = case.units([2] * 7)
    module = case.module()
    batches = [units[i : i + split] for i in range(0, 7, split)]
    parts = step(make_trainer(module, max_grad_norm=0.2), module, batches)
    np.testing.assert_allclose(parts, released(case, units, max_grad_norm=0.2), atol=READ_BACK)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_masked_units_weigh_nothing(case):
    """Padding rows: whatever stands in them, the release is that of the units which are present."""
    units = case.units([2] * 5)
    mask = [True, False, True, True, False]
    module = case.module()
    before = flat_parameters(module)
    trainer = make_trainer(module)
    accumulate(trainer, module, units, mask)
    trainer.apply()
    present = [u for u, keep in zip(units, mask, strict=True) if keep]
    np.testing.assert_allclose(before - flat_parameters(module), released(case, present), atol=READ_BACK)


def test_padding_full_of_nan_weighs_nothing():
    case = CASES[0]
    units = case.units([1] * 4)
    padding = (torch.full_like(units[0][0], torch.nan), units[0][1])
    module = case.module()
    before = flat_parameters(module)
    trainer = make_trainer(module)
    accumulate(trainer, module, [*units, padding], [True] * 4 + [False])
    trainer.apply()
    np.testing.assert_allclose(before - flat_parameters(module), released(case, units), atol=READ_BACK)


# The same through the public drop-in API: the user's own loop.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_engine_releases_the_oracle_s_sum_over_the_public_batch(case, reduction):
    """Eight is the loader's batch size, six rows are present: the sum is divided by eight, whatever the
    reduction."""
    units = case.units([1] * 6)
    inputs, targets, _ = stack(units)
    private = make_private(case.module(), units, 8, loss_reduction=reduction)
    update = engine_step(private, inputs, targets, reduction=reduction)
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 1.0) / 8
    np.testing.assert_allclose(update, expected, atol=SLACK)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_engine_removal_of_a_row_leaves_the_others(case):
    units = case.units([1] * 8)
    inputs, targets, _ = stack(units)
    gradients = per_unit_gradients(case.module(), unit_loss, units)
    whole = engine_step(make_private(case.module(), units, 8), inputs, targets)
    for left_out, gradient in enumerate(gradients):
        keep = torch.arange(8) != left_out
        less = engine_step(make_private(case.module(), units, 8), inputs[keep], targets[keep])
        np.testing.assert_allclose((whole - less) * 8, clip_vector(gradient, 1.0), atol=SLACK)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_engine_units_make_the_patient_the_unit(case, order):
    """Ids are arbitrary integers and, in a user's batch, in any order."""
    units = case.units([1, 4, 2, 3])
    inputs, targets, offsets = stack(units)
    ids = torch.repeat_interleave(torch.tensor([90, 7, 10**12, 44]), offsets.diff())
    if order == "shuffled":
        permutation = torch.randperm(len(ids), generator=torch.Generator().manual_seed(5))
        inputs, targets, ids = inputs[permutation], targets[permutation], ids[permutation]
    update = engine_step(make_private(case.module(), units, 8), inputs, targets, ids=ids)
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 1.0) / 8
    np.testing.assert_allclose(update, expected, atol=SLACK)
    assert np.linalg.norm(update) <= 4 / 8 + READ_BACK


def test_engine_accumulates_the_gradients_of_one_logical_batch():
    """Two backward calls before one optimizer.step are one logical batch: each row is clipped alone, once."""
    case = CASES[0]
    units = case.units([1] * 8)
    inputs, targets, _ = stack(units)
    engine, module, optimizer, _ = make_private(case.module(), units, 8, loss_reduction="sum")
    before = flat_parameters(module)
    criterion = torch.nn.CrossEntropyLoss(reduction="sum")
    optimizer.zero_grad()
    criterion(module(inputs[:3]), targets[:3]).backward()
    criterion(module(inputs[3:]), targets[3:]).backward()
    optimizer.step()
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 1.0) / 8
    np.testing.assert_allclose(before - flat_parameters(module), expected, atol=SLACK)
    assert engine is not None
