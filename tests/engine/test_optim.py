"""The fused update is torch's own rule; any other optimizer takes its own step on the noised mean."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import DPAdamBC, KeySchedule, PrivacyPlan, PrivateTrainer
from synthward.engine.errors import BudgetExceededError, CheckpointError, ConfigError, PrivacyError
from synthward.engine.optim import FusedAdam, FusedAdamBC, FusedSgd, TorchUpdate
from tests.engine.nets import accumulate, make_trainer
from tests.oracles import flat_parameters

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, FusedSgd),
    "sgd_momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        FusedSgd,
    ),
    "sgd_nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, FusedSgd),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}, FusedAdam),
    "adam_l2": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}, FusedAdam),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, FusedAdam),
    "adam_bc": (DPAdamBC, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}, FusedAdamBC),
    "adam_amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, TorchUpdate),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}, TorchUpdate),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}, TorchUpdate),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))


def build(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over two groups; the second learns three times as fast."""
    kind, options, _ = OPTIMIZERS[name]
    groups = [{"params": module[0].parameters()}, {"params": module[2].parameters(), "lr": 3 * options["lr"]}]
    return kind(groups, **options)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam_bc"])
def test_without_noise_and_clipping_it_is_the_torch_optimizer(name):
    """Eight steps with a learning rate schedule: the private run and plain torch stay together."""
    plain, private = network(), network()
    ordinary, wrapped = build(name, plain), build(name, private)
    trainer = make_trainer(private, wrapped, max_grad_norm=1e6, expected_batch_size=4.0)
    assert type(trainer._step.updater) is OPTIMIZERS[name][2]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (ordinary, wrapped)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        x = torch.randn(4, 5, generator=generator)
        ordinary.zero_grad()
        plain(x).square().sum(1).mean().backward()
        ordinary.step()
        with trainer.capture():
            losses = private(x).square().sum(1)
        trainer.backward(losses, rows_per_unit=1)
        wrapped._opt_called = True  # what the schedule looks for, to warn about its order
        trainer.apply()
        for schedule in schedules:
            schedule.step()
    np.testing.assert_allclose(flat_parameters(private), flat_parameters(plain), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_round_trip(name):
    """Three steps, saved, two more; and the same two from the saved state in a fresh network."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))

    def trained(trainer, module, steps):
        for _ in range(steps):
            with trainer.capture():
                losses = module(x).square().sum(1)
            trainer.backward(losses, rows_per_unit=1)
            trainer.apply()
        return flat_parameters(module)

    module = network()
    trainer = make_trainer(module, build(name, module))
    trained(trainer, module, 3)
    saved = trainer.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in saved.values())
    expected = trained(trainer, module, 2)
    fresh = network()
    again = make_trainer(fresh, build(name, fresh))
    again.load_state_dict(copy.deepcopy(saved))
    assert again.steps_done == 3
    np.testing.assert_array_equal(trained(again, fresh, 2), expected)


def test_noise_of_two_trainers_of_one_key_differs():
    """The same schedule given twice, and a rolled back step: no stream of noise is used again."""
    keys, updates = KeySchedule.from_os(), []
    plan = PrivacyPlan(0.1, 1.0, 1.0, 100, 1.0)
    for _ in range(2):
        module = network()
        trainer = PrivateTrainer(module, torch.optim.SGD(module.parameters(), lr=1.0), plan, keys=keys)
        saved = trainer.state_dict()
        for _ in range(2):
            before = flat_parameters(module)
            trainer.apply()
            updates.append(before - flat_parameters(module))
            trainer.load_state_dict(saved)
    for i, first in enumerate(updates):
        for second in updates[:i]:
            assert np.abs(first - second).max() > 0.01


def test_the_steps_of_the_plan_are_all_there_are():
    module = network()
    trainer = make_trainer(module, steps=2, noise_multiplier=1.0)
    trainer.apply()
    trainer.apply()
    before = flat_parameters(module)
    with pytest.raises(BudgetExceededError):
        trainer.apply()
    assert np.array_equal(before, flat_parameters(module))


def test_steps_lost_in_a_crash_are_not_taken_again():
    trainer = make_trainer(network(), steps=10)
    trainer.advance_to(8)
    trainer.apply()
    with pytest.raises(PrivacyError):
        trainer.advance_to(3)
    trainer.apply()
    with pytest.raises(BudgetExceededError):
        trainer.apply()


def test_a_moved_parameter_is_noticed():
    module = network()
    trainer = make_trainer(module)
    module[0].weight.data = module[0].weight.data.clone()
    with pytest.raises(PrivacyError, match=r"0\.weight"):
        trainer.apply()


def test_loading_a_state_dict_into_the_module_is_fine():
    module, other = network(), nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    trainer = make_trainer(module)
    module.load_state_dict(other.state_dict())
    accumulate(trainer, module, torch.randn(3, 5), [1] * 3)
    trainer.apply()
    assert not np.array_equal(flat_parameters(module), flat_parameters(other))


def test_a_checkpoint_of_another_network_changes_nothing():
    trainer = make_trainer(network())
    saved = trainer.state_dict()
    other = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3))
    before = flat_parameters(other)
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        make_trainer(other).load_state_dict(saved)
    with pytest.raises(CheckpointError):
        make_trainer(nn.Linear(2, 2)).load_state_dict(saved)
    assert np.array_equal(before, flat_parameters(other))


def test_an_optimizer_must_hold_every_trainable_parameter():
    module = network()
    with pytest.raises(ConfigError, match=r"2\.weight, 2\.bias"):
        make_trainer(module, torch.optim.SGD(module[0].parameters(), lr=1.0))
