"""What is planned: a network and its losses, how it is trained, and on what."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from synthward.engine.errors import ConfigError
from synthward.engine.rates import Rates, measured_rates
from synthward.engine.spec import ClipSpec, PerfSpec, check_positive

KINDS = ("cpu", "gpu")
PARALLELS = ("replicate", "shard")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Built:
    """A network as it was built.

    Attributes:
        module: the private network.
        losses: ``losses(*data)`` -> [U], run under the capture.
        blocks: layers that `fully_shard` would wrap, each of which is whole on a rank only while it runs.
        others: networks beside it, which see no records.
    """

    module: nn.Module
    losses: Callable[..., Tensor]
    blocks: Sequence[nn.Module] = ()
    others: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Workload:
    """What is trained; both functions are called where tensors have no numbers.

    Attributes:
        name: for people.
        build: makes the network.
        data: ``data(units)``: the batch of that many privacy units.
        rows_per_unit: rows of the network's batch axis for each unit.
        assumptions: what it was made up from, for people.
    """

    name: str
    build: Callable[[], Built]
    data: Callable[[int], tuple[Tensor, ...]]
    rows_per_unit: int = 1
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """What one rank computes on.

    Args:
        kind: "cpu" or "gpu": which kernels there are.
        memory: bytes.
        flops: floating-point operations a second that the network's products reach.
        exact_flops: the same for products of fp32 that round no operand: norms and clipped sums. (Those of operands of
            half precision, which a GPU multiplies without error, are made at `flops`.)
        bandwidth: bytes a second to and from memory.
        link: bytes a second that one rank sends to the others.
        rates: of the norms, for the planner; None for `exact_flops` throughout.
    """

    kind: str
    memory: float
    flops: float
    exact_flops: float
    bandwidth: float
    link: float
    rates: Rates | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"device: got {self.kind!r}; choose one of {', '.join(KINDS)}")
        for name in ("memory", "flops", "exact_flops", "bandwidth", "link"):
            check_positive(getattr(self, name), f"device {name}")

    @classmethod
    def here(cls, ranks: int = 1) -> Device:
        """A rank's part of this machine: its memory over `ranks`, and its measured rates."""
        rates = measured_rates(torch.device("cpu"))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
        flops = max(rates.product, rates.library)
        return cls("cpu", memory, flops, flops, rates.bytes, 1e9, rates)

    @classmethod
    def gpu(cls, precision: str) -> Device:
        """One of today's, at what kernels reach and not at what is advertised."""
        flops = 3e14 if precision == "bf16" else 4e13
        return cls("gpu", 80.0 * 2**30, flops, 4e13, 2e12, 2.5e10)

    @property
    def norm_rates(self) -> Rates:
        """What the planner reckons with where operands are fp32."""
        if self.rates is not None:
            return self.rates
        flops = self.exact_flops
        return Rates(flops, flops, self.bandwidth, 0.0, flops)

    def rates_of(self, dtype: torch.dtype) -> Rates:
        """Of norms of operands of a type: a CPU takes all of them in fp32."""
        if self.kind == "cpu" or dtype.itemsize != 2:
            return self.norm_rates
        return Rates(self.flops, self.flops, self.bandwidth, 0.0, self.flops)

    def sum_flops_of(self, dtype: torch.dtype) -> float:
        """Operations a second of clipped sums of operands of a type."""
        return self.flops if self.kind == "gpu" and dtype.itemsize == 2 else self.exact_flops


@dataclass(frozen=True)
class Setting:
    """How it is trained.

    Args:
        batch: expected number of units of a logical step, over all ranks.
        steps: logical steps.
        ranks: processes, one device each.
        parallel: "replicate" (each rank holds all parameters, moments are split) or "shard" (`fully_shard`).
        precision: "fp32", or "bf16" by autocast (parameters, sums and moments stay fp32).
        clip: the clipping rule.
        perf: how the step is computed.
        offload: parameters, sums and moments are kept in the host's memory; sharded ones only.
        physical_batch_size: most units at once on a rank, or None for as many as fit.
    """

    batch: float
    steps: int = 1000
    ranks: int = 1
    parallel: str = "replicate"
    precision: str = "fp32"
    clip: ClipSpec = field(default_factory=lambda: ClipSpec(1.0))
    perf: PerfSpec = field(default_factory=PerfSpec)
    offload: bool = False
    physical_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self.batch, "batch")
        for name in ("steps", "ranks"):
            _check_count(name, getattr(self, name))
        if self.physical_batch_size is not None:
            _check_count("physical batch size", self.physical_batch_size)
        if self.parallel not in PARALLELS:
            raise ConfigError(f"parallel: got {self.parallel!r}; choose one of {', '.join(PARALLELS)}")
        if self.offload and self.parallel != "shard":
            raise ConfigError("offload: is torch's CPUOffloadPolicy, which goes with parallel 'shard' only")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: got {self.precision!r}; choose one of {', '.join(PRECISIONS)}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: got {value!r}; give a whole number of at least 1")
