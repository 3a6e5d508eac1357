"""Invariant 1, second half: NaN or Inf in one unit's gradient removes that unit and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import flat_parameters
from tests.privacy.harness import engine_step, make_private, released
from tests.privacy.nets import CASES, FLOAT_CASES, stack

BAD = [float("nan"), float("inf"), float("-inf")]
READ_BACK = 3e-6


def poisoned(unit, value, row=0):
    """The unit with one cell of one row replaced."""
    inputs = unit[0].clone()
    inputs[row, 1] = value
    return inputs, unit[1]


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda c: c.name)
def test_a_unit_that_is_not_finite_is_removed_alone(case, rows, value):
    """One cell of one row: the whole unit goes, the release is that of the other units to the last bit
    read."""
    units = case.units([rows] * 5)
    bad = [*units[:2], poisoned(units[2], value, row=rows - 1), *units[3:]]
    without = [*units[:2], *units[3:]]
    np.testing.assert_allclose(released(case, bad), released(case, without), atol=READ_BACK)


@pytest.mark.parametrize("value", BAD, ids=str)
def test_ragged_units_lose_only_the_bad_one(value):
    case = CASES[0]
    units = case.units([2, 5, 1, 3])
    bad = [units[0], poisoned(units[1], value, row=4), *units[2:]]
    np.testing.assert_allclose(released(case, bad), released(case, [units[0], *units[2:]]), atol=READ_BACK)


@pytest.mark.parametrize("value", [1e38, -1e38, 3e25, 1e20])
@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda c: c.name)
def test_a_huge_unit_contributes_at_most_c(case, value):
    """1e38 may or may not overflow on its way; either way it moves the release by at most C and stays
    finite."""
    units = case.units([1] * 5)
    bad = [*units[:2], poisoned(units[2], value), *units[3:]]
    without = [*units[:2], *units[3:]]
    moved = released(case, bad) - released(case, without)
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= 1.0 + READ_BACK


@pytest.mark.parametrize("value", [1e-42, -0.0, 1e-38])
def test_subnormal_cells_change_nothing_else(value):
    case = CASES[0]
    units = case.units([1] * 5)
    bad = [*units[:2], poisoned(units[2], value), *units[3:]]
    without = [*units[:2], *units[3:]]
    moved = released(case, bad) - released(case, without)
    assert 0.0 < np.linalg.norm(moved) <= 1.0 + READ_BACK


@pytest.mark.parametrize("value", BAD, ids=str)
def test_a_batch_of_only_bad_units_releases_zero(value):
    case = CASES[0]
    units = [poisoned(u, value) for u in case.units([1] * 4)]
    assert np.array_equal(released(case, units), np.zeros_like(released(case, units)))


def test_an_embedding_unit_with_a_loss_of_nan_is_removed():
    """Ids cannot be NaN; the weight of the record's loss can."""
    from tests.privacy.harness import make_trainer
    from tests.privacy.nets import row_losses

    case = next(c for c in CASES if c.name == "embedding")
    units = case.units([1] * 4)
    module = case.module()
    trainer = make_trainer(module)
    before = flat_parameters(module)
    inputs, targets, _ = stack(units)
    with trainer.capture():
        losses = row_losses(module, inputs, targets) * torch.tensor([1.0, torch.nan, 1.0, torch.inf])
    trainer.backward(losses, rows_per_unit=1)
    trainer.apply()
    moved = before - flat_parameters(module)
    np.testing.assert_allclose(moved, released(case, [units[0], units[2]]), atol=READ_BACK)


@pytest.mark.parametrize("value", [*BAD, 1e38], ids=str)
def test_engine_removes_a_bad_row_of_the_user_s_batch(value):
    """Through the user's own criterion: the mean over the rows is NaN, the release is not."""
    case = CASES[0]
    units = case.units([1] * 6)
    bad = [*units[:2], poisoned(units[2], value), *units[3:]]
    inputs, targets, _ = stack(bad)
    keep = torch.arange(6) != 2
    with_bad = engine_step(make_private(case.module(), units, 6), inputs, targets)
    without = engine_step(make_private(case.module(), units, 6), inputs[keep], targets[keep])
    assert np.isfinite(with_bad).all()
    if value == 1e38:
        assert np.linalg.norm(with_bad - without) <= 1 / 6 + READ_BACK
    else:
        np.testing.assert_allclose(with_bad, without, atol=READ_BACK)
