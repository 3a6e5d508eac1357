"""One training step of a workload by plain PyTorch, by this engine and by its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import WORKLOADS, Workload
from synthward import PrivacyEngine
from synthward.engine import ClipSpec, KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer
from synthward.engine.memory import keep_freed_memory

LEARNING_RATE, CLIP, NOISE = 1e-4, 1.0, 1.0

Step = Callable[[], None]


def plain_step(work: Workload, *, fused: bool, seed: int = 0) -> Step:
    """Forward, backward of the mean loss, Adam."""
    network, x, y = setup(work, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=fused)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        work.row_losses(network(x), y).mean().backward()
        optimizer.step()

    return step


def kept_memory_step(work: Workload) -> Step:
    """The plain step with the allocator set as the engine sets it, in a process that the engine does not run in."""
    keep_freed_memory()
    return plain_step(work, fused=False)


def private_step(
    work: Workload, *, clipping: str | ClipSpec = "flat", perf: PerfSpec | None = None, seed: int = 0
) -> Step:
    """Forward, one backward pass, clip, ChaCha20 noise and Adam."""
    trainer, network, x, y = _trainer(work, clipping, perf, seed)

    def step() -> None:
        with trainer.capture():
            losses = work.row_losses(network(x), y)
        trainer.backward(losses, rows_per_unit=1)
        trainer.apply()

    return step


def recorded_step(
    work: Workload, *, clipping: str | ClipSpec = "flat", fuse: bool = False, seed: int = 0
) -> Step:
    """The same with its passes recorded (`PrivateTrainer.compile`), past those that are looked at."""
    trainer, network, x, y = _trainer(work, clipping, None, seed)
    run = trainer.compile(lambda x, y: work.row_losses(network(x), y), fuse=fuse)

    def step() -> None:
        run(x, y)
        trainer.apply()

    for _ in range(4):
        step()
    return step


def _trainer(
    work: Workload, clipping: str | ClipSpec, perf: PerfSpec | None, seed: int
) -> tuple[PrivateTrainer, nn.Module, Tensor, Tensor]:
    network, x, y = setup(work, seed)
    plan = PrivacyPlan(
        sample_rate=0.01,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        steps=10**6,
        expected_batch_size=work.batch,
        clipping=clipping,
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    trainer = PrivateTrainer(network, optimizer, plan, keys=KeySchedule.from_os(), ledger=None, perf=perf)
    return trainer, network, x, y


def loop_step(work: Workload, seed: int = 0) -> Step:
    """The same by `PrivacyEngine`, in the loop that Opacus' users know."""
    network, x, y = setup(work, seed)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(y))
    module, optimizer, _ = PrivacyEngine().make_private(
        module=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=LEARNING_RATE),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        poisson_sampling=False,
    )
    criterion = Mean(work)

    def step() -> None:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()

    return step


class Mean(nn.Module):
    """A criterion that Opacus' ghost mode accepts: a loss per row, or their mean."""

    def __init__(self, work: Workload, reduction: str = "mean") -> None:
        super().__init__()
        self.work, self.reduction = work, reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = self.work.row_losses(output, target)
        return losses if self.reduction == "none" else losses.mean()


def opacus_step(work: Workload, mode: str, seed: int = 0) -> Step:
    """Opacus' hooks or ghost clipping with its default noise."""
    import opacus

    network, x, y = setup(work, seed)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(y))
    made: Any = opacus.PrivacyEngine().make_private(
        module=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=LEARNING_RATE),
        criterion=Mean(work),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    module, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else Mean(work)

    def step() -> None:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()

    return step


def setup(work: Workload, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    network = work.build()
    return network, *work.data(work.batch)


VARIANTS: dict[str, Callable[[Workload], Step]] = {
    "plain": lambda work: plain_step(work, fused=False),
    "plain, fused Adam": lambda work: plain_step(work, fused=True),
    "plain, kept memory": kept_memory_step,
    "synthward": private_step,
    "synthward, recorded": recorded_step,
    "synthward, make_private": loop_step,
    "synthward, library's products": lambda work: private_step(work, perf=PerfSpec(products="library")),
    "synthward per-layer": lambda work: private_step(work, clipping="per-layer"),
    "synthward, bf16 kept": lambda work: private_step(work, perf=PerfSpec(keep="bf16")),
    "synthward, recomputed": lambda work: private_step(work, perf=PerfSpec(keep="recompute")),
    "opacus ghost": lambda work: opacus_step(work, "ghost"),
    "opacus hooks": lambda work: opacus_step(work, "hooks"),
}


def make_step(model: str, variant: str) -> Step:
    """The step of a model by a variant's name."""
    return VARIANTS[variant](WORKLOADS[model])
