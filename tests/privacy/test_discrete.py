"""Discrete arithmetic: what is released is an integer sum plus an integer Gaussian, and its rounding is accounted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine.errors import PrivacyError, UnsupportedOperationError
from synthward.engine.noise import DiscreteSums
from tests.engine.layers import LAYERS, Net, make_inputs
from tests.oracles import clipped_sum, per_unit_gradients
from tests.privacy.harness import accumulate, make_plan, make_trainer, step
from tests.privacy.nets import CASES, unit_loss
from tests.privacy.stats import assert_gaussian
from tests.privacy.test_noise import CLIP, EXPECTED, NOISY, SIGMA, silent_module, silent_units

DISCRETE = {"arithmetic": "discrete"}


def exact_sums(trainer) -> np.ndarray:
    """What the trainer has summed so far, in units of the grid, float64 [P]."""
    discrete = trainer._step.discrete
    return np.concatenate([s.reshape(-1).numpy() for s in discrete.sums]) / discrete.grid


def summed(case, batches, **plan) -> tuple[np.ndarray, DiscreteSums]:
    module = case.module()
    trainer = make_trainer(module, **(DISCRETE | plan))
    for units in batches:
        accumulate(trainer, module, units)
    return exact_sums(trainer), trainer._step.discrete


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_released_sum_is_the_clipped_sum_of_the_oracle(case):
    units, module = case.units([1, 2, 1, 3]), case.module()
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 0.7)
    found = step(make_trainer(module, max_grad_norm=0.7, **DISCRETE), module, [units])
    assert np.linalg.norm(found - expected) <= 1e-4 * max(np.linalg.norm(expected), 0.7)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_more_unit_moves_the_integers_by_at_most_the_sensitivity(case):
    """After rounding, to the last bit: integers are compared, not floats."""
    units = case.units([1, 2, 3, 1, 2])
    with_all, discrete = summed(case, [units], max_grad_norm=0.3)
    for left_out in range(len(units)):
        without, _ = summed(case, [units[:left_out] + units[left_out + 1 :]], max_grad_norm=0.3)
        moved = np.linalg.norm(np.rint(with_all) - np.rint(without)) * discrete.grid
        assert 0.0 < moved <= discrete.sensitivity


def test_the_sensitivity_covers_rounding_of_every_coordinate():
    module = nn.Linear(200, 50, bias=False)
    discrete = make_trainer(module, max_grad_norm=2.0, **DISCRETE)._step.discrete
    assert discrete.sensitivity >= 2.0 + math.sqrt(10_000) * discrete.grid
    assert discrete.sensitivity <= 2.0 * 1.0005
    assert math.frexp(discrete.grid)[0] == 0.5, "a power of two: dividing by it is exact"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_any_split_gives_the_same_integers(case):
    """fp32 sums would differ in thousands of grid points."""
    units = case.units([1, 2, 1, 3, 1, 1])
    whole, _ = summed(case, [units])
    split, _ = summed(case, [units[:1], units[1:4], units[4:]])
    shuffled, _ = summed(case, [units[::-1]])
    # A unit's own gradient may differ by the last fp32 bit from batch to batch; the sum adds nothing to that.
    own = np.linalg.norm(whole) * 2.0**-20
    assert np.linalg.norm(whole - split) <= own and np.linalg.norm(whole - shuffled) <= own


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_summed_in_fp64(layer):
    """The sums are those of the float mode to fp32, and closer than that to the engine's own factors in fp64: no
    operand is rounded on the way."""

    @settings(max_examples=2, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        torch.manual_seed(data.draw(st.integers(0, 99)))
        drawn = LAYERS[layer](data.draw)
        net = Net(drawn, twice=data.draw(st.booleans()), places=("contiguous", "contiguous"))
        x = make_inputs(drawn, 6)
        start = {k: v.clone() for k, v in net.state_dict().items()}

        def read(arithmetic):
            net.load_state_dict(start)
            trainer = make_trainer(net, max_grad_norm=0.5, arithmetic=arithmetic)
            with trainer.capture():
                out = net(x)
                losses = out.reshape(len(x), -1).square().sum(1).view(3, 2).sum(1)
            trainer.backward(losses, rows_per_unit=2)
            core = trainer._step
            sums = core.flat.sums if core.discrete is None else core.discrete.sums
            found = torch.cat([s.reshape(-1).double() for s in sums])
            core.discard()
            return found

        exact, rounded = read("discrete"), read("float")
        assert exact.dtype == torch.float64
        scale = max(float(exact.norm()), 1e-6)
        assert float((exact - rounded).norm()) <= 1e-5 * max(scale, 0.5)
        if exact.numel() > 8 and float(exact.norm()) > 1e-3:
            assert not torch.equal(exact.float().double(), exact), "all coordinates are fp32 numbers"

    check()


def test_the_noise_is_gaussian_of_the_accounted_scale():
    module = silent_module()
    trainer = make_trainer(module, **(NOISY | DISCRETE))
    found = step(trainer, module, [silent_units(2)])
    std = SIGMA * trainer._step.discrete.sensitivity / EXPECTED
    assert std == pytest.approx(SIGMA * CLIP / EXPECTED, rel=1e-3) and std > SIGMA * CLIP / EXPECTED
    assert_gaussian(found, std)


def test_what_is_released_is_an_integer_on_the_grid():
    """Times the scale of the mean; nothing of the sums' own bits is left."""
    module = silent_module(50)
    trainer = make_trainer(module, noise_multiplier=0.01, max_grad_norm=1.0, **DISCRETE)
    seen = []
    updater = trainer._step.updater
    update = updater.update

    def spy(noise, scale):
        seen.append(trainer._step.flat.summed_grad.double() / trainer._step.discrete.grid)
        update(noise, scale)

    updater.update = spy
    accumulate(trainer, module, [(torch.randn(1, 50), torch.zeros(1, dtype=torch.int64))])
    assert not torch.equal(torch.tensor(exact_sums(trainer)), torch.tensor(exact_sums(trainer)).round())
    trainer.apply()
    assert torch.equal(seen[0], seen[0].round()) and float(seen[0].abs().max()) > 0


def test_an_empty_step_and_a_dropped_one():
    module = silent_module(100)
    trainer = make_trainer(module, **(NOISY | DISCRETE))
    first = step(trainer, module, [])
    assert first.std() > 0.5 * SIGMA * CLIP / EXPECTED
    accumulate(trainer, module, [(torch.randn(1, 100), torch.zeros(1, dtype=torch.int64))])
    trainer._step.discard()
    assert not exact_sums(trainer).any()


def test_nothing_unnoised_is_left_behind():
    module = silent_module(50)
    trainer = make_trainer(module, **(NOISY | DISCRETE))
    accumulate(trainer, module, [(torch.randn(1, 50), torch.zeros(1, dtype=torch.int64))])
    trainer.apply()
    assert not exact_sums(trainer).any() and not trainer._step.flat.summed_grad.any()


def test_computed_weights_are_refused_by_name():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    trainer = make_trainer(module, **DISCRETE)
    with pytest.raises(UnsupportedOperationError, match="discrete"):
        accumulate(trainer, module, [(torch.randn(1, 4), torch.zeros(1, dtype=torch.int64))])


def test_a_step_beyond_the_bound_on_rounding_is_refused():
    module = silent_module(4)
    discrete = make_trainer(module, **DISCRETE)._step.discrete
    discrete.count(1 << 18, 1 << 19)
    with pytest.raises(PrivacyError, match="discrete"):
        discrete.count(1 << 19, 1 << 20)


def test_plan_and_events_are_those_of_the_float_mode():
    assert make_plan(**DISCRETE).event() == make_plan().event()
