"""Runs one or more logical steps of the private trainer or of `PrivacyEngine`, and reads the released sum
back.

With plain SGD at learning rate 1 and no noise, `parameters before - parameters after` is exactly what a step
releases: the clipped sum over units, divided by the public expected batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracles import flat_parameters
from tests.privacy.nets import Unit, row_losses, stack

Batch = list[tuple[Unit, bool]]  # units of one physical batch, each with its mask


def make_plan(**changes: Any) -> Any:
    """A `PrivacyPlan` without noise, of sum = update (expected batch 1), with fields changed by keyword."""
    from synthward.engine import PrivacyPlan

    fields: dict[str, Any] = {
        "sample_rate": 0.5,
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "steps": 10,
        "expected_batch_size": 1,
    }
    return PrivacyPlan(**(fields | changes))


def make_trainer(
    module: nn.Module, *, keys: Any = None, ledger: Any = None, lr: float = 1.0, **plan: Any
) -> Any:
    """A `PrivateTrainer` with SGD (lr 1 unless told) and keys from the operating system unless given."""
    from synthward.engine import KeySchedule, PrivateTrainer

    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    return PrivateTrainer(
        module, optimizer, make_plan(**plan), keys=keys or KeySchedule.from_os(), ledger=ledger
    )


def accumulate(
    trainer: Any, module: nn.Module, units: Sequence[Unit], mask: Sequence[bool] | None = None
) -> None:
    """One physical batch: forward under capture, one loss per unit, backward. Uniform units go by
    rows_per_unit."""
    inputs, targets, offsets = stack(units)
    counts = offsets.diff()
    with trainer.capture():
        losses = row_losses(module, inputs, targets)
    per_unit = torch.zeros(len(units)).index_add(
        0, torch.repeat_interleave(torch.arange(len(units)), counts), losses
    )
    uniform = bool((counts == counts[0]).all())
    where = {"rows_per_unit": int(counts[0])} if uniform else {"offsets": offsets}
    unit_mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    trainer.backward(per_unit, unit_mask=unit_mask, **where)


def step(trainer: Any, module: nn.Module, batches: Sequence[Sequence[Unit]]) -> np.ndarray:
    """One logical step over the physical `batches`; returns the released sum (before - after), float64
    [P]."""
    before = flat_parameters(module)
    for units in batches:
        accumulate(trainer, module, units)
    trainer.apply()
    return before - flat_parameters(module)


def released(case: Any, units: Sequence[Unit], **plan: Any) -> np.ndarray:
    """The released sum of one noiseless step of a fresh copy of the case's network over `units`."""
    module = case.module()
    return step(make_trainer(module, **plan), module, [units])


def dummy_loader(inputs: Tensor, targets: Tensor, batch_size: int) -> torch.utils.data.DataLoader[Any]:
    """A loader over given records; only its batch size matters where batches are fed by hand."""
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size)


def make_private(
    module: nn.Module, units: Sequence[Unit], batch_size: int, **changes: Any
) -> tuple[Any, ...]:
    """`PrivacyEngine().make_private` with SGD at lr 1, no noise, no Poisson sampling: (engine, module,
    optimizer, loader)."""
    from synthward import PrivacyEngine

    inputs, targets, _ = stack(units)
    settings: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
    }
    engine = PrivacyEngine(accountant="pld")
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    private = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=dummy_loader(inputs, targets, batch_size),
        **(settings | changes),
    )
    return (engine, *private)


def engine_step(
    private: tuple[Any, ...],
    inputs: Tensor,
    targets: Tensor,
    ids: Tensor | None = None,
    reduction: str = "mean",
) -> np.ndarray:
    """One step in the user's own loop; returns before - after, float64 [P]."""
    engine, module, optimizer, _ = private
    before = flat_parameters(module)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    optimizer.zero_grad()
    if ids is None:
        criterion(module(inputs), targets).backward()
    else:
        with engine.units(ids):
            criterion(module(inputs), targets).backward()
    optimizer.step()
    return before - flat_parameters(module)
