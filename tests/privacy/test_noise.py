"""Invariant 3: exactly one N(0, (sigma C)^2) per released coordinate and logical step.

A network whose gradient is zero releases nothing but its noise: weights start at zero, inputs are zero, the
optimizer is SGD at learning rate 1. A million coordinates are then compared with the normal law.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients
from tests.privacy.harness import accumulate, engine_step, make_plan, make_private, make_trainer, step
from tests.privacy.nets import CASES, unit_loss
from tests.privacy.stats import assert_gaussian, assert_uncorrelated

SIGMA, CLIP, EXPECTED = 1.7, 0.5, 4
STD = SIGMA * CLIP / EXPECTED
NOISY = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": EXPECTED}


def silent_module(width: int = 1000) -> nn.Module:
    """A linear layer without bias, all zeros: width * width coordinates."""
    module = nn.Linear(width, width, bias=False)
    nn.init.zeros_(module.weight)
    return module


def silent_units(count: int, width: int = 1000) -> list:
    """Units whose gradient is zero for that layer."""
    return [(torch.zeros(1, width), torch.zeros(1, dtype=torch.int64)) for _ in range(count)]


def one_release(keys=None, physical: int = 1, width: int = 1000) -> np.ndarray:
    """The noise that one logical step of `physical` batches adds, [width^2]."""
    module = silent_module(width)
    trainer = make_trainer(module, keys=keys, **NOISY)
    return step(trainer, module, [silent_units(2, width)] * physical)


def test_the_gate_sees_one_percent():
    """The test of the test: 1e6 normals pass at their own scale and fail at 1% more or less."""
    values = np.random.default_rng(7).standard_normal(1_000_000)
    assert_gaussian(values, 1.0)
    for wrong in (0.99, 1.01):
        with pytest.raises(AssertionError):
            assert_gaussian(values, wrong)


@pytest.mark.parametrize("physical", [1, 2, 8])
def test_noise_is_exact_and_once_per_logical_step(physical):
    """Whatever the number of physical batches, the variance is that of one draw of the normal."""
    assert_gaussian(one_release(physical=physical), STD)


def test_noise_has_the_resolution_of_fp32():
    """bf16 or half noise has a few thousand values; fp32 noise hardly ever repeats one."""
    noise = one_release()
    assert len(np.unique(noise)) > 0.9 * len(noise)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_noise_reaches_every_optimizer_at_the_same_scale(kind):
    """With no memory and a huge eps, lr / (sqrt(v) + eps) is 1: the update is the noisy mean itself."""
    from synthward.engine import KeySchedule, PrivateTrainer

    flat = {"lr": 1e6, "eps": 1e6}
    settings = {
        "SGD": {"lr": 1.0, "momentum": 0.9},
        "Adam": flat | {"betas": (0.0, 0.0)},
        "AdamW": flat | {"betas": (0.0, 0.0), "weight_decay": 0.0},
        "RMSprop": flat | {"alpha": 0.0},
        "Adagrad": flat,
    }[kind]
    module = silent_module()
    optimizer = getattr(torch.optim, kind)(module.parameters(), **settings)
    trainer = PrivateTrainer(module, optimizer, make_plan(**NOISY), keys=KeySchedule.from_os(), ledger=None)
    assert_gaussian(step(trainer, module, [silent_units(2)]), STD)


def test_noise_is_added_to_the_clipped_sum():
    """Mean over 4000 reproducible-by-nobody steps: the released sum is the oracle's plus centred noise."""
    case = CASES[0]
    module, units = case.module(), case.units([1] * 5)
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), CLIP) / EXPECTED
    start = {k: v.clone() for k, v in module.state_dict().items()}
    trainer = make_trainer(module, **(NOISY | {"steps": 4000}))
    total, square, repeats = np.zeros_like(expected), 0.0, 400
    for _ in range(repeats):
        module.load_state_dict(start)
        sum_ = step(trainer, module, [units])
        total += sum_
        square += float(((sum_ - expected) ** 2).sum())
    count = repeats * len(expected)
    assert abs(square / count / STD**2 - 1) < 6.11 * (2 / count) ** 0.5
    assert np.abs(total / repeats - expected).max() < 7.5 * STD / repeats**0.5


def test_an_all_masked_batch_still_adds_the_whole_noise():
    module = silent_module()
    before = flat_parameters(module)
    trainer = make_trainer(module, **NOISY)
    accumulate(trainer, module, silent_units(3), [False] * 3)
    trainer.apply()
    assert_gaussian(before - flat_parameters(module), STD)


def test_a_step_without_any_physical_batch_still_adds_the_whole_noise():
    module = silent_module()
    before = flat_parameters(module)
    trainer = make_trainer(module, **NOISY)
    trainer.apply()
    assert_gaussian(before - flat_parameters(module), STD)


def test_steps_do_not_share_noise():
    module = silent_module(300)
    trainer = make_trainer(module, **NOISY)
    first, second, third = (step(trainer, module, [silent_units(2, 300)]) for _ in range(3))
    # Reading back from a moved parameter rounds at 1e-8: far below what matters here.
    assert_uncorrelated(first, second)
    assert_uncorrelated(first, third)
    assert_uncorrelated(second, third)


def test_tensors_of_one_shape_do_not_share_noise():
    module = nn.Sequential(*[silent_module(200) for _ in range(3)])
    trainer = make_trainer(module, **NOISY)
    parts = np.split(step(trainer, module, [silent_units(2, 200)]), 3)
    assert_uncorrelated(parts[0], parts[1])
    assert_uncorrelated(parts[0], parts[2])
    assert_uncorrelated(parts[1], parts[2])


def seed_everything() -> None:
    """Every global random state that a program may fix."""
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - the legacy global state is what is under test
    random.seed(123)


def test_global_seeds_do_not_fix_the_noise():
    releases = []
    for _ in range(2):
        seed_everything()
        releases.append(one_release(width=300))
    assert_uncorrelated(*releases)


def test_global_seeds_do_not_fix_the_engine_s_noise():
    releases = []
    for _ in range(2):
        seed_everything()
        private = make_private(silent_module(300), silent_units(4, 300), 4, noise_multiplier=SIGMA)
        releases.append(
            engine_step(private, torch.zeros(4, 300), torch.zeros(4, dtype=torch.int64)),
        )
    assert_uncorrelated(*releases)


def test_the_engine_s_noise_is_exact():
    """Through `make_private`: std sigma C / batch size."""
    private = make_private(
        silent_module(), silent_units(5), 5, noise_multiplier=SIGMA, max_grad_norm=CLIP, loss_reduction="mean"
    )
    noise = engine_step(private, torch.zeros(5, 1000), torch.zeros(5, dtype=torch.int64))
    assert_gaussian(noise, SIGMA * CLIP / 5)


def test_noise_does_not_touch_the_global_random_state():
    """A library that draws from the user's generators changes experiments, and invites the reverse."""
    module = silent_module(50)
    trainer = make_trainer(module, **NOISY)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    step(trainer, module, [silent_units(2, 50)])
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


def test_sigma_zero_adds_nothing():
    module = silent_module(50)
    assert np.array_equal(step(make_trainer(module), module, [silent_units(2, 50)]), np.zeros(2500))
