"""Networks for recorded passes, and pairs of trainers: one that records and one that does not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthward.engine import ClipSpec, KeySchedule, PrivacyPlan, PrivateTrainer
from tests.engine.layers import Attention, Recurrent
from tests.engine.nets import Mixed, Tied, mixed_inputs, row_losses

UNITS, ROUNDS = 5, 10


class Images(nn.Module):
    """Convolution, group norm and a linear layer on [N, 2, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.conv(x))).flatten(1))


def attention() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), Attention(6, 2, True), nn.RMSNorm(6), nn.TransformerEncoderLayer(
        6, 2, dim_feedforward=8, dropout=0.0, batch_first=True
    ))  # fmt: skip


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(UNITS, *shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: mixed_inputs(UNITS, *shape, seed=seed)


# A network, and its batch by a seed.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "rows": (lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), numbers(4)),
    "many rows": (lambda: nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 2)), numbers(70, 4)),
    "mixed": (Mixed, ids(3)),
    "tied": (Tied, ids(3)),
    "attention": (attention, numbers(7, 6)),
    "images": (Images, numbers(2, 6, 6)),
    "recurrent": (lambda: Recurrent(nn.GRU(3, 4, batch_first=True)), numbers(4, 3)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)),
        numbers(4),
    ),
    "frozen": (
        lambda: nn.Sequential(
            nn.Linear(4, 3).requires_grad_(False),
            nn.BatchNorm1d(3).eval().requires_grad_(False),
            nn.Linear(3, 2),
        ),
        numbers(4),
    ),
}
CLIPS = {
    "flat": ClipSpec(0.5),
    "per-layer": ClipSpec(0.5, "per-layer"),
    "automatic": ClipSpec(0.5, "automatic"),
}


def trainer_of(module: nn.Module, clip: ClipSpec = CLIPS["flat"], **settings: object) -> PrivateTrainer:
    perf = settings.pop("perf", None)
    plan = PrivacyPlan(
        sample_rate=0.1,
        noise_multiplier=0.7,
        max_grad_norm=clip.max_grad_norm,
        steps=100,
        expected_batch_size=UNITS,
        clipping=clip,
        **settings,
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    return PrivateTrainer(module, optimizer, plan, keys=KeySchedule.reproducible(3), perf=perf)


def pair(make: Callable[[], nn.Module], **settings: object) -> tuple[PrivateTrainer, PrivateTrainer]:
    """Two trainers of the same network and noise."""
    torch.manual_seed(0)
    module = make()
    twin = copy.deepcopy(module)
    return trainer_of(module, **settings), trainer_of(twin, **settings)


def module_of(trainer: PrivateTrainer) -> nn.Module:
    return trainer._step.module


def take(trainer: PrivateTrainer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with trainer.capture():
        losses = row_losses(module_of(trainer), x)
    trainer.backward(losses, rows_per_unit=1, unit_mask=mask)
    return losses.detach()


def record(trainer: PrivateTrainer, **options: object):
    module = module_of(trainer)
    return trainer.compile(lambda x: row_losses(module, x), **options)


def assert_same(plain: PrivateTrainer, recorded: PrivateTrainer) -> None:
    sums = plain._step.sums.flat
    assert sums.any() and torch.equal(sums, recorded._step.sums.flat)
