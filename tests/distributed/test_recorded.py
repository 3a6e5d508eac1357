"""Recorded passes on several ranks release what one process does by passes as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer
from tests.distributed.launch import run_ranks
from tests.engine.nets import row_losses

STEPS, UNITS = 6, 8


def train(*, is_recorded: bool, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Parameters after a few steps of two physical batches each, this rank's share of them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    plan = PrivacyPlan(
        sample_rate=0.1, noise_multiplier=0.5, max_grad_norm=0.7, steps=STEPS, expected_batch_size=2 * UNITS
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    trainer = PrivateTrainer(module, optimizer, plan, keys=KeySchedule.reproducible(4))
    run = trainer.compile(lambda x: row_losses(module, x))
    share = slice(rank * UNITS // world_size, (rank + 1) * UNITS // world_size)
    for step in range(STEPS):
        for part in range(2):
            x = torch.randn(UNITS, 6, generator=torch.Generator().manual_seed(10 * step + part))[share]
            if is_recorded:
                run(x, is_last=part == 1)
                continue
            with trainer.capture():
                losses = row_losses(module, x)
            trainer.backward(losses, rows_per_unit=1, is_last=part == 1)
        trainer.apply()
    return torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()


def on_rank() -> np.ndarray:
    group = torch.distributed
    return train(is_recorded=True, rank=group.get_rank(), world_size=group.get_world_size())


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["on", "off"])
def test_the_same_is_released(monkeypatch, world_size, memory):
    monkeypatch.setenv("SYNTHWARD_HOST_MEMORY", memory)
    expected = train(is_recorded=False)
    for found in run_ranks(world_size, "tests.distributed.test_recorded:on_rank"):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
