"""Loops on several ranks that go wrong on one of them. Every function is called on all ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from synthward import PrivacyEngine
from synthward.engine import KeySchedule, Ledger, PrivateTrainer
from synthward.engine.distributed.ledger import SharedLedger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import SynthwardError
from tests.distributed.cases import spread, whole
from tests.privacy.harness import make_plan
from tests.privacy.rank_scenes import NOISY, network, pass_over, records, trainer_of

# Of four units at a rate of a half: the draws of this seed's key are [1] and [0, 1], so that of two ranks the second
# has nothing of the first draw, and unit 1 of the second draw.
SEED_OF_EMPTY = 0


def outcome(module: nn.Module, before: np.ndarray, error: SynthwardError | None) -> dict[str, Any]:
    """The error's class and text, and how far parameters moved from `before`."""
    moved = float(np.abs(parameters_of(module) - before).max())
    return {"kind": type(error).__name__ if error else "", "text": str(error or ""), "moved": moved}


def parameters_of(module: nn.Module) -> np.ndarray:
    return np.concatenate([whole(p).ravel().astype(np.float64) for p in module.parameters()])


def engine_over(
    module: nn.Module, data: Any, *, seed: int | None = None, **settings: Any
) -> tuple[Any, Any, PrivacyEngine]:
    """Optimizer and loader of a module that was made private, without noise unless it is asked for."""
    engine = PrivacyEngine(seed=seed)
    wanted = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "loss_reduction": "sum", **settings}
    _, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=2),
        **wanted,
    )
    return optimizer, loader, engine


def units_of_their_own(count: int) -> TensorDataset:
    """Each has a coordinate of the gradient for itself, and is clipped."""
    return TensorDataset(100.0 * torch.eye(count), torch.zeros(count))


def skips_empty_batches(how: str) -> dict[str, Any]:
    """A loop that leaves batches without rows out, as many do; "exchanged": replicas without memory in common."""
    with patch.dict(os.environ, {"SYNTHWARD_HOST_MEMORY": "off"} if how == "exchanged" else {}):
        return _skips_empty_batches("replicas" if how == "exchanged" else how)


def _skips_empty_batches(how: str) -> dict[str, Any]:
    module: nn.Module = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(module.weight)  # type: ignore[arg-type]
    spread(module, how)
    settings = {"sample_rate": 0.5, "expected_batch_size": 1.0}
    optimizer, loader, _ = engine_over(module, units_of_their_own(4), seed=SEED_OF_EMPTY, **settings)
    before, draws = parameters_of(module), []
    try:
        for x, _ in loader:
            if not len(x):
                continue
            draws.append(loader.draw.index)
            optimizer.zero_grad()
            module(x).sum().backward()
            optimizer.step()
            break
    except SynthwardError as error:
        return {"draws": draws, **outcome(module, before, error)}
    return {"draws": draws, **outcome(module, before, None)}


def counts_a_step_more(how: str, rank: int) -> dict[str, Any]:
    """One rank is at its third step, the other at its second."""
    module = network(how)
    trainer = trainer_of(module, **NOISY)
    pass_over(trainer, module, records(2))
    trainer.apply()
    before, error = parameters_of(module), None
    if dist.get_rank() == rank:
        trainer.advance_to(2)
    try:
        pass_over(trainer, module, records(2))
        trainer.apply()
    except SynthwardError as raised:
        error = raised
    return outcome(module, before, error)


def has_a_part_of_the_records(how: str) -> str:
    """Each rank has given its loader what it was going to train on: rows of its own, or the same under other ids."""
    rank, module, settings = dist.get_rank(), nn.Linear(4, 1), {"sample_rate": 0.5}
    records = units_of_their_own(8)
    data: Any = records
    if how == "tensors":
        data = TensorDataset(*(tensor[rank::2] for tensor in records.tensors))
    elif how == "subset":
        data = Subset(records, range(rank, 8, 2))
    else:
        settings["unit_ids"] = [rank, 2, 2, 3, 3, 4, 4, 4]
    try:
        engine_over(module, data, **settings)
    except SynthwardError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unit_on_two_ranks(how: str, is_apart: bool) -> dict[str, Any]:
    """A loader of each rank's own, and ids: those of rank 0 and rank 1 have one in common, or none."""
    module = network(how)
    optimizer, _, engine = engine_over(module, TensorDataset(records(2)), poisson_sampling=False)
    before, first = parameters_of(module), 2 if is_apart else 1
    try:
        with engine.units([7, 8] if dist.get_rank() == 0 else [7 + first, 8 + first]):
            module(records(2)).sum().backward()
        optimizer.step()
    except SynthwardError as error:
        return outcome(module, before, error)
    return outcome(module, before, None)


def arranges_in_the_third_batch(how: str) -> tuple[int, str]:
    """A hook of the second layer that mixes rows of large values: the step at which that is refused, and its text."""
    module = network("replicas")
    module[2].register_forward_pre_hook(_mix_large)
    spread(module, how)
    trainer = trainer_of(module, **NOISY)
    for step in range(4):
        # The same on both ranks, so that both see it.
        x = records(4) * (100.0 if step == 2 else 1.0)
        try:
            pass_over(trainer, module, x)
        except SynthwardError as error:
            return step, str(error)
        trainer.apply()
    return 4, ""


def _mix_large(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = arguments
    # By what the rows hold, and never so that each stays in its place.
    shifted = (torch.arange(len(x)) + 1 + x[:, 0].argmax() % (len(x) - 1)) % len(x)
    order = torch.where(x.abs().max() > 20.0, shifted, torch.arange(len(x)))
    return (x[order],)


def parameter_in_a_hook(how: str) -> np.ndarray:
    """The parameters after a step of a layer whose output a hook multiplies by a parameter of it."""
    module = network("replicas")
    module[0].scale = nn.Parameter(torch.full((7,), 0.5))
    module[0].register_forward_hook(lambda layer, _, out: out * layer.scale)
    spread(module, how)
    trainer = trainer_of(module, max_grad_norm=0.5)
    pass_over(trainer, module, records(8)[dist.get_rank() :: 2])
    trainer.apply()
    return parameters_of(module)


def frozen_values() -> list[np.ndarray]:
    """Of a network whose first layer is not trained, begun with other values on each rank, of a type that gloo does not
    know."""
    torch.manual_seed(dist.get_rank())
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    module[0].requires_grad_(False)
    packed = torch.randint(-9, 9, (4,), dtype=torch.int16)
    module[0].packed = nn.Parameter(packed, requires_grad=False)
    trainer_of(module, torch.optim.SGD(module[1].parameters(), lr=1.0), **NOISY)
    return [whole(p) for p in module.parameters()]


def other_plan_or_lease(folder: str, what: str) -> tuple[str, int]:
    """Rank 1 goes on by another sampling rate than rank 0, which charges for all: the refusal, and what was charged."""
    ranks, keys = Ranks.current(), KeySchedule.shared(Ranks.current())
    kept = None
    if ranks.is_main:
        settings: dict[str, Any] = {
            "unit": "row",
            "delta": 1e-5,
            "private": True,
            "adaptive": True,
            "accountant": "rdp",
        }
        path = Path(folder) / f"{what}.jsonl"
        kept = Ledger.create(path, run_id="r", key_id=keys.key_id, target_epsilon=8.0, **settings)
    ledger, module = SharedLedger(ranks, kept), network("replicas")
    trainer = trainer_of(module, keys=keys, ledger=ledger, **NOISY, sample_rate=0.01)
    plan = replace(trainer.plan, sample_rate=0.02 if ranks.is_main else 0.03)
    text = ""
    try:
        if what == "plan":
            trainer.adapt(plan)
        else:
            ledger.lease(plan.event(1), 0, 1)
    except SynthwardError as error:
        text = f"{type(error).__name__}: {error}"
    charged = len(ledger.events())
    if kept is not None:
        kept.close()
    return text, charged


def joined_late() -> tuple[str, float]:
    """A trainer that is there before the group. To be started without one."""
    module = nn.Linear(5, 3)
    trainer = trainer_of(module, keys=KeySchedule.from_os(), **NOISY)
    dist.init_process_group("gloo")
    before = parameters_of(module)
    try:
        trainer.apply()
    except SynthwardError as error:
        return str(error), float(np.abs(parameters_of(module) - before).max())
    return "", float(np.abs(parameters_of(module) - before).max())


def noise_of_another_stream(how: str) -> dict[str, Any]:
    """Rank 0 has trained alone under the same key before: its noise would come from another stream than that of the
    others, whose stream that training has used."""
    keys = KeySchedule.shared(Ranks.current())
    if dist.get_rank() == 0:
        alone = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        PrivateTrainer(alone, optimizer, make_plan(**NOISY), keys=keys, ranks=Ranks.alone()).apply()
    module = network(how)
    trainer = trainer_of(module, keys=keys, **NOISY)
    before = parameters_of(module)
    try:
        trainer.apply()
    except SynthwardError as error:
        return outcome(module, before, error)
    return outcome(module, before, None)
