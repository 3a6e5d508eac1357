"""Noise that is correlated over steps: its law is that of ``C^-1 z``, its accounting that of what was drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from synthward import PrivacyEngine
from synthward.engine import KeySchedule, Ledger
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.correlation import banded_inverse_strategy, banded_strategy, blt_strategy
from synthward.engine.errors import CheckpointError, ConfigError, PrivacyError
from synthward.kernels import gaussian_noise
from tests.privacy.harness import make_trainer, step
from tests.privacy.stats import assert_gaussian, assert_uncorrelated
from tests.privacy.test_noise import CLIP, NOISY, SIGMA, STD, silent_module, silent_units

STEPS = 12
STRATEGIES = {
    "banded": lambda: banded_strategy(STEPS, 4),
    "blt": lambda: blt_strategy(STEPS, 2, 4),
    "banded_inverse": lambda: banded_inverse_strategy(STEPS, 3),
}


def releases(strategy: Strategy, keys=None, width: int = 100, **plan) -> np.ndarray:
    """What `STEPS` silent steps release, float64 [steps, width^2]."""
    module = silent_module(width)
    trainer = make_trainer(
        module, keys=keys, **(NOISY | {"steps": STEPS, "strategy": strategy, "period": 4} | plan)
    )
    return np.stack([step(trainer, module, [silent_units(1, width)]) for _ in range(STEPS)])


def toeplitz(column: np.ndarray) -> np.ndarray:
    index = np.subtract.outer(np.arange(len(column)), np.arange(len(column)))
    return np.where(index >= 0, np.asarray(column)[np.abs(index)], 0.0)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_noise_of_all_steps_is_the_inverse_strategy_times_white_noise(kind):
    """To rounding, for the key of the run: z is the stream's, step by step."""
    strategy, keys = STRATEGIES[kind](), KeySchedule.from_os()
    found = releases(strategy, keys) / STD
    key = keys.key("noise")
    white = np.stack(
        [gaussian_noise(10_000, key=key, stream=1, step=t).numpy().astype(np.float64) for t in range(STEPS)]
    )
    expected = np.linalg.solve(toeplitz(strategy.column(STEPS)), white)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_strategy_makes_the_noise_white_again(kind):
    """C times the releases has exactly the standard deviation that is accounted, and no step knows another."""
    strategy = STRATEGIES[kind]()
    white = toeplitz(strategy.column(STEPS)) @ releases(strategy)
    assert_gaussian(white.ravel(), STD)
    for first, second in ((0, 1), (3, 4), (2, 9)):
        assert_uncorrelated(white[first], white[second])


def test_prefix_sums_carry_less_noise_than_with_fresh_noise():
    """What it is for: at the same noise on one participation."""
    strategy = banded_strategy(STEPS, 4)
    correlated = np.cumsum(releases(strategy), axis=0)[-1].std()
    assert correlated < 0.8 * STD * STEPS**0.5


def test_a_physical_split_does_not_change_the_noise():
    strategy, width = STRATEGIES["blt"](), 50
    found = []
    for batches in (1, 3):
        module = silent_module(width)
        trainer = make_trainer(
            module, keys=KeySchedule.reproducible(3), **(NOISY | {"strategy": strategy, "period": 4})
        )
        found.append([step(trainer, module, [silent_units(1, width)] * batches) for _ in range(5)])
    assert np.array_equal(*found)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_every_optimizer_gets_the_correlated_noise(optimizer):
    """With no memory and a huge eps, the update is the noisy mean itself."""
    from synthward.engine import PrivateTrainer
    from tests.privacy.harness import make_plan

    strategy, keys, width = STRATEGIES["banded"](), KeySchedule.from_os(), 100
    module = silent_module(width)
    settings = {"betas": (0.0, 0.0)} if optimizer is torch.optim.Adam else {"alpha": 0.0}
    trainer = PrivateTrainer(
        module,
        optimizer(module.parameters(), lr=1e6, eps=1e6, **settings),
        make_plan(**(NOISY | {"strategy": strategy, "period": 4})),
        keys=keys,
    )
    found = np.stack([step(trainer, module, [silent_units(1, width)]) for _ in range(6)])
    white = toeplitz(strategy.column(6)) @ found
    assert_gaussian(white.ravel(), STD)


def test_correlated_noise_does_not_go_back():
    """A checkpoint loaded over steps that were taken would leave the mechanism that is accounted."""
    strategy, module = STRATEGIES["banded"](), silent_module(20)
    trainer = make_trainer(module, **(NOISY | {"strategy": strategy, "period": 4}))
    before = trainer.state_dict()
    trainer.load_state_dict(before)
    step(trainer, module, [silent_units(1, 20)])
    with pytest.raises(CheckpointError, match="correlated"):
        trainer.load_state_dict(before)


def test_no_state_of_the_noise_is_in_a_checkpoint():
    """Past noise would take itself out of what was released."""
    strategy, module = STRATEGIES["blt"](), silent_module(20)
    trainer = make_trainer(module, **(NOISY | {"strategy": strategy, "period": 4}))
    step(trainer, module, [silent_units(1, 20)])
    assert set(trainer.state_dict()) == {"parameter.weight", "step"}


def test_an_update_that_failed_half_way_ends_the_mechanism(monkeypatch):
    strategy, module = STRATEGIES["banded"](), silent_module(20)
    trainer = make_trainer(module, **(NOISY | {"strategy": strategy, "period": 4}))
    step(trainer, module, [silent_units(1, 20)])
    updater = trainer._step.updater
    with monkeypatch.context() as patch:
        patch.setattr(updater, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.apply()
    with pytest.raises(PrivacyError, match="half way"):
        trainer.apply()


# In the user's own loop


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((4,), float(index)), torch.tensor(index % 2)


def private(tmp_path, **changes):
    ledger = Ledger.create(
        tmp_path / "ledger.jsonl", run_id="r", unit="row", delta=1e-5, key_id="0" * 32, private=True
    )
    engine = PrivacyEngine(ledger=ledger)
    module = nn.Linear(4, 2)
    settings = {
        "noise_multiplier": 2.0,
        "max_grad_norm": 1.0,
        "sample_rate": 0.5,
        "expected_batch_size": 8.0,
        "strategy": banded_strategy(16, 4),
        "period": 4,
    }
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return engine, *engine.make_private(
        module=module, optimizer=optimizer, data_loader=loader, **(settings | changes)
    )


def train(module, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()


def test_the_loop_s_steps_are_charged_as_one_mechanism(tmp_path):
    from synthward.engine.accounting import epsilon_of
    from synthward.engine.accounting.events import PoissonGaussianEvent

    engine, module, optimizer, loader = private(tmp_path)
    assert len(loader) == 8, "a pass is period / q steps"
    train(module, optimizer, loader)
    expected = epsilon_of([PoissonGaussianEvent(0.5, 2.0, 2)], 1e-5)
    assert engine.get_epsilon(1e-5) == pytest.approx(expected, rel=1e-9)
    engine.close()
    assert engine.ledger.epsilon() == pytest.approx(expected, rel=1e-9)


def test_a_batch_left_out_is_refused(tmp_path):
    _, module, optimizer, loader = private(tmp_path)
    batches = iter(loader)
    train(module, optimizer, [next(batches)])
    next(batches)
    with pytest.raises(PrivacyError, match="left out"):
        train(module, optimizer, [next(batches)])


def test_correlated_noise_needs_the_engine_s_draws(tmp_path):
    with pytest.raises(ConfigError, match="poisson_sampling"):
        private(tmp_path, poisson_sampling=False, sample_rate=None)


def test_noise_is_calibrated_for_the_whole_mechanism(tmp_path):
    engine = PrivacyEngine()
    module = nn.Linear(4, 2)
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(Rows(), batch_size=8),
        target_epsilon=2.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        sample_rate=0.5,
        expected_batch_size=8.0,
        strategy=banded_strategy(16, 4),
        period=4,
    )
    for _ in range(2):
        train(module, optimizer, loader)
    assert 1.99 < engine.get_epsilon(1e-5) <= 2.0


def test_the_accounted_noise_is_over_the_clip():
    assert pytest.approx(SIGMA * CLIP / 4) == STD
