"""Training runs that must come out the same on any number of ranks.

A `Case` says what is trained and how it is spread; `train` runs it on the ranks that are there, one process included,
and hands back all that a test may compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from synthward.engine import DPAdamBC, KeySchedule, Ledger, PerfSpec, PrivacyPlan, PrivateTrainer
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.distributed.ledger import SharedLedger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.sampling import physical_batches
from synthward.engine.spec import ClipSpec
from synthward.kernels import _check
from tests.engine.nets import Mixed, Tied, mixed_inputs, unit_losses

STEPS, UNITS, SEED = 20, 24, 5
SIGMA, CLIP, EXPECTED, RATE = 1.0, 0.5, 6.0, 0.25
# Rows of each unit where they differ.
RAGGED = [1 + (3 * unit) % 4 for unit in range(UNITS)]

STRATEGIES = {
    "banded": Strategy("banded", (1.0, 0.5, 0.25)),
    "blt": Strategy("blt", (0.3, 0.2), (0.95, 0.4)),
    "banded_inverse": Strategy("banded_inverse", (1.0, -0.5, -0.125)),
}


class Convolved(nn.Module):
    """Convolutions over one axis and over two, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(1, 3, 2)
        self.plane = nn.Conv2d(1, 2, (2, 3), bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 5]."""
        lines = F.silu(self.line(x.unsqueeze(1)))
        return self.head(self.norm(self.plane(lines.unsqueeze(1)).flatten(1)))


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3)
    )


# "few" has parameters of fewer rows than there are ranks; "wide" is exchanged in several pieces.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    "tied": Tied,
    "conv": Convolved,
    "mlp": lambda: _perceptron(7),
    "wide": lambda: _perceptron(800),
    "few": lambda: nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1)),
}

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95)}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "adam_bc": (DPAdamBC, {"lr": 0.005, "betas": (0.8, 0.95), "min_second_moment": 2e-3}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9}),
}

CLIPPINGS: dict[str, ClipSpec] = {
    "flat": ClipSpec(CLIP),
    "per-layer": ClipSpec(CLIP, "per-layer"),
    "automatic": ClipSpec(CLIP, "automatic"),
    "adaptive": ClipSpec(CLIP, "adaptive", count_noise=4.0),
    "grouped": ClipSpec(CLIP, "grouped", groups=("head.", "norm.")),
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        noise: "fresh", "discrete", "none", or a strategy by name.
        physical: units of a physical batch.
        spread: "replicas"; "whole" or "blocks": sharded as one, or each layer and then the rest.
        groups: optimizer groups.
        rows: "equal": two rows a unit; "ragged": `RAGGED`, and none for what pads a batch.
        last: "told": the last physical batch is said to be the last; "untold"; "by some": on ranks of even number.
        is_exchanged: replicas do not read each other's sums where they are, on one machine, but exchange them.
        is_silent: the losses are multiplied by zero, so that noise is all that is released.
        has_ledger: steps are paid for in leases of 8.
    """

    network: str = "mixed"
    optimizer: str = "sgd"
    clipping: str = "flat"
    noise: str = "fresh"
    physical: int = 3
    spread: str = "replicas"
    groups: int = 1
    rows: str = "equal"
    rate: float = RATE
    keep: str = "full"
    last: str = "told"
    is_exchanged: bool = False
    is_silent: bool = False
    has_ledger: bool = False

    @property
    def alone(self) -> Case:
        """The same on one process, all units in one batch."""
        return replace(self, physical=64, spread="replicas", last="told", is_exchanged=False)

    @property
    def strategy(self) -> Strategy | None:
        return STRATEGIES.get(self.noise)

    def plan(self) -> PrivacyPlan:
        return PrivacyPlan(
            sample_rate=self.rate,
            noise_multiplier=0.0 if self.noise == "none" else SIGMA,
            max_grad_norm=CLIP,
            steps=STEPS,
            expected_batch_size=EXPECTED,
            clipping=CLIPPINGS[self.clipping],
            strategy=self.strategy,
            period=4 if self.strategy else 1,
            arithmetic="discrete" if self.noise == "discrete" else "float",
        )

    def module(self) -> nn.Module:
        """With the same weights on all ranks; none is zero."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = NETWORKS[self.network]()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return module

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Two groups: the second has what is one-dimensional and learns at half the rate."""
        kind, options = OPTIMIZERS[self.optimizer]
        if self.groups == 1:
            return kind(module.parameters(), **options)
        flat = [p for p in module.parameters() if p.dim() == 1]
        full = [p for p in module.parameters() if p.dim() > 1]
        return kind([{"params": full}, {"params": flat, "lr": options["lr"] / 2}], **options)

    def counts(self) -> list[int]:
        return RAGGED if self.rows == "ragged" else [2] * UNITS

    def units(self) -> list[Tensor]:
        """The rows of each unit."""
        return list(torch.split(mixed_inputs(sum(self.counts()), seed=3), self.counts()))


@dataclass
class Run:
    """What one rank saw of a run.

    Attributes:
        state: `PrivateTrainer.state_dict`, whole.
        own: this rank's own parameters, whole.
        places: (step, first, end) of every piece of noise that this rank made.
        lines: of the ledger, on rank 0.
        epsilon: what the ledger says to this rank.
    """

    state: dict[str, np.ndarray] = field(default_factory=dict)
    own: dict[str, np.ndarray] = field(default_factory=dict)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    epsilon: float = 0.0


def train(case: Case, folder: str = "") -> Run:
    """`STEPS` steps of a case on the ranks that there are; a ledger lies in `folder`."""
    with patch.dict(os.environ, {"SYNTHWARD_HOST_MEMORY": "off"} if case.is_exchanged else {}):
        return _train(case, folder)


def _train(case: Case, folder: str) -> Run:
    run, rank = Run(), dist.get_rank() if dist.is_initialized() else 0
    # No two ranks have the same global seed: nothing may follow it.
    torch.manual_seed(1000 + rank)
    module = case.module()
    spread(module, case.spread)
    optimizer = case.make_optimizer(module)
    keys, plan = KeySchedule.reproducible(SEED), case.plan()
    kept, ledger = make_ledger(folder, keys) if case.has_ledger else (None, None)
    trainer = PrivateTrainer(module, optimizer, plan, keys=keys, ledger=ledger, perf=PerfSpec(keep=case.keep))
    sampler, units = plan.sampler(UNITS, keys.key("sampler")), case.units()
    with watched(keys.key("noise"), run.places):
        for step in range(STEPS):
            if ledger is not None and step % 8 == 0:
                ledger.lease(plan.event(1), step, min(8, STEPS - step))
            if step == STEPS // 2:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
            accumulate(trainer, module, case, units, sampler.draw(step))
            trainer.apply()
            if ledger is not None and step % 8 == 7:
                ledger.close_lease(8)
    run.state = {name: whole(value) for name, value in trainer.state_dict().items()}
    run.own = {name: whole(value) for name, value in module.named_parameters()}
    if ledger is not None:
        run.epsilon = ledger.epsilon()
    if kept is not None:
        run.lines = [dict(line) for line in kept.lines]
        kept.close()
    return run


def accumulate(
    trainer: PrivateTrainer, module: nn.Module, case: Case, units: list[Tensor], drawn: np.ndarray
) -> None:
    """This rank's physical batches of a draw."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = list(physical_batches(drawn, case.physical, rank=rank, world_size=size))
    for number, chosen in enumerate(batches):
        mask = torch.from_numpy(chosen >= 0)
        if case.rows == "ragged":
            rows = [units[unit] if unit >= 0 else units[0][:0] for unit in chosen]
            counts = [len(part) for part in rows]
            where: dict[str, Any] = {"offsets": torch.tensor([0, *counts]).cumsum(0)}
        else:
            rows, counts = [units[max(unit, 0)] for unit in chosen], [2] * len(chosen)
            where = {"rows_per_unit": 2}
        is_last = number == len(batches) - 1 and (
            case.last == "told" or (case.last == "by some" and rank % 2 == 0)
        )
        with trainer.capture():
            losses = unit_losses(module, torch.cat(rows), counts) * (0.0 if case.is_silent else 1.0)
        trainer.backward(losses, unit_mask=mask, is_last=is_last, **where)


def spread(module: nn.Module, how: str) -> None:
    """Shard a module over all ranks, or leave it as it is."""
    if how == "replicas":
        return
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "blocks":
        for child in module.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(value: Tensor) -> np.ndarray:
    """A copy of all of a tensor, sharded or not. To be called on all ranks."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().numpy().copy()


def make_ledger(folder: str, keys: KeySchedule) -> tuple[Ledger | None, SharedLedger]:
    """A ledger that rank 0 keeps, None on the others; and as all ranks use it."""
    ranks, ledger = Ranks.current(), None
    if ranks.is_main:
        ledger = Ledger.create(
            Path(folder) / "ledger.jsonl",
            run_id="run",
            unit="patient",
            delta=1e-5,
            key_id=keys.key_id,
            private=False,
            accountant="rdp",
        )
    return ledger, SharedLedger(ranks, ledger)


@contextmanager
def watched(noise_key: bytes, places: list[tuple[int, int, int]]) -> Iterator[None]:
    """Notes which noise of a key is made inside: all that makes some checks its place first."""
    checked, checked_std = _check.place, _check.noise_std

    def place(key: bytes, stream: int, step: int, start: int, count: int) -> None:
        checked(key, stream, step, start, count)
        if key == noise_key:
            places.append((step, start, start + count))

    def noise_std(value: float) -> None:
        checked_std(value)
        # An update that adds none (integers were released before it) has checked its place all the same.
        if value == 0.0 and places:
            places.pop()

    _check.place, _check.noise_std = place, noise_std
    try:
        yield
    finally:
        _check.place, _check.noise_std = checked, checked_std
