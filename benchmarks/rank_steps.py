"""One training step of a workload on the ranks that there are, by plain PyTorch, by this engine, by its peer; and
pieces of such a step, each alone.

Every rank has its share of the one batch of a workload, so that what all ranks do in a step is what one process does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import WORKLOADS, Block, Workload
from benchmarks.steps import CLIP, LEARNING_RATE, NOISE, Mean, Step, setup
from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer
from synthward.engine.distributed.agreement import check_in_step
from synthward.engine.distributed.exchange import start_all_gather, start_reduce_scatter
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.flat import FlatParameters

# Elements that each collective is timed for.
SIZES = tuple(1 << power for power in (12, 16, 18, 20, 22, 23))
REPEATS = 9
# As many numbers as a step compares between ranks.
_MARKS: dict[str, int | float] = {
    "draw": 0,
    "step": 0,
    "stream": 0,
    "place": 0,
    "bound": CLIP,
    "noise": NOISE,
    "failed": 0,
    "open": 0,
    "dropped": 0,
}


@dataclass(frozen=True)
class Share:
    """What a process has of a workload, and how many processes there are."""

    rank: int = 0
    size: int = 1

    def of(self, work: Workload) -> tuple[nn.Module, Tensor, Tensor]:
        """The network with the same weights everywhere, and this process's rows of the batch."""
        network, x, y = setup(work, 0)
        each = work.batch // self.size
        rows = slice(self.rank * each, (self.rank + 1) * each)
        return network, x[rows].contiguous(), y[rows].contiguous()


def _adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


def shard(network: nn.Module) -> nn.Module:
    """FSDP2: each block of a decoder, else each layer with parameters, and then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [layer for layer in network.modules() if isinstance(layer, Block)]
    layers = [layer for layer in network.children() if any(True for _ in layer.parameters())]
    for layer in blocks or layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def plain_step(work: Workload, share: Share, wrap: Callable[[nn.Module], nn.Module] = _as_it_is) -> Step:
    """Forward, backward of the mean loss, Adam."""
    network, x, y = share.of(work)
    network = wrap(network)
    optimizer = _adam(network)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        work.row_losses(network(x), y).mean().backward()
        optimizer.step()

    return step


@dataclass
class PrivateStep:
    """Forward, one backward pass, clip and sum; then exchange, noise and Adam.

    Attributes:
        found: median seconds of both parts.
    """

    work: Workload
    share: Share
    wrap: Callable[[nn.Module], nn.Module] = _as_it_is
    is_told: bool = True
    passes: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        network, self.x, self.y = self.share.of(self.work)
        self.network = self.wrap(network)
        ranks = Ranks.current()
        plan = PrivacyPlan(
            sample_rate=0.01,
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            steps=10**6,
            expected_batch_size=self.work.batch,
        )
        keys = KeySchedule.shared(ranks)
        self.trainer = PrivateTrainer(self.network, _adam(self.network), plan, keys=keys, ranks=ranks)

    def __call__(self) -> None:
        begun = time.perf_counter()
        with self.trainer.capture():
            losses = self.work.row_losses(self.network(self.x), self.y)
        self.trainer.backward(losses, rows_per_unit=1, is_last=self.is_told)
        summed = time.perf_counter()
        self.trainer.apply()
        self.passes.append(summed - begun)
        self.updates.append(time.perf_counter() - summed)

    @property
    def found(self) -> dict[str, float]:
        return {
            "pass_seconds": statistics.median(self.passes),
            "apply_seconds": statistics.median(self.updates),
        }


def opacus_step(work: Workload, share: Share, mode: str) -> Step:
    """Opacus' own data parallel, by hooks or ghost clipping, with its default noise."""
    import opacus
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel

    network, x, y = share.of(work)
    network = DifferentiallyPrivateDistributedDataParallel(network)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(y))
    made: Any = opacus.PrivacyEngine().make_private(
        module=network,
        optimizer=_adam(network),
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


def exchange_step(work: Workload, share: Share) -> Step:
    """What ranks send each other in a step, and nothing else: sums to their owners, parameters from them."""
    network = share.of(work)[0]
    ranks = Ranks.current()
    flat = FlatParameters(network, _adam(network), ranks)

    def step() -> None:
        flat.sums.begin_pass(is_last=False)
        flat.sums.complete(lambda: check_in_step(ranks, _MARKS))
        flat.share()
        flat.sums.release()

    return step


class Collectives:
    """Each collective of the engine and of DDP alone, by size.

    Attributes:
        found: by name and elements of the whole tensor: median seconds.
    """

    def __init__(self) -> None:
        self._ranks = Ranks.current()
        self._calls: dict[str, Callable[[Tensor], object]] = {
            "reduce_scatter": self._reduce_scatter,
            "all_gather": lambda whole: start_all_gather(self._ranks, whole).wait(),
            "all_reduce": lambda whole: dist.all_reduce(whole),
        }
        self.found: dict[str, dict[int, float]] = {name: {} for name in self._calls}

    def _reduce_scatter(self, whole: Tensor) -> None:
        own = whole.view(self._ranks.world_size, -1)[self._ranks.rank]
        start_reduce_scatter(self._ranks, whole, own).wait()

    def __call__(self) -> None:
        for name, call in self._calls.items():
            for size in SIZES:
                whole = torch.zeros(size)
                self.found[name][size] = statistics.median(_seconds(call, whole) for _ in range(REPEATS))


def _seconds(call: Callable[[Tensor], object], whole: Tensor) -> float:
    dist.barrier()
    begun = time.perf_counter()
    call(whole)
    return time.perf_counter() - begun


Make = Callable[[Workload, Share], Step]


@dataclass(frozen=True)
class Variant:
    """A step, and the processes that take it together.

    Attributes:
        is_split: one process for each rank; else one process has all threads and the whole batch.
        is_group: the processes form a group.
        sees_memory: ranks may use memory in common (`synthward.engine.distributed.hostmem`).
    """

    make: Make
    is_split: bool = True
    is_group: bool = True
    sees_memory: bool = True


VARIANTS: dict[str, Variant] = {
    "plain": Variant(plain_step, is_split=False, is_group=False),
    "plain DDP": Variant(lambda work, share: plain_step(work, share, DistributedDataParallel)),
    "plain FSDP2": Variant(lambda work, share: plain_step(work, share, shard)),
    "synthward": Variant(PrivateStep, is_split=False, is_group=False),
    "synthward replicas": Variant(PrivateStep),
    "synthward replicas, loopback": Variant(PrivateStep, sees_memory=False),
    "synthward FSDP2": Variant(lambda work, share: PrivateStep(work, share, shard)),
    "opacus ghost DDP": Variant(lambda work, share: opacus_step(work, share, "ghost")),
    "opacus hooks DDP": Variant(lambda work, share: opacus_step(work, share, "hooks")),
    "plain apart": Variant(plain_step, is_group=False),
    "synthward apart": Variant(PrivateStep, is_group=False),
    "synthward replicas, loopback, untold": Variant(
        lambda work, share: PrivateStep(work, share, is_told=False), sees_memory=False
    ),
    "exchange, memory in common": Variant(exchange_step),
    "exchange, loopback": Variant(exchange_step, sees_memory=False),
    "collectives": Variant(lambda work, share: Collectives()),
}


def make_step(model: str, variant: str, share: Share) -> Step:
    """The step of a model by a variant's name."""
    return VARIANTS[variant].make(WORKLOADS[model], share)
